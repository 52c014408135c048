"""Ranges from a file, and data that a strict run refuses, by the command line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.conftest import Gpuopt
from tests.integration import small

SETTINGS = ("--bias-correction", "off", "--calibration-method", "entropy", "--set", "quantize.min_channels=1")
"""Correcting biases takes data; and of so small a network every layer has to be quantized."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, gpuopt: Gpuopt) -> Path:
    """A folder with a model, its bundle, and no data beside it."""
    folder = tmp_path_factory.mktemp("project")
    small.save("exported program", folder / "model.pt")
    small.save_data(folder / "data.npz")
    result = gpuopt(
        "compile",
        folder / "model.pt",
        "-c",
        folder / "data.npz",
        "-t",
        "onnxruntime",
        "-o",
        folder / "first",
        *SETTINGS,
    )
    assert result.code == 0, result.stderr
    return folder


def scales(bundle: Path) -> dict[str, float]:
    """The scale of every quantized activation."""
    model = onnx.load(str(bundle / "model.onnx"))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {
        node.input[0]: float(constants[node.input[1]])
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants
    }


def reused(gpuopt: Gpuopt, project: Path, ranges: Path, *flags: str) -> tuple[Path, dict[str, Any], str]:
    bundle = project / f"from-{ranges.name}"
    arguments = ("compile", project / "model.pt", "--calibration-ranges", ranges, "-t", "onnxruntime", "--json")
    result = gpuopt(*arguments, "-o", bundle, *SETTINGS, *flags)
    assert result.code == 0, result.stderr
    facts = next(stage["facts"] for stage in result.report()["stages"] if stage["name"] == "calibrate")
    return bundle, facts, result.stderr


def test_the_same_ranges_give_the_same_graph_without_data(gpuopt: Gpuopt, project: Path) -> None:
    ranges = project / "first/calibration.ranges.json"
    bundle, facts, said = reused(gpuopt, project, ranges)
    assert scales(bundle) == scales(project / "first")
    assert (bundle / "model.onnx").read_bytes() == (project / "first/model.onnx").read_bytes()
    assert facts["ranges_file"]["name"] == ranges.name
    assert "ranges file calibration.ranges.json (entropy; npz data.npz" in (bundle / "report.md").read_text()
    assert "warning" not in said


def test_an_edited_range_is_a_run_of_its_own_with_another_scale(gpuopt: Gpuopt, project: Path) -> None:
    before = scales(project / "first")
    name = next(iter(before))
    document = json.loads((project / "first/calibration.ranges.json").read_text())
    document["tensors"][name] = {"low": -12.7, "high": 12.7}
    ranges = project / "edited.json"
    ranges.write_text(json.dumps(document))
    limits = ("--set", "verify.min_cosine=0", "--set", "verify.min_sqnr_db=-100")
    first = scales(reused(gpuopt, project, ranges, *limits)[0])
    assert first[name] == pytest.approx(0.1, rel=1e-3)  # Rounded to FP16.
    assert {**first, name: 0} == {**before, name: 0}
    document["tensors"][name]["high"] = 25.4
    ranges.write_text(json.dumps(document))
    assert scales(reused(gpuopt, project, ranges, *limits)[0])[name] == pytest.approx(0.2, rel=1e-3)


def test_a_cache_of_tensorrt_is_taken_and_what_it_lacks_stays_in_floating_point(gpuopt: Gpuopt, project: Path) -> None:
    known = scales(project / "first")
    left_out = list(known)[1]
    lines = ["TRT-8503-EntropyCalibration2"]
    lines += [f"{n}: {struct.pack('>f', 2 * s).hex()}" for n, s in known.items() if n != left_out]
    lines += ["(Unnamed Layer* 12) [Convolution]_output: 3c010a14"]
    cache = project / "calibration.cache"
    cache.write_text("\n".join(lines) + "\n")
    bundle, facts, said = reused(gpuopt, project, cache, "--set", "verify.min_cosine=0")
    found = scales(bundle)
    # The average behind it gets no INT8 values any more.
    assert found == {n: pytest.approx(2 * s) for n, s in known.items() if n not in (left_out, "relu_1")}
    assert left_out in facts["ranges_file"]["without_range"]
    assert "1 of its names were made up by TensorRT" in said
    assert f"'{left_out}' has no calibrated range" in (bundle / "report.md").read_text()


def test_a_file_of_another_model_and_one_that_is_none_are_refused(gpuopt: Gpuopt, project: Path) -> None:
    other = project / "other.json"
    other.write_text('{"version": 1, "tensors": {"x": {"low": -1, "high": 1}}}')
    arguments = ("compile", project / "model.pt", "-t", "onnxruntime", "-o", project / "other")
    result = gpuopt(*arguments, "--calibration-ranges", other)
    assert result.code == 4
    assert "is for another model" in result.stderr
    assert not (project / "other").exists()
    other.write_text('{"version": 1,\n "tensors": {"x": {"low": 2, "high": 1}}}')
    result = gpuopt(*arguments, "--calibration-ranges", other)
    assert result.code == 4
    assert "in line 2: the range of 'x' is 2.0 to 1.0" in result.stderr
    result = gpuopt(*arguments, "--calibration-ranges", project / "absent")
    assert result.code == 10
    result = gpuopt(*arguments, "--calibration-ranges", other, "--random-calibration")
    assert result.code == 2


def test_a_strict_run_exits_4_and_leaves_no_bundle(gpuopt: Gpuopt, project: Path) -> None:
    data = project / "repeated.npz"
    samples = np.load(project / "data.npz")["image"]
    np.savez(data, image=np.concatenate([samples[:30], samples[:10]]))
    arguments = ("compile", project / "model.pt", "-c", data, "-t", "onnxruntime", "-o", project / "strict", "--json")
    result = gpuopt(*arguments, "--strict-calibration")
    assert result.code == 4
    assert "10 of 40 samples repeat an earlier one exactly (sample 30 is 0" in result.stderr
    assert not (project / "strict").exists()
    assert not list((project / "strict.failed").glob("*.onnx")) + list((project / "strict.failed").glob("*ranges*"))
    report = result.report()
    assert (report["error"]["stage"], report["error"]["kind"]) == ("calibrate", "data")
    lenient = gpuopt(*arguments)
    assert lenient.code == 0
    facts = next(stage["facts"] for stage in lenient.report()["stages"] if stage["name"] == "calibrate")
    assert [finding["check"] for finding in facts["findings"]] == ["duplicates"]
    assert facts["findings"][0]["evidence"]["pairs"][0] == [30, 0]
    assert "10 of 40 samples repeat" in (project / "strict/report.md").read_text()
