"""`gpuopt compare` on bundles of a small model, compiled for ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Gpuopt
from tests.integration import small


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, gpuopt: Gpuopt) -> Path:
    """Two bundles of one model: INT8, and FP16."""
    folder = tmp_path_factory.mktemp("compare")
    small.save("exported program", folder / "model.pt")
    small.save_data(folder / "calibration.npz")
    for name, precision in (("old", "int8"), ("new", "int8"), ("fp16", "fp16")):
        made = gpuopt("compile", "model.pt", "-p", precision, "-t", "onnxruntime", "-o", f"{name}.gpuopt", cwd=folder)
        assert made.code == 0, made.stderr
    return folder


def test_the_same_model_twice_is_not_worse(project: Path, gpuopt: Gpuopt) -> None:
    result = gpuopt("compare", "old.gpuopt", "new.gpuopt", "--json", cwd=project)
    assert result.code == 0, result.stderr
    rows = result.report()["rows"]
    assert {row["verdict"] for row in rows} == {"same", "not comparable"}
    assert {row["name"] for row in rows} >= {"sqnr_db", "cosine", "engine_size_bytes", "warnings"}
    speed = [row for row in rows if row["name"].startswith(("latency", "throughput"))]
    assert len(speed) == 5
    if all(row["old"] is None for row in speed):
        assert {row["reason"] for row in speed} == {"both: no benchmark"}
        demanded = gpuopt("compare", "old.gpuopt", "new.gpuopt", "--max-p99-regress", "5%", cwd=project)
        assert demanded.code == 16
        assert "--max-p99-regress cannot be checked: model.onnx, latency p99: both: no benchmark" in demanded.stderr


def test_int8_is_worse_than_fp16(project: Path, gpuopt: Gpuopt) -> None:
    result = gpuopt("compare", "fp16.gpuopt", "old.gpuopt", "--markdown", "c.md", "--html", "c.html", cwd=project)
    assert result.code == 15, result.stderr
    assert "worst SQNR output is worse: -" in result.stderr
    assert "**worse**" in (project / "c.md").read_text()
    assert gpuopt("compare", "old.gpuopt", "fp16.gpuopt", "--max-size-regress", "400%", cwd=project).code == 0


def test_a_report_is_as_good_as_its_bundle_and_a_changed_bundle_is_refused(project: Path, gpuopt: Gpuopt) -> None:
    alone = gpuopt("compare", "old.gpuopt/report.json", "new.gpuopt", cwd=project)
    assert alone.code == 0, alone.stderr
    with (project / "new.gpuopt" / "model.onnx").open("ab") as stream:
        stream.write(b"x")
    assert gpuopt("compare", "old.gpuopt", "new.gpuopt", cwd=project).code == 10
