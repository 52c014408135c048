"""An ONNX graph's description: interface, weights, and which nodes multiply in INT8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from gpuopt.errors import ModelError
from gpuopt.inspection.graphs import describe
from gpuopt.inspection.model import GraphFacts
from tests.unit.quantization.graphs import depthwise_block, model_of

ONE = np.float32(1)
ZERO = np.int8(0)


def described(model: onnx.ModelProto, tmp_path: Path) -> GraphFacts:
    onnx.save(model, str(tmp_path / "model.onnx"))
    return describe(tmp_path / "model.onnx", None, True)


def quantized_conv(weights_as_integers: bool) -> onnx.ModelProto:
    """x -> Q/DQ -> Conv (INT8) -> Conv with only its data quantized -> MatMul in FP32 behind a transposed weight."""
    kernel = np.ones((4, 4, 1, 1), np.float32)
    constants = {"s": ONE, "z": ZERO, "w2": kernel, "w": kernel.astype(np.int8) if weights_as_integers else kernel}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w" if weights_as_integers else "wq", "s", "z"], ["wd"]),
        helper.make_node("Conv", ["xd", "wd"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "s", "z"], ["cd"]),
        helper.make_node("Conv", ["cd", "w2"], ["y"]),
    ]
    if not weights_as_integers:
        nodes.insert(2, helper.make_node("QuantizeLinear", ["w", "s", "z"], ["wq"]))
    return model_of(nodes, constants, ("batch", 4, 2, 2))


@pytest.mark.parametrize("as_integers", [True, False])
def test_a_node_is_int8_if_both_factors_are(as_integers: bool, tmp_path: Path) -> None:
    found = described(quantized_conv(as_integers), tmp_path)
    assert found.computing_nodes == {"int8": 1, "fp32": 1}
    assert found.macs == 2 * 4 * 4 * 4
    assert found.int8_macs_share == 0.5
    assert found.macs_shapes == {"x": "1x4x2x2"}
    assert (found.qdq_pairs, found.dequantized_weights) == ((2, 1) if as_integers else (3, 0))


def test_a_weight_may_be_moved_between_its_scale_and_its_product(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"]),
        helper.make_node("Transpose", ["wd"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["xd", "wt"], ["y"]),
    ]
    constants = {"s": ONE, "z": ZERO, "w": np.ones((3, 5), np.int8)}
    found = described(model_of(nodes, constants, (2, 5)), tmp_path)
    assert found.computing_nodes == {"int8": 1}
    assert found.macs == 2 * 5 * 3
    assert found.int8_macs_share == 1.0


def test_quantizers_of_other_types_are_not_int8(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["y"]),
    ]
    values = [
        numpy_helper.from_array(ONE, "s"),
        helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0]),
        helper.make_tensor("w", TensorProto.FLOAT8E4M3FN, [5, 3], [1.0] * 15),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 5))]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, values)
    found = described(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), tmp_path)
    assert found.computing_nodes == {"fp32": 1}
    assert found.outputs[0].shape is None


def test_operators_on_integers_count(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("QLinearMatMul", ["xq", "s", "z", "w", "s", "z", "s", "z"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["y"]),
    ]
    constants = {"s": ONE, "z": ZERO, "w": np.ones((5, 3), np.int8)}
    found = described(model_of(nodes, constants, (2, 5)), tmp_path)
    assert found.computing_nodes == {"int8": 1}
    assert (found.macs, found.int8_macs_share) == (30, 1.0)


def test_a_graph_that_goes_in_circles_is_described(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Identity", ["b"], ["a"]),
        helper.make_node("Identity", ["a"], ["b"]),
        helper.make_node("MatMul", ["a", "b"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 5))]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    assert described(helper.make_model(graph, ir_version=10), tmp_path).macs is None


@pytest.mark.parametrize("name", [b"batch", b"weights"])
def test_names_that_are_no_text_are_an_error_of_the_model(name: bytes, tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "weights"], ["y"])]
    model = model_of(nodes, {"weights": np.ones((100, 3), np.float32)}, ("batch", 100))
    content = model.SerializeToString().replace(name, name[:-1] + b"\xff")
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="is a damaged ONNX file"):
        describe(tmp_path / "model.onnx", None, True)


def test_fp16_and_weights_by_dtype(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["h", "w"], ["m"]),
        helper.make_node("Cast", ["m"], ["y"], to=TensorProto.FLOAT),
    ]
    found = described(model_of(nodes, {"w": np.ones((5, 3), np.float16)}, (2, 5)), tmp_path)
    assert found.computing_nodes == {"fp16": 1}
    assert found.int8_macs_share == 0.0
    assert {name: (w.tensors, w.size_bytes) for name, w in found.weights.items()} == {"float16": (1, 30)}


def test_shapes_that_nobody_knows_give_no_share(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["n"]),
        helper.make_node("Cast", ["n"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["w", "f"], ["y"]),
    ]
    found = described(model_of(nodes, {"w": np.ones((3, 2), np.float32)}, (2, 5)), tmp_path)
    assert (found.macs, found.int8_macs_share, found.macs_shapes) == (None, None, {})
    assert found.computing_nodes == {"fp32": 1}


def test_unusual_interfaces_are_described(tmp_path: Path) -> None:
    inputs = [
        helper.make_tensor_value_info("b", TensorProto.BFLOAT16, (None, 3)),
        helper.make_tensor_value_info("s", TensorProto.STRING, None),
        helper.make_tensor_sequence_value_info("q", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("empty", TensorProto.FLOAT, ()),
    ]
    nodes = [helper.make_node("Identity", ["b"], ["y"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, ("n", 3))]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs), ir_version=10)
    found = described(model, tmp_path)
    assert [(t.name, t.shape) for t in found.inputs] == [
        ("b", ("dim0", 3)), ("s", None), ("q", None), ("empty", ())
    ]  # fmt: skip
    assert found.inputs[0].dtype == "bfloat16"
    assert found.inputs[2].dtype == "sequence"
    assert found.outputs[0].shape == ("n", 3)


def test_subgraphs_count_for_weights_and_operators(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((4,), np.float32), "w")
    body = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, (4,))],
        [weight],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["e"])], "else", [], [helper.make_tensor_value_info("e", 1, (4,))]
    )
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=other)]
    inputs = [helper.make_tensor_value_info("x", 1, (4,)), helper.make_tensor_value_info("c", TensorProto.BOOL, ())]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", 1, (4,))])
    found = described(helper.make_model(graph, ir_version=10), tmp_path)
    assert found.operators == {"If": 1, "Add": 1, "Identity": 1}
    assert found.weights["float32"].size_bytes == 16
    assert (found.computing_nodes, found.macs) == ({}, None)


def test_external_weights_are_counted_named_and_kept_in_their_folder(tmp_path: Path) -> None:
    model = depthwise_block()
    onnx.save(model, str(tmp_path / "big.onnx"), save_as_external_data=True, location="big.data", size_threshold=0)
    found = describe(tmp_path / "big.onnx", None, True)
    assert [(f.name, f.size_bytes) for f in found.external] == [
        ("big.data", (tmp_path / "big.data").stat().st_size)
    ]  # fmt: skip
    onnx.save(depthwise_block(), str(tmp_path / "whole.onnx"))
    assert found.weights == describe(tmp_path / "whole.onnx", None, True).weights
    (tmp_path / "big.data").unlink()
    with pytest.raises(ModelError, match="is missing"):
        describe(tmp_path / "big.onnx", None, True)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname"])
def test_external_weights_outside_their_folder_are_refused(location: str, tmp_path: Path) -> None:
    model = depthwise_block()
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(bytes(1 << 16))
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], location)
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    (tmp_path / "in" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="leaves the model's folder"):
        describe(tmp_path / "in" / "model.onnx", None, True)


@pytest.mark.parametrize(
    ("node", "ir_version", "opsets", "verdict", "reason"),
    [
        (("Relu", ""), 10, {"": 20}, "yes", ""),
        (("Relu", "ai.onnx"), 10, {"ai.onnx": 20}, "yes", ""),
        (("Gelu", "com.microsoft"), 10, {"": 20, "com.microsoft": 1}, "yes", ""),
        (("Relu", ""), 99, {"": 20}, "unknown", "IR version 99 is newer than"),
        (("Relu", ""), 10, {"": 99}, "unknown", "opset 99 of ai.onnx is newer than"),
        (("Relu", ""), 10, {"": 20, "ai.onnx.ml": 99}, "unknown", "opset 99 of ai.onnx.ml is newer than 5, the newest"),
        (("NoSuchOp", ""), 10, {"": 20}, "no", "ONNX has no operator ai.onnx.NoSuchOp (opset 20)"),
        (("Gelu", ""), 10, {"": 19}, "no", "ONNX has no operator ai.onnx.Gelu (opset 19)"),
        (("Upsample", ""), 10, {"": 20}, "no", "ONNX has no operator ai.onnx.Upsample (opset 20)"),
        (("NoSuchOp", "com.microsoft"), 10, {"": 20, "com.microsoft": 1}, "unknown", "has operator com.microsoft.NoSu"),
    ],
)
def test_a_graph_that_onnx_runtime_refuses_is_not_said_to_load_here(
    node: tuple[str, str], ir_version: int, opsets: dict[str, int], verdict: str, reason: str, tmp_path: Path
) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    made = helper.make_node(node[0], ["x"], ["y"], domain=node[1])
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    graph = helper.make_graph([made], "g", values[:1], values[1:])
    model = helper.make_model(graph, ir_version=ir_version, opset_imports=imports)
    found = described(model, tmp_path).loading
    assert (found.verdict, len(found.reasons)) == (verdict, 1 if reason else 0)
    assert reason in "".join(found.reasons)
    try:
        onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
        opens = True
    except Exception:
        opens = False
    assert opens == (found.verdict == "yes"), "ONNX Runtime itself"


def test_operators_that_a_file_defines_itself_need_no_library(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    body = [helper.make_node("Relu", ["a"], ["b"])]
    functions = [helper.make_function("own", "Mine", ["a"], ["b"], body, opsets[:1])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Mine", ["x"], ["y"], domain="own")], "g", values[:1], values[1:])
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets, functions=functions)
    assert described(model, tmp_path).loading.verdict == "yes"
    model.functions[0].node[0].op_type = "NoSuchOp"
    assert described(model, tmp_path).loading.verdict == "no"
