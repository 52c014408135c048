"""What simplifying leaves of a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.conftest import Gpuopt


@pytest.mark.parametrize(("bias", "inputs"), [((0, 0), 2), ((0, -1), 3)])
def test_biases_of_zeros_are_left_out(gpuopt: Gpuopt, tmp_path: Path, bias: tuple[int, int], inputs: int) -> None:
    constants = {"w": np.ones((2, 3, 3, 3), np.float32), "b": np.array(bias, np.float32)}
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, side, side])
        for name, channels, side in (("x", 3, 8), ("y", 2, 6))
    )
    weights = [numpy_helper.from_array(values, name) for name, values in constants.items()]
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w", "b"], ["y"])], "one", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    result = gpuopt("compile", "model.onnx", "-p", "fp32", "-t", "onnxruntime", "-o", "out.gpuopt", cwd=tmp_path)
    assert result.code == 0, result.stderr
    nodes = onnx.load(tmp_path / "out.gpuopt/model.onnx").graph.node
    assert [(node.op_type, len(node.input)) for node in nodes] == [("Conv", inputs)]
