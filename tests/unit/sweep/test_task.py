"""Tasks of a sweep on this machine, in real processes: what keeps one from ending well keeps no other."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

import gpuopt
from gpuopt import recipe
from gpuopt.sweep import local
from gpuopt.sweep.results import Row
from gpuopt.sweep.task import Task


def task(name: str, output: Path, **changes: Any) -> Task:
    """One whose model is not there, so that it ends soon."""
    tree = {"model": {"path": str(output / f"{name}.onnx")}, "precision": "fp32", "build": {"target": ["onnxruntime"]}}
    about = {"name": name, "model": name, "precision": "fp32", "target": "onnxruntime", "target_label": "onnxruntime",
             "gpu": changes.get("gpu", ""), "batch": None}  # fmt: skip
    told = {"key": None, "run": "1", "version": gpuopt.__version__, "folder": str(output), **changes}
    return Task(name=name, recipe=recipe.resolve(tree).to_yaml(), about=about, output=str(output), **told)


def shadow_libraries(folder: Path) -> Path:
    """Files with the names of what gpuopt imports; gives the file that any of them would write."""
    said = folder.parent / "ran.txt"
    for name in ("typer", "yaml", "numpy", "pydantic", "queue", "json"):
        (folder / f"{name}.py").write_text(f"open({str(said)!r}, 'a').write(__file__)\nraise ImportError('a shadow')\n")
    return said


def test_a_row_that_cannot_be_written_is_a_failure_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "rows" / "blocked.json").mkdir(parents=True)
    rows: list[Row] = []
    local.run([task("blocked", tmp_path), task("other", tmp_path)], 2, rows.append)
    told = {row.name: row.error.message for row in rows if row.error is not None}
    assert "cannot write" in told["blocked"]
    assert "other.onnx" in told["other"]
    assert (tmp_path / "rows" / "other.json").is_file()


def test_a_task_that_cannot_be_begun_is_a_failure_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    rows: list[Row] = []
    local.run([task("one", tmp_path), task("two", tmp_path)], 1, rows.append)
    assert [row.error.message.partition(":")[0] for row in rows if row.error] == [
        "cannot begin one",
        "cannot begin two",
    ]


def test_the_libraries_of_a_task_are_not_looked_for_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "downloaded"
    folder.mkdir()
    said = shadow_libraries(folder)
    monkeypatch.chdir(folder)
    rows: list[Row] = []
    local.run([task("one", tmp_path, folder=str(folder))], 1, rows.append)
    assert not said.exists()
    assert [row.error.kind for row in rows if row.error] == ["storage"]
