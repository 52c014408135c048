"""Where INT8 goes, and the reason for every node that stays in floating point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gpuopt.calibration.collectors import TensorRange
from gpuopt.quantization.placement import SMALLEST_FP16_SCALE, Placement, candidate_tensors, place
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
    ],
)
def test_few_channels_keep_a_node_out(made: onnx.ModelProto, narrow: int | None) -> None:
    said = "" if narrow is None else f"{narrow} channels on a side, fewer than quantize.min_channels 16"
    assert reason(made) == said
    assert reason(made, min_channels=narrow or 1) == ""


def test_products_of_activations_stay_out() -> None:
    model = graph([node("Relu", "x", "q"), node("MatMul", "q", "x", "y")])
    assert reason(model).startswith("both operands are activations")


def test_a_weight_on_the_left_stays_out_with_its_own_reason() -> None:
    assert reason(graph([node("MatMul", "w", "x", "y")], w=(64, 64))).startswith("the weight is the first operand")


def test_a_product_with_a_vector_stays_out() -> None:
    assert reason(graph([node("MatMul", "x", "w", "y")], w=(64,))).startswith("a matrix times a vector")


@pytest.mark.parametrize(("order", "producer"), [(("c", "x"), "Conv"), (("x", "c"), "ConvTranspose")])
def test_the_residual_add_behind_a_convolution_is_quantized(order: tuple[str, str], producer: str) -> None:
    model = graph([node(producer, "x", "w", "c"), node("Add", *order, "y")], w=(16, 16, 3, 3))
    conv, add = decide(model)
    assert conv.quantized
    assert add == Placement("n1", "Add", True, "")
    assert set(candidate_tensors(model)) == {"x", "c"}


@pytest.mark.parametrize(
    "model",
    [
        graph([node("Add", "x", "x", "y")]),
        graph([node("Relu", "x", "r"), node("Add", "r", "x", "y")]),
        graph([node("Conv", "x", "w", "c"), node("Add", "c", "b", "y")], w=(16, 16, 1, 1), b=(16, 1, 1)),
        graph([node("Conv", "x", "w", "c"), node("Relu", "c", "r"), node("Add", "r", "x", "y")], w=(16, 16, 1, 1)),
    ],
)
def test_other_adds_stay_out(model: onnx.ModelProto) -> None:
    assert decide(model)[-1].reason == "not the residual Add of a convolution"


def test_a_tensor_without_a_range_keeps_its_node_out() -> None:
    assert place(CONV, QuantizeSection(), {}, True)[0].reason == "'x' has no calibrated range"


def test_both_branches_of_an_add_need_a_range() -> None:
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
