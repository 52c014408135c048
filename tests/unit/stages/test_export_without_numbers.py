"""The export stage on models that do not compute numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from gpuopt import recipe, reference
from gpuopt.artifact import Artifact, StageOutcome
from gpuopt.errors import ModelError
from gpuopt.progress import Silent
from gpuopt.stages import export, samples
from gpuopt.stages.context import StageContext


class Root(torch.nn.Module):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(x)


def model_file(folder: Path, kind: str) -> Path:
    path = folder / f"model.{kind}"
    if kind == "pt":
        torch.jit.save(torch.jit.trace(Root(), torch.ones(1, 3)), str(path))
        return path
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Sqrt", ["x"], ["y"], name="root")], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


def exported(folder: Path, kind: str, *rows: list[float]) -> StageOutcome:
    (folder / "samples").mkdir()
    (folder / "out").mkdir()
    if rows:
        arrays = {f"{index}:x": np.array([row], np.float32) for index, row in enumerate(rows)}
        reference.save_arrays(folder / "samples" / samples.SAMPLES_FILE, arrays)
    settings = {
        "model": {"path": str(model_file(folder, kind))},
        "inputs": {"x": {"min": "1x3", "opt": "2x3", "max": "2x3", "low": -2, "high": -1}},
    }
    artifacts = {"samples": Artifact("samples", folder / "samples", "")}
    return export.run(StageContext(recipe.resolve(settings), artifacts, folder / "out", Silent()))


@pytest.mark.parametrize("kind", ["pt", "onnx"])
def test_a_model_that_gives_nan_alone_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gives nothing but NaN in output '.*' at profile0-min") as caught:
        exported(tmp_path, kind, [-1, -2, -3], [1, 2, 3])
    assert "calibration data" in caught.value.hint
    assert len(caught.value.lines().splitlines()) == 2


def test_generated_inputs_are_named_as_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing but NaN") as caught:
        exported(tmp_path, "onnx")
    assert "The inputs were generated" in caught.value.hint


@pytest.mark.parametrize(("rows", "warned"), [([[1, 2, 3]], False), ([[1, 2, 3], [-1, 4, 4]], True)])
def test_nan_beside_numbers_is_a_warning(rows: list[list[float]], warned: bool, tmp_path: Path) -> None:
    told = [text for text in exported(tmp_path, "onnx", *rows).warnings if "NaN" in text]
    said = "the original model gives NaN in 16.7% of output 'y' at profile0-opt: the other values alone are compared"
    assert told == ([said] if warned else [])
