"""Fourier transforms on their way to an engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.conftest import Gpuopt

LOUD = """
import numpy as np, torch
class Loud(torch.nn.Module):
    def forward(self, x):
        return torch.view_as_real(torch.fft.rfft2(x))
def make():
    return Loud()
def data():
    yield {"x": np.full((1, 64, 64), 40, np.float32)}
"""


def test_a_sum_beyond_fp16_is_told_as_such(gpuopt: Gpuopt, tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(LOUD)
    arguments = ("compile", "loud:make", "-c", "loud:data", "-p", "fp16", "-t", "onnxruntime", "-o", "out.gpuopt")
    result = gpuopt(*arguments, cwd=tmp_path)
    assert result.code == 8
    assert "NaN or infinity" in result.stderr
    assert "FP16 ends at 65504" in result.stderr
    kept = gpuopt(*arguments, "--set", "cast.nodes_to_keep=['*']", cwd=tmp_path)
    assert kept.code == 0, kept.stderr


def test_a_length_that_folding_makes_constant_counts(gpuopt: Gpuopt, tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["eight"], ["length"]),
            helper.make_node("DFT", ["x", "length"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 2])],
        [numpy_helper.from_array(np.array(8), "eight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    result = gpuopt("compile", "m.onnx", "-p", "fp32", "-t", "onnxruntime", "--json", cwd=tmp_path)
    assert result.code == 0, result.stderr
    facts = {stage["name"]: stage["facts"] for stage in result.report()["stages"]}
    assert facts["simplify"]["operators"] == {"Reshape": 2, "MatMul": 1}
