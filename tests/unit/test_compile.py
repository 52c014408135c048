"""What `gpuopt compile` answers where it ends before its first stage."""

from __future__ import annotations

from pathlib import Path

from gpuopt.cache import Cache
from gpuopt.compile import compile_model
from gpuopt.progress import Silent
from gpuopt.recipe import resolve


def test_a_run_that_wrote_no_folder_names_none(tmp_path: Path) -> None:
    tree = {"model": {"path": str(tmp_path / "m.onnx")}, "precision": "fp32", "build": {"target": ["onnxruntime"]}}
    found = compile_model(resolve(tree), Cache(tmp_path / "cache"), Silent(), [])
    assert found.error is not None
    assert (found.report.status, found.report.bundle) == ("failed", None)
