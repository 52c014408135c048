"""Every kind of model input, decided by content: the file names lie on purpose."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from tests.conftest import Gpuopt
from tests.integration import small

HERE = Path(__file__).parent
FACTORY = "tests.integration.small:small_net"
ROOT = HERE.parent.parent

KINDS = {
    "torchscript": ("TorchScript archive", ()),
    "exported program": ("exported program", ()),
    "pickled module": ("pickled nn.Module", ("--trust-pickle",)),
    "state dict": ("state dict", ("--model", FACTORY)),
    "safetensors": ("safetensors", ("--model", FACTORY)),
    "onnx": ("ONNX", ()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_compiles_to_int8(kind: str, gpuopt: Gpuopt, tmp_path: Path) -> None:
    model = small.save(kind, tmp_path / "model.bin")
    small.save_data(tmp_path / "calibration.npz")
    described, flags = KINDS[kind]
    result = gpuopt("compile", model, *flags, "-t", "tensorrt-rtx", "--json", cwd=ROOT)
    assert result.code == 0, result.stderr
    report = result.report()
    assert report["model"]["kind"] == described
    bundle = tmp_path / "model.gpuopt"
    image = np.random.default_rng(1).standard_normal((1, 3, 16, 16), dtype=np.float32)
    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    (name,) = [value.name for value in session.get_inputs()]
    (got,) = session.run(None, {name: image})
    with torch.no_grad():
        wanted = small.small_net()(torch.from_numpy(image)).numpy()
    assert np.corrcoef(got.ravel(), wanted.ravel())[0, 1] > 0.99


def test_a_factory_alone_needs_its_shape(gpuopt: Gpuopt, tmp_path: Path) -> None:
    arguments = (FACTORY, "-p", "fp16", "-o", tmp_path / "bundle", "-t", "onnxruntime")
    without = gpuopt("compile", *arguments, cwd=ROOT)
    assert without.code == 2
    assert "--input image:1x3x224x224" in without.stderr
    assert gpuopt("compile", *arguments, "--input", "image:1x3x16x16", cwd=ROOT).code == 0


def test_an_exported_program_brings_its_dynamic_batch(gpuopt: Gpuopt, tmp_path: Path) -> None:
    model = small.save("exported program", tmp_path / "model.pt")
    result = gpuopt("compile", model, "-p", "fp32", "-t", "onnxruntime", "--json")
    assert result.code == 0, result.stderr
    reference = json.loads((tmp_path / "model.gpuopt/reference/reference.json").read_text())
    assert reference["profiles"] == [{"image": {"min": "1x3x16x16", "opt": "8x3x16x16", "max": "8x3x16x16"}}]
    outside = gpuopt("compile", model, "-p", "fp32", "-t", "onnxruntime", "--max-shapes", "image:9x3x16x16")
    assert outside.code == 2
    assert "takes 1x3x16x16 to 8x3x16x16" in outside.stderr


def test_a_pickle_runs_only_when_trusted(gpuopt: Gpuopt, tmp_path: Path) -> None:
    model = small.save("pickled module", tmp_path / "model.pt")
    result = gpuopt("compile", model, "-p", "fp16", "--input", "image:1x3x16x16", cwd=ROOT)
    assert result.code == 3
    assert "--trust-pickle" in result.stderr
    assert "tests.integration.small.SmallNet" in result.stderr


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        import os

        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_is_refused_and_does_not_run(legacy: bool, gpuopt: Gpuopt, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    model = tmp_path / "model.pt"
    torch.save({"weight": _Hostile(marker)}, model, _use_new_zipfile_serialization=not legacy)
    for flags in ((), ("--model", FACTORY)):
        result = gpuopt("compile", model, "-p", "fp16", "--input", "image:1x3x16x16", *flags, cwd=ROOT)
        assert result.code == 3, result.stderr
        assert not marker.exists()


def test_weights_that_do_not_fit_the_factory(gpuopt: Gpuopt, tmp_path: Path) -> None:
    model = small.save("state dict", tmp_path / "model.pt")
    arguments = ("-p", "fp16", "--input", "image:1x3x16x16")
    alone = gpuopt("compile", model, *arguments, cwd=ROOT)
    assert alone.code == 2
    assert "--model package.module:factory" in alone.stderr
    other = gpuopt("compile", model, "--model", "tests.integration.small:another_net", *arguments, cwd=ROOT)
    assert other.code == 3
    assert "does not fit" in other.stderr


@pytest.mark.parametrize(
    ("factory", "said"),
    [("not_a_module", "returned int"), ("failing", "no weights today"), ("missing", "has no attribute 'missing'")],
)
def test_a_factory_that_fails_says_how(factory: str, said: str, gpuopt: Gpuopt, tmp_path: Path) -> None:
    name = f"tests.integration.small:{factory}"
    result = gpuopt("compile", name, "-p", "fp16", "--input", "x:1x3x8x8", "-o", tmp_path / "b", cwd=ROOT)
    assert result.code == 3
    assert said in result.stderr


def test_the_older_exporter_serves_opset_17(gpuopt: Gpuopt, tmp_path: Path) -> None:
    model = small.save("exported program", tmp_path / "model.pt")
    result = gpuopt("compile", model, "-p", "fp32", "--opset", "17", "-t", "onnxruntime", "--json")
    assert result.code == 0, result.stderr
    facts = result.report()["stages"][1]["facts"]
    assert (facts["exporter"], facts["opset"], facts["ir_version"]) == ("torchscript", 17, 10)


def test_the_report_says_why_an_exporter_lost(gpuopt: Gpuopt, tmp_path: Path) -> None:
    model = small.save("torchscript", tmp_path / "model.pt")
    flags = ("-p", "fp32", "--input", "1x3x16x16", "-t", "onnxruntime", "--set", "export.exporters=dynamo")
    result = gpuopt("compile", model, *flags, "--json")
    assert result.code == 5
    assert "takes no TorchScript" in result.report()["error"]["message"]


def test_the_manifest_lists_every_file_with_its_hash(gpuopt: Gpuopt, tmp_path: Path) -> None:
    model = small.save("exported program", tmp_path / "model.pt")
    small.save_data(tmp_path / "calibration.npz")
    assert gpuopt("compile", model, "-t", "tensorrt-rtx").code == 0
    bundle = tmp_path / "model.gpuopt"
    manifest = json.loads((bundle / "manifest.json").read_text())
    on_disk = {str(p.relative_to(bundle)) for p in bundle.rglob("*") if p.is_file()} - {"manifest.json"}
    assert on_disk == set(manifest["files"])
    assert {"model.onnx", "engine.onnx", "model.tensorrt-rtx.engine", "calibration.ranges.json"} <= on_disk
    assert {"report.html", "report.md", "report.json"} <= on_disk
    assert "It may ship: all" in (bundle / "report.html").read_text()
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((bundle / name).read_bytes()).hexdigest() == digest
    again = gpuopt("compile", "--recipe", bundle / "recipe.yaml", "-o", tmp_path / "again")
    assert again.code == 0, again.stderr
    second = json.loads((tmp_path / "again/manifest.json").read_text())
    assert second["files"]["model.onnx"] == manifest["files"]["model.onnx"]
