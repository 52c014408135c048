"""ONNX files of another opset: converted to what computes the same, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from gpuopt import recipe
from gpuopt.artifact import Artifact, StageOutcome
from gpuopt.errors import ExportError
from gpuopt.progress import Silent
from gpuopt.stages import export
from gpuopt.stages.context import StageContext

SHAPE = (1, 2, 5, 5)
X = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def graph_of(
    nodes: Sequence[onnx.NodeProto], name: str = "g", inputs: Sequence[str] = ("x",), **constants: Any
) -> onnx.GraphProto:
    return helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (*SHAPE[:2], "h", "w"))],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )


def exported(graph: onnx.GraphProto, opset: int, folder: Path) -> StageOutcome:
    """The export of that graph, in `model.onnx`, to `made/`."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=4)
    onnx.save(model, str(folder / "model.onnx"))
    for name in ("samples", "made"):
        (folder / name).mkdir()
    chosen = recipe.resolve({"model": {"path": str(folder / "model.onnx")}})
    samples = {"samples": Artifact("samples", folder / "samples", "")}
    return export.run(StageContext(chosen, samples, folder / "made", Silent()))


def output(path: Path) -> np.ndarray[Any, Any]:
    (value,) = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": X})
    return np.asarray(value)


@pytest.mark.parametrize("in_a_branch", [False, True])
@pytest.mark.parametrize(
    ("operator", "opset", "mode", "scale"),
    [
        ("Upsample", 9, "linear", 2.0),
        ("Upsample", 9, "nearest", 1.3),
        ("Resize", 10, "linear", 1.5),
        ("Resize", 10, "linear", 0.5),
        ("Resize", 10, "nearest", 3.0),
    ],
)
def test_old_resizing_stays_what_it_is(
    operator: str, opset: int, mode: str, scale: float, in_a_branch: bool, tmp_path: Path
) -> None:
    node = helper.make_node(operator, ["x", "scales"], ["y"], mode=mode)
    scales = np.array([1, 1, scale, scale], np.float32)
    graph = graph_of([node], scales=scales)
    if in_a_branch:
        body = graph_of([node], "branch", (), scales=scales)
        graph = graph_of([helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)], c=True)
    made = exported(graph, opset, tmp_path)
    assert made.warnings == (f"opset {opset} was converted to 20",)
    assert np.allclose(output(tmp_path / "made/onnx/model.onnx"), output(tmp_path / "model.onnx"), atol=1e-6)


def test_a_conversion_that_changes_an_output_is_refused(tmp_path: Path) -> None:
    # Up to opset 12, Hardmax has one 1 in all that stands behind the axis; onnx converts the name alone.
    graph = graph_of([helper.make_node("Hardmax", ["x"], ["y"])])
    with pytest.raises(ExportError, match="computes something else once its opset 11 is converted to 20: output 'y'"):
        exported(graph, 11, tmp_path)


def test_a_conversion_that_cannot_be_checked_is_told(tmp_path: Path) -> None:
    names = ("scale", "shift", "mean", "variance")
    node = helper.make_node("BatchNormalization", ["x", *names], ["y"], is_test=1)
    graph = graph_of([node], **{name: np.ones(2, np.float32) for name in names})
    graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in names)
    converted, unchecked = exported(graph, 6, tmp_path).warnings
    assert converted == "opset 6 was converted to 20"
    assert unchecked.startswith("the conversion from opset 6 was not checked: ONNX Runtime")
