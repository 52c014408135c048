"""`gpuopt bench`, run for real on what is here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Gpuopt
from tests.integration.small import save, save_data


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, gpuopt: Gpuopt) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    save("torchscript", folder / "net.pt")
    save_data(folder / "calibration.npz")
    made = gpuopt(
        "compile", "net.pt", "-p", "fp32", "-t", "tensorrt-rtx",
        "--min-shapes", "image:1x3x16x16", "--opt-shapes", "image:4x3x16x16", "--max-shapes", "image:8x3x16x16",
        cwd=folder,
    )  # fmt: skip
    assert made.code == 0, made.stderr
    return folder / "net.gpuopt"


def test_what_is_here_is_measured_and_what_is_not_has_its_reason(bundle: Path, gpuopt: Gpuopt) -> None:
    written = bundle.parent / "bench.json"
    result = gpuopt("bench", bundle, "--seconds", "0.1", "--json", "--output", written)
    assert result.code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads(written.read_text())
    rows = {row["name"].partition(" ")[0] + row["name"].partition(" ")[2][:6]: row for row in report["rows"]}
    measured = [row for row in report["rows"] if not row["failed"]]
    assert {row["name"].split()[0] for row in measured} == {"onnxruntime", "torch"}, rows
    for row in measured:
        percentiles = [row["latency_ms"][name]["value"] for name in ("p50", "p90", "p95", "p99")]
        assert percentiles == sorted(percentiles)
        assert row["lowest_ms"] <= row["back_to_back_ms"] <= row["highest_ms"]
        assert row["samples_per_second"] == pytest.approx(row["batch"] * 1000 / row["back_to_back_ms"])
        assert row["batch"] == 4
        assert row["includes"].startswith("a whole call: inputs and outputs in host memory")
        if row["name"].startswith("onnxruntime cpu"):
            assert "nodes NCHWc" in row["includes"]
    reasons = " ".join(row["failed"] for row in report["rows"])
    assert "has no CUDA execution provider" in reasons
    assert "torch finds no NVIDIA GPU" in reasons
    assert any("model.tensorrt-rtx.engine was not measured: no NVIDIA GPU" in line for line in report["warnings"])


def test_wrong_words_are_usage_errors(bundle: Path, gpuopt: Gpuopt) -> None:
    assert gpuopt("bench", bundle, "--only", "speed").code == 2
    assert gpuopt("bench", bundle, "--batches", "1,x").code == 2
    assert gpuopt("bench", bundle.parent / "net.pt").code == 2
    unknown = gpuopt("bench", bundle, "--baseline", "tensorflow")
    assert unknown.code == 2
    assert "torch.compile" in unknown.stderr
    engine = bundle.parent / "alone.engine"
    engine.write_bytes(b"engine")
    alone = gpuopt("bench", engine)
    assert alone.code == 11
    assert "has no record" in alone.stderr


def test_another_interpreter_that_is_none_is_a_row_with_its_reason(bundle: Path, gpuopt: Gpuopt) -> None:
    flags = ("--only", "baselines", "--baseline", "torch", "--baseline-python", "/nowhere/python")
    result = gpuopt("bench", bundle, *flags, "--json")
    assert result.code == 0
    rows = json.loads(result.stdout)["rows"]
    assert [row["name"] for row in rows] == [
        "torch eager", "torch eager, nchw", "torch eager, CUDA stream", "torch.compile", "torch.compile, nchw",
    ]  # fmt: skip
    assert all("/nowhere/python" in row["failed"] for row in rows)
