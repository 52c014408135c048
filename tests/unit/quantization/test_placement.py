"""Where INT8 goes, and the reason for every node that stays in floating point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gpuopt import lowering
from gpuopt.calibration.collectors import TensorRange
from gpuopt.quantization.placement import (
    SMALLEST_FP16_SCALE,
    Placement,
    QuantizedInput,
    candidate_tensors,
    explain,
    place,
)
from gpuopt.recipe import QuantizeSection


def graph(nodes: Sequence[onnx.NodeProto], **constants: Sequence[int]) -> onnx.ModelProto:
    for index, node in enumerate(nodes):
        node.name = node.name or f"n{index}"
    values = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in constants.items()]
    open_shape = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    outputs = [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)]
    return helper.make_model(helper.make_graph(list(nodes), "g", open_shape, outputs, values))


def node(op_type: str, *names: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, names[:-1], names[-1:], **attributes)


def with_shape(model: onnx.ModelProto, **shapes: Sequence[int | None]) -> None:
    del model.graph.value_info[:]
    for name, shape in shapes.items():
        model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))


def decide(model: onnx.ModelProto, fp16: bool = True, amax: float = 1.0, **settings: Any) -> list[Placement]:
    known = {name: TensorRange(-amax, amax, "minmax") for name in candidate_tensors(model)}
    return place(model, QuantizeSection(**settings), known, fp16)


def reason(model: onnx.ModelProto, **settings: Any) -> str:
    (decision,) = decide(model, **settings)
    assert decision.quantized == (decision.reason == "")
    return decision.reason


CONV = graph([node("Conv", "x", "w", "y")], w=(16, 16, 3, 3))
MATMUL = graph([node("MatMul", "x", "w", "y")], w=(64, 32))


@pytest.mark.parametrize(
    "model",
    [
        CONV,
        MATMUL,
        graph([node("Gemm", "x", "w", "b", "y", transB=1)], w=(64, 32), b=(64,)),
        graph([node("ConvTranspose", "x", "w", "y")], w=(16, 32, 2, 2)),
        graph([node("MatMul", "x", "w", "y")], w=(4, 64, 32)),
    ],
    ids=lambda model: model.graph.node[0].op_type,
)
def test_a_wide_node_with_a_constant_weight_is_quantized(model: onnx.ModelProto) -> None:
    assert reason(model) == ""
    assert candidate_tensors(model) == ["x"]


def test_other_operators_are_no_candidates() -> None:
    model = graph([node("Relu", "x", "r"), node("Softmax", "r", "y")])
    assert decide(model) == []
    assert candidate_tensors(model) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"op_types": ("MatMul",)}, "Conv is not among quantize.op_types"),
        ({"op_types_to_exclude": ("Conv*",)}, "Conv is excluded by quantize.op_types_to_exclude"),
        ({"nodes_to_exclude": ("*/head/*",)}, "excluded by quantize.nodes_to_exclude"),
        ({"nodes_to_exclude": ("/model/head/conv",)}, "excluded by quantize.nodes_to_exclude"),
        ({"nodes_to_exclude": ("*/HEAD/*", "head")}, ""),
    ],
)
def test_the_recipe_decides_first(settings: dict[str, Any], said: str) -> None:
    model = graph([node("Conv", "x", "w", "y", name="/model/head/conv")], w=(8, 8, 3, 3))
    assert reason(model, min_channels=1, **settings) == said


def test_the_recipe_goes_before_every_other_reason() -> None:
    model = graph([node("Conv", "x", "w", "y")], w=(1, 1, 1, 1))
    assert reason(model, amax=0.0, op_types=("MatMul",)) == "Conv is not among quantize.op_types"


@pytest.mark.parametrize(
    ("made", "narrow"),
    [
        (graph([node("Conv", "x", "w", "y")], w=(16, 15, 3, 3)), 15),
        (graph([node("Conv", "x", "w", "y")], w=(8, 16, 3, 3)), 8),
        (graph([node("Conv", "x", "w", "y", group=16)], w=(16, 1, 3, 3)), None),
        (graph([node("Conv", "x", "w", "y", group=3)], w=(48, 1, 3, 3)), 3),
        (graph([node("ConvTranspose", "x", "w", "y", group=4)], w=(16, 4, 2, 2)), None),
        (graph([node("ConvTranspose", "x", "w", "y", group=4)], w=(16, 2, 2, 2)), 8),
        (graph([node("MatMul", "x", "w", "y")], w=(64, 10)), 10),
        (graph([node("Gemm", "x", "w", "y")], w=(12, 64)), 12),
        (graph([node("Gemm", "x", "w", "y", transB=1)], w=(12, 64)), 12),
    ],
)
def test_few_channels_keep_a_node_out(made: onnx.ModelProto, narrow: int | None) -> None:
    said = "" if narrow is None else f"{narrow} channels on a side, fewer than quantize.min_channels 16"
    assert reason(made) == said
    assert reason(made, min_channels=narrow or 1) == ""


def test_the_first_convolution_over_an_image_is_quantized() -> None:
    stem = graph([node("Conv", "x", "w", "y")], w=(64, 3, 7, 7))
    assert reason(stem) == ""
    wide = graph([node("Conv", "x", "w", "y")], w=(64, 5, 7, 7))
    assert reason(wide) == "5 channels on a side, fewer than quantize.min_channels 16"
    narrow = graph([node("Conv", "x", "w", "y")], w=(8, 3, 7, 7))
    assert reason(narrow) == "8 channels on a side, fewer than quantize.min_channels 16"
    inside = graph([node("Relu", "x", "r"), node("Conv", "r", "w", "y")], w=(64, 3, 7, 7))
    assert reason(inside) == "3 channels on a side, fewer than quantize.min_channels 16"


def averaged(
    *,
    average: str = "GlobalAveragePool",
    tail: str = "Gemm",
    second_reader: bool = False,
    classes: int = 20,
    transposed: bool = False,
) -> onnx.ModelProto:
    nodes = [
        node("Conv", "x", "w", "c"),
        node("Relu", "c", "r"),
        node(average, "r", "g"),
        node("Flatten", "g", "f"),
        node(tail, "f", "v", "y", transB=int(transposed)) if tail == "Gemm" else node(tail, "f", "y"),
    ]
    if second_reader:
        nodes.insert(3, node("Relu", "r", "other"))
    return graph(nodes, w=(32, 16, 1, 1), v=(classes, 32) if transposed else (32, classes))


def test_an_average_between_int8_layers_runs_in_int8_with_a_scale_of_its_own() -> None:
    decided = {d.op_type: d for d in decide(averaged())}
    average = decided["GlobalAveragePool"]
    assert average.quantized
    assert [operand.tensor for operand in average.inputs] == ["r"]
    assert average.note.startswith("an average between INT8 layers, input 'r' scale ")
    assert [operand.tensor for operand in decided["Flatten"].inputs] == ["g"]
    assert "r" in candidate_tensors(averaged())


@pytest.mark.parametrize("changes", [{"average": "AveragePool", "tail": "Softmax"}, {"second_reader": True}])
def test_an_average_with_a_neighbour_in_floating_point_stays_out(changes: dict[str, Any]) -> None:
    decided = {d.op_type: d for d in decide(averaged(**changes))}
    assert changes.get("average", "GlobalAveragePool") not in decided


def test_an_average_behind_a_layer_in_floating_point_or_kept_out_stays_so() -> None:
    for tail in ("Gemm", "Softmax"):
        model = averaged(tail=tail)
        excluded = {d.op_type: d for d in decide(model, nodes_to_exclude=("n2",))}["GlobalAveragePool"]
        assert (excluded.quantized, excluded.reason) == (False, "excluded by quantize.nodes_to_exclude")
        assert "GlobalAveragePool" not in {d.op_type for d in decide(model, nodes_to_exclude=("n0",))}
    of_an_input = graph([node("GlobalAveragePool", "x", "g"), node("Gemm", "g", "v", "y")], v=(16, 20))
    assert "GlobalAveragePool" not in {d.op_type for d in decide(of_an_input)}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("average", ["GlobalAveragePool", "AveragePool"])
def test_a_classifier_of_few_classes_takes_int8_behind_an_average_of_int8_values(
    average: str, transposed: bool
) -> None:
    model = averaged(average=average, classes=1, transposed=transposed)
    decided = {d.op_type: d for d in decide(model)}
    assert all(decided[kind].quantized for kind in (average, "Flatten", "Gemm"))
    assert {"r", "f"} <= set(candidate_tensors(model, min_channels=16))


@pytest.mark.parametrize("average", ["GlobalAveragePool", "MaxPool"])
def test_a_classifier_of_one_row_takes_int8_behind_an_average_of_int8_values_alone(average: str) -> None:
    model = averaged(average=average)
    with_shape(model, f=(1, 32))
    decided = {d.op_type: d for d in decide(model)}
    is_average = average == "GlobalAveragePool"
    assert ("f" in candidate_tensors(model)) == is_average
    if is_average:
        assert all(decided[kind].quantized for kind in (average, "Flatten", "Gemm"))
    else:
        assert decided["Gemm"].reason.startswith("a vector times a matrix, always one row")


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (averaged(classes=10), {"nodes_to_exclude": ("n0",)}),
        (averaged(classes=10), {"nodes_to_exclude": ("n2",)}),
        (averaged(classes=10), {"nodes_to_exclude": ("n3",)}),
        (averaged(classes=10), {"format": "qoperator"}),
        (averaged(classes=10, second_reader=True), {}),
        (averaged(average="MaxPool", classes=10), {}),
    ],
)
def test_it_stays_out_where_the_average_is_not_of_int8_values(model: onnx.ModelProto, settings: dict[str, Any]) -> None:
    classifier = next(d for d in decide(model, **settings) if d.op_type == "Gemm")
    assert classifier.reason == "10 channels on a side, fewer than quantize.min_channels 16"


@pytest.mark.parametrize(("kind", "shape"), [("Conv", (4, 32, 1, 1)), ("ConvTranspose", (32, 4, 1, 1))])
def test_a_narrow_convolution_behind_an_average_stays_out(kind: str, shape: tuple[int, ...]) -> None:
    nodes = [node("Conv", "x", "w", "c"), node("GlobalAveragePool", "c", "g"), node(kind, "g", "v", "y")]
    behind = decide(graph(nodes, w=(32, 16, 1, 1), v=shape))[-1]
    assert behind.reason == "4 channels on a side, fewer than quantize.min_channels 16"


def test_a_classifier_behind_an_average_that_is_out_of_range_stays_out() -> None:
    model = averaged(classes=10)
    known = {name: TensorRange(-1, 1, "test") for name in candidate_tensors(model)}
    known["r"] = TensorRange(0, 1e-5, "test")
    decided = {d.op_type: d for d in place(model, QuantizeSection(), known, fp16=True)}
    assert decided["GlobalAveragePool"].reason.startswith("'r' is too small for an FP16 scale")
    assert decided["Gemm"].reason == "10 channels on a side, fewer than quantize.min_channels 16"


@pytest.mark.parametrize("is_output", [False, True])
def test_an_average_over_all_places_takes_int8_whatever_reads_it(is_output: bool) -> None:
    model = averaged(tail="Softmax")
    if is_output:
        del model.graph.node[3:]
        model.graph.output[0].name = "g"
    average = next(d for d in decide(model) if d.op_type == "GlobalAveragePool")
    assert [operand.tensor for operand in average.inputs] == ["r"]
    assert average.note.startswith("the average of INT8 values, in floating point, input 'r' scale ")


def test_a_fourier_transform_stays_out() -> None:
    model = graph([node("MatMul", "x", "w", "y")], w=(64, 64))
    model.graph.node[0].name = f"spectrum{lowering.TRANSFORM}"
    assert reason(model).startswith("a Fourier transform: ")


def test_products_of_activations_stay_out() -> None:
    model = graph([node("Relu", "x", "q"), node("MatMul", "q", "x", "y")])
    assert reason(model).startswith("both operands are activations")


@pytest.mark.parametrize("kind", ["FLOAT16", "DOUBLE", "INT64"])
def test_what_is_not_fp32_stays_out_with_its_type(kind: str) -> None:
    model = graph([node("MatMul", "x", "w", "y")], w=(64, 32))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DataType.Value(kind)
    assert reason(model) == f"'x' is {kind}: only FP32 is quantized"


def test_a_weight_on_the_left_stays_out_with_its_own_reason() -> None:
    assert reason(graph([node("MatMul", "w", "x", "y")], w=(64, 64))).startswith("the weight is the first operand")


def test_a_product_with_a_vector_stays_out() -> None:
    assert reason(graph([node("MatMul", "x", "w", "y")], w=(64,))).startswith("a matrix times a vector")


# Residuals ---------------------------------------------------------------------------------------


def chosen(decision: Placement) -> list[str]:
    return [operand.tensor for operand in decision.inputs]


@pytest.mark.parametrize(("order", "producer"), [(("c", "x"), "Conv"), (("x", "c"), "ConvTranspose")])
def test_only_the_residual_of_an_add_behind_a_convolution_is_quantized(order: tuple[str, str], producer: str) -> None:
    model = graph([node(producer, "x", "w", "c"), node("Add", *order, "y")], w=(16, 16, 3, 3))
    conv, add = decide(model)
    assert conv.quantized
    assert add.quantized
    assert add.inputs == (QuantizedInput(order.index("x"), "x", 1.0),)
    assert add.note == f"residual branch of the Add behind {producer} 'n0', input 'x' scale 0.00787 from minmax"
    assert candidate_tensors(model) == ["x"]


def test_of_two_convolutions_the_longer_path_is_the_residual() -> None:
    """As in a ResNet: the downsampling shortcut is fused with the Add, what comes from the main path is quantized."""
    nodes = [
        node("Conv", "x", "w", "a"),
        node("Relu", "a", "r"),
        node("Conv", "r", "w", "main"),
        node("Conv", "x", "w", "short"),
    ]
    for operands in (("main", "short"), ("short", "main")):
        model = graph([*nodes, node("Add", *operands, "y")], w=(16, 16, 1, 1))
        assert chosen(decide(model)[-1]) == ["main"]
        # Settings may keep one of the convolutions out, and then the other is fused.
        assert candidate_tensors(model) == ["x", "r", *operands]
        for fused, residual, name in (("main", "short", "n3"), ("short", "main", "n2")):
            found = decide(model, nodes_to_exclude=(name,))[-1]
            assert chosen(found) == [residual], fused
        assert not decide(model, nodes_to_exclude=("n2", "n3"))[-1].quantized


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (graph([node("Add", "x", "x", "y")]), "no convolution directly behind it"),
        (graph([node("Relu", "x", "r"), node("Add", "r", "x", "y")]), "no convolution directly behind it"),
        (
            graph([node("Conv", "x", "w", "c"), node("Add", "c", "b", "y")], w=(16, 16, 1, 1), b=(16, 1, 1)),
            "adds a constant",
        ),
        (
            graph([node("Conv", "x", "w", "c"), node("Relu", "c", "r"), node("Add", "r", "x", "y")], w=(16, 16, 1, 1)),
            "no convolution directly behind it",
        ),
        (
            graph([node("Conv", "x", "w", "c"), node("Add", "c", "c", "y")], w=(16, 16, 1, 1)),
            "the convolution's output is broadcast or read elsewhere",
        ),
        (
            graph([node("Conv", "x", "w", "c"), node("Relu", "c", "r"), node("Add", "c", "r", "y")], w=(16, 16, 1, 1)),
            "the convolution's output is broadcast or read elsewhere",
        ),
        (
            graph([node("MatMul", "x", "w", "m"), node("Add", "m", "x", "y")], w=(64, 64)),
            "no convolution directly behind it",
        ),
        (
            graph([node("Conv", "x", "w", "c"), node("Add", "c", "x", "y")], w=(8, 8, 1, 1)),
            "Conv 'n0' behind it stays in floating point",
        ),
    ],
)
def test_other_adds_stay_out(model: onnx.ModelProto, said: str) -> None:
    add = decide(model)[-1]
    assert add.op_type == "Add"
    assert not add.quantized
    assert add.inputs == ()
    assert add.reason.startswith(said)


def test_a_broadcast_residual_stays_out() -> None:
    model = graph([node("Conv", "x", "w", "c"), node("Add", "c", "x", "y")], w=(16, 16, 1, 1))
    with_shape(model, x=(2, 16, 1, 1), c=(2, 16, 8, 8), y=(2, 16, 8, 8))
    assert decide(model)[-1].reason.startswith("the other operand is broadcast")
    with_shape(model, x=(2, 16, 8, 8), c=(2, 16, 8, 8), y=(2, 16, 8, 8))
    assert decide(model)[-1].quantized


def test_a_product_of_a_single_row_stays_out() -> None:
    for rows, out in (((1,), True), ((1, 1), True), ((None,), False), ((2,), False), ((1, 7), False)):
        model = graph([node("MatMul", "x", "w", "y")], w=(64, 32))
        with_shape(model, x=(*rows, 64))
        assert (candidate_tensors(model) == []) == out
        known = {"x": TensorRange(-1, 1, "minmax")}
        assert place(model, QuantizeSection(), known, True)[0].reason.startswith("a vector times a matrix") == out


# Regions -----------------------------------------------------------------------------------------


def region(ranges: dict[str, float], *nodes: onnx.NodeProto, **settings: Any) -> dict[str, Placement]:
    model = graph([*nodes], w=(16, 16, 1, 1), wide=(16, 32, 1, 1))
    known = {name: TensorRange(-amax, amax, "entropy") for name, amax in ranges.items()}
    assert set(candidate_tensors(model)) <= set(known)
    return {d.node: d for d in place(model, QuantizeSection(**settings), known, True)}


def test_an_operator_that_moves_values_shares_its_reader_s_scale() -> None:
    for op_type in ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Identity"):
        found = region({"p": 2.0}, node(op_type, "x", "p", name="move"), node("Conv", "p", "w", "y", name="conv"))
        assert found["move"].quantized
        assert found["move"].inputs == (QuantizedInput(0, "x", 2.0),)
        assert found["conv"].inputs[0] == QuantizedInput(0, "p", 2.0)
        assert found["move"].note == "moves INT8 values: scale 0.0157 shared by 'p', 'x'"
        assert "shared by 'p', 'x'" in found["conv"].note


def test_a_concat_takes_the_largest_of_its_branches() -> None:
    nodes = (
        node("Relu", "x", "a"),
        node("Concat", "a", "x", "cat", axis=1, name="cat"),
        node("Conv", "cat", "wide", "y", name="conv"),
    )
    found = region({"a": 1.0, "x": 1.5, "cat": 1.25}, *nodes)
    assert [operand.amax for operand in found["cat"].inputs] == [1.5, 1.5]
    assert found["conv"].inputs[0].amax == 1.5
    assert region({"a": 0.0, "x": 1.5, "cat": 1.25}, *nodes)["cat"].quantized


def test_a_chain_of_movers_is_one_region() -> None:
    found = region(
        {"a": 1.0, "b": 1.5, "r": 1.25},
        node("Relu", "x", "a"),
        node("MaxPool", "a", "b", name="pool"),
        node("Concat", "a", "b", "cat", axis=1, name="cat"),
        node("Reshape", "cat", "shape", "r", name="reshape"),
        node("Conv", "r", "wide", "y", name="conv"),
    )
    scales = {operand.amax for d in found.values() for operand in d.inputs if operand.amax is not None}
    assert scales == {1.5}
    assert all(d.quantized for d in found.values())


def test_a_region_that_would_cost_a_reader_a_bit_is_not_joined() -> None:
    nodes = (
        node("Relu", "x", "a"),
        node("Concat", "a", "x", "cat", axis=1, name="cat"),
        node("Conv", "cat", "wide", "c", name="one"),
        node("Conv", "a", "w", "d", name="two"),
        node("Concat", "c", "d", "y", axis=1, name="out"),
    )
    assert region({"a": 1.0, "x": 2.0, "cat": 2.0}, *nodes)["cat"].quantized
    found = region({"a": 1.0, "x": 2.1, "cat": 2.1}, *nodes)
    assert found["cat"].reason == "one scale would cost 'a' (largest value 1) over a bit: 'x' reaches 2.1"
    assert found["two"].inputs[0].amax == 1.0
    assert found["one"].inputs[0].amax == 2.1


@pytest.mark.parametrize(
    ("between", "said"),
    [
        ((node("AveragePool", "x", "p", name="move"),), None),
        ((node("MaxPool", "x", "p", name="move"), node("Relu", "p", "r", name="relu")), "'p' feeds Relu 'relu', too"),
        ((node("Concat", "x", "w", "p", axis=0, name="move"),), "an operand is a constant"),
    ],
)
def test_what_does_not_share_a_scale(between: tuple[onnx.NodeProto, ...], said: str | None) -> None:
    found = region({"p": 1.0, "x": 1.0}, *between, node("Conv", "p", "w", "y", name="conv"))
    assert found["conv"].quantized
    assert "move" not in found if said is None else found["move"].reason.startswith(said)


def test_the_recipe_keeps_movers_out_too() -> None:
    nodes = (node("MaxPool", "x", "p", name="pool"), node("Conv", "p", "w", "y", name="conv"))
    excluded = region({"p": 1.0}, *nodes, op_types_to_exclude=("Max*",))["pool"]
    assert excluded.reason == "MaxPool is excluded by quantize.op_types_to_exclude"
    assert not region({"p": 1.0}, *nodes, op_types=("Conv",))["pool"].quantized


def test_an_output_of_the_graph_stays_in_floating_point() -> None:
    model = graph([node("MaxPool", "x", "p", name="pool"), node("Conv", "p", "w", "y", name="conv")], w=(16, 16, 1, 1))
    model.graph.output.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, None))
    pool, conv = decide(model)
    assert conv.quantized
    assert pool.reason == "'p' is an output of the graph, too"


# Every node has a reason -------------------------------------------------------------------------


def test_every_node_is_explained() -> None:
    model = graph(
        [
            node("Conv", "x", "w", "c", group=16),
            node("Relu", "c", "r"),
            node("AveragePool", "r", "g"),
            node("Flatten", "g", "f"),
            node("Softmax", "f", "y"),
        ],
        w=(16, 1, 1, 1),
    )
    found = explain(model, decide(model))
    assert [d.node for d in found] == ["n0", "n1", "n2", "n3", "n4"]
    assert all(bool(d.note) == d.quantized and bool(d.reason) != d.quantized for d in found)
    assert found[0].note == (
        "weights per channel, input 'x' scale 0.00787 from minmax, depthwise: TensorRT has INT8 kernels for it"
    )
    assert found[2].reason.startswith("an average does not commute with Q/DQ, and not all")
    assert found[4].reason == "Softmax needs the range or the precision of floating point"


@pytest.mark.parametrize(
    ("made", "axis"),
    [
        (node("Conv", "x", "w", "y"), 0),
        (node("ConvTranspose", "x", "w", "y"), 1),
        (node("ConvTranspose", "x", "w", "y", group=2), None),
        (node("Gemm", "x", "w", "y"), 1),
        (node("Gemm", "x", "w", "y", transB=1), 0),
        (node("MatMul", "x", "w", "y"), None),
    ],
)
def test_weights_have_a_scale_for_every_output_channel(made: onnx.NodeProto, axis: int | None) -> None:
    model = graph([made], w=(16, 16, 16, 16))
    (decision,) = decide(model)
    assert decision.inputs[1] == QuantizedInput(1, "w", None, axis)
    assert decide(model, per_channel=False)[0].inputs[1].axis is None


def test_a_matrix_has_a_scale_for_every_column() -> None:
    assert decide(MATMUL)[0].inputs[1] == QuantizedInput(1, "w", None, 1)


def test_a_stack_of_matrices_has_no_scale_a_column_as_qoperator() -> None:
    model = graph([node("MatMul", "x", "w", "y")], w=(4, 64, 32))
    known = {name: TensorRange(-1, 1, "minmax") for name in ("x", "y")}
    for per_channel in (True, False):
        section = QuantizeSection(format="qoperator", per_channel=per_channel)
        (decision,) = place(model, section, known, False)
        assert decision.quantized != per_channel


# Ranges ------------------------------------------------------------------------------------------


def test_a_tensor_without_a_range_keeps_its_node_out() -> None:
    assert place(CONV, QuantizeSection(), {}, True)[0].reason == "'x' has no calibrated range"


def test_the_residual_needs_a_range() -> None:
    model = graph([node("Conv", "x", "w", "c"), node("Relu", "x", "r"), node("Add", "c", "r", "y")], w=(16, 16, 1, 1))
    known = {name: TensorRange(0, 1, "minmax") for name in ("x", "c")}
    conv, add = place(model, QuantizeSection(), known, True)
    assert conv.quantized
    assert add.reason == "'r' has no calibrated range"


def test_a_tensor_of_zeros_keeps_its_node_out() -> None:
    assert reason(CONV, amax=0.0) == "'x' is zero on all calibration data"


@pytest.mark.parametrize(
    ("amax", "said"),
    [
        (127 * SMALLEST_FP16_SCALE, ""),
        (126 * SMALLEST_FP16_SCALE, "'x' is too small for an FP16 scale (largest value 2.4e-04)"),
        (127 * 65504.0, ""),
        (128 * 65504.0, "'x' is too large for an FP16 scale (largest value 8.4e+06)"),
    ],
)
def test_a_scale_that_fp16_cannot_hold_keeps_its_node_out(amax: float, said: str) -> None:
    assert reason(CONV, amax=amax) == said
    assert reason(CONV, amax=amax, fp16=False) == ""
