"""Calibration on ONNX Runtime's CUDA execution provider."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpuopt.calibration.collectors import METHODS, RangeCollector
from gpuopt.calibration.run import RunOptions, calibrate
from tests.unit.calibration.networks import TENSORS, Samples, images, network

_TF32 = 5e-3
"""Convolutions on the GPU multiply with ten bits of mantissa; one bin of a range's histogram is as wide again."""


@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_those_of_the_cpu(method: str, cuda_provider: str, tmp_path: Path) -> None:
    feeds = Samples(images(8, size=48))
    options = RunOptions(providers=(cuda_provider, "CPUExecutionProvider"))
    there = calibrate(network(), TENSORS, feeds, RangeCollector(method), tmp_path / "gpu", options)
    here = calibrate(network(), TENSORS, feeds, RangeCollector(method), tmp_path / "cpu")
    assert (there.provider, here.provider) == (cuda_provider, "CPUExecutionProvider")
    for name in TENSORS:
        assert there.ranges[name].amax == pytest.approx(here.ranges[name].amax, rel=2 * _TF32), name
    assert there.ranges["x"] == here.ranges["x"]


def test_compile_calibrates_there_by_itself(cuda_provider: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the model is exported by torch")
    from tests.integration.small import save, save_data

    model = save("onnx", tmp_path / "model.onnx")
    save_data(tmp_path / "calibration.npz")
    command = [sys.executable, "-m", "gpuopt", "compile", str(model), "--target", "onnxruntime", "--no-cache", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stages = {stage["name"]: stage["facts"] for stage in json.loads(done.stdout)["stages"]}
    assert stages["calibrate"]["provider"] == cuda_provider
