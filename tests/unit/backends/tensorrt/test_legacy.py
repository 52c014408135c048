"""Graphs for TensorRT 8.5: what it does not know is spelled out, with the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from gpuopt.backends.tensorrt.legacy import without_layer_normalization


def graph(axis: int, bias: bool, rank: int = 3) -> onnx.ModelProto:
    sizes = [2, 5, 7, 3][:rank]
    normalised = sizes[axis:]
    generator = np.random.default_rng(0)
    constants = [numpy_helper.from_array(generator.standard_normal(normalised).astype(np.float32), n) for n in "sb"]
    inputs = ["x", "s", "b"] if bias else ["x", "s"]
    nodes = [
        helper.make_node("LayerNormalization", inputs, ["n"], "norm", axis=axis, epsilon=1e-3),
        helper.make_node("Relu", ["n"], ["y"], "relu"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *sizes[1:]]) for name in "xy"]
    made = helper.make_graph(nodes, "g", values[:1], values[1:], constants[: 1 + bias])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("axis", "rank"), [(-1, 3), (2, 3), (1, 3), (-2, 4), (1, 4)])
def test_layer_normalization_is_spelled_out_with_the_same_numbers(axis: int, rank: int, bias: bool) -> None:
    model = graph(axis, bias, rank)
    before = model.SerializeToString()
    found = without_layer_normalization(model)
    assert found is not None
    assert model.SerializeToString() == before
    assert {node.op_type for node in found.graph.node} <= {"ReduceMean", "Sub", "Mul", "Add", "Sqrt", "Div", "Relu"}
    names = [node.name for node in found.graph.node]
    assert len(set(names)) == len(names)
    x = (np.random.default_rng(1).standard_normal((4, 5, 7, 3)[:rank]) * 3 + 1).astype(np.float32)
    np.testing.assert_allclose(run(found, x), run(model, x), rtol=1e-4, atol=1e-5)


def test_what_is_not_plain_stays() -> None:
    model = graph(-1, True)
    model.graph.node[0].output.append("mean")
    assert without_layer_normalization(model) is None
    model = graph(-1, True)
    del model.graph.node[0]
    assert without_layer_normalization(model) is None
