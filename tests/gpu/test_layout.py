"""Bytes, layouts and I/O formats in engines of TensorRT that run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import gpuopt as package
from gpuopt import environment, onnx_model
from gpuopt.deployed_form import Normalization
from tests.conftest import Gpuopt

IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1 / 255)
BYTES = (
    "--input-layout", "nhwc", "--input-dtype", "uint8", "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225",
)  # fmt: skip
SIDE, CHANNELS = 32, 32


@pytest.fixture
def sources(tactic_sources: tuple[str, ...]) -> tuple[str, ...]:
    """Flags with which TensorRT builds here."""
    return ("--set", f"build.tactic_sources=[{', '.join(tactic_sources)}]") if tactic_sources else ()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two convolutions with padding, opset 17; an input of three channels, an output of 32."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    shapes = {"first": (CHANNELS, 3, 3, 3), "second": (CHANNELS, CHANNELS, 3, 3)}
    constants = [
        numpy_helper.from_array((generator.standard_normal(s) / np.sqrt(np.prod(s[1:]))).astype(np.float32), name)
        for name, s in shapes.items()
    ]
    conv = {"kernel_shape": [3, 3], "pads": [1] * 4}
    nodes = [
        helper.make_node("Conv", ["image", "first"], ["a"], name="/first", **conv),
        helper.make_node("Relu", ["a"], ["b"], name="/relu"),
        helper.make_node("Conv", ["b", "second"], ["map"], name="/second", **conv),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, SIDE, SIDE])
        for name, channels in (("image", 3), ("map", CHANNELS))
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, "model.onnx")
    return tmp_path / "model.onnx"


SHAPES = ("--min-shapes", "image:1x3x32x32", "--max-shapes", "image:4x3x32x32", "--opset", "17")


def wanted(model: Path, raw: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The original model on normalised bytes, in ONNX Runtime."""
    from gpuopt.backends.onnxruntime import Session

    first = np.ascontiguousarray(np.moveaxis(raw, -1, 1))
    return np.asarray(Session(model).run({"image": IMAGENET.apply(first)})["map"])


def pixels(batch: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(batch).integers(0, 256, (batch, SIDE, SIDE, 3)).astype(np.uint8)


def error(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("precision", "most"), [("fp32", 5e-3), ("fp16", 1e-2), ("int8", 6e-2)])
def test_an_engine_takes_the_decoder_s_bytes(
    precision: str, most: float, model: Path, sources: tuple[str, ...], gpuopt: Gpuopt
) -> None:
    np.savez("bytes.npz", image=np.concatenate([pixels(batch) for batch in range(1, 9)]))
    asked = ("model.onnx", "-p", precision, *SHAPES, *BYTES, "--output-layout", "nhwc", "-c", "bytes.npz")
    checks = ("--set", "speed.check=false")
    result = gpuopt("compile", *asked, "-t", "tensorrt", *sources, *checks, "-o", "out.gpuopt", "--json")
    assert result.code == 0, result.stderr
    engine = next(e for e in json.loads(result.stdout)["engines"] if e["target"] == "tensorrt")
    assert engine["status"] == "verified"
    assert engine["proof"]["io_formats"]["image"].startswith("uint8:")
    with package.load("out.gpuopt", target="tensorrt") as loaded:
        for batch in (1, 3, 4):
            found = loaded.infer({"image": pixels(batch)})["map"]
            assert found.shape == (batch, SIDE, SIDE, CHANNELS)
            assert error(np.moveaxis(found, -1, 1), wanted(model, pixels(batch))) < most


@pytest.mark.parametrize("written", ["fp32:chw", "fp16:chw", "fp16:hwc8", "fp16:chw32"])
def test_formats_of_floats_hold_the_same_image(
    written: str, model: Path, sources: tuple[str, ...], gpuopt: Gpuopt
) -> None:
    formats = ("--io-format", f"image={written}", "--io-format", f"map={written}")
    asked = ("model.onnx", "-p", "fp16", *SHAPES, *formats, "-t", "tensorrt", *sources, "-o", "out.gpuopt", "--json")
    result = gpuopt("compile", *asked)
    assert result.code == 0, result.stderr
    proof = next(e for e in json.loads(result.stdout)["engines"] if e["target"] == "tensorrt")["proof"]
    assert proof["io_formats"] == {"image": written, "map": written}


def test_bytes_in_tensorrt_s_own_hwc(model: Path, sources: tuple[str, ...], gpuopt: Gpuopt) -> None:
    version = environment.tensorrt_version()
    normalised = ("--input-dtype", "uint8", "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
    asked = ("model.onnx", "-p", "fp16", *SHAPES, *normalised, "--io-format", "image=uint8:hwc", "-t", "tensorrt")
    result = gpuopt("compile", *asked, *sources, "-o", "out.gpuopt", "--json")
    if version is not None and version < (10, 0) and result.code == 7:
        pytest.skip(f"TensorRT {version} has no hwc for bytes: {json.loads(result.stdout)['error']['message'][:200]}")
    assert result.code == 0, result.stderr
    with package.load("out.gpuopt", target="tensorrt") as loaded:
        first = np.ascontiguousarray(np.moveaxis(pixels(2), -1, 1))
        assert error(loaded.infer({"image": first})["map"], wanted(model, pixels(2))) < 1e-2


def test_the_fastest_format_is_measured_and_kept(model: Path, sources: tuple[str, ...], gpuopt: Gpuopt) -> None:
    asked = ("model.onnx", "-p", "fp16", *SHAPES, "--io-format", "auto", "-t", "tensorrt", *sources)
    result = gpuopt("compile", *asked, "--set", "speed.seconds=1", "-o", "out.gpuopt", "--json")
    assert result.code == 0, result.stderr
    report = json.loads(result.stdout)
    race = report["format_race"]
    by_name = {row["name"]: row for row in race["candidates"]}
    assert by_name["linear"]["state"] == "measured"
    assert by_name["linear"]["milliseconds"] > 0
    assert {"linear", "hwc", "chw32"} == set(by_name)
    assert by_name[race["chosen"]]["state"] == "measured"
    chosen = by_name[race["chosen"]]["formats"]
    proof = next(e for e in report["engines"] if e["target"] == "tensorrt")["proof"]
    assert proof["io_formats"] == {**dict.fromkeys(("image", "map"), "fp32:chw"), **chosen}
    recipe = Path("out.gpuopt/recipe.yaml").read_text()
    assert "io_formats: auto" not in recipe


def test_onnxruntime_s_cuda_provider_takes_bytes_in_both_layouts(
    model: Path, cuda_provider: str, gpuopt: Gpuopt
) -> None:
    import onnxruntime as ort

    asked = ("model.onnx", "-p", "fp16", *SHAPES, *BYTES, "-t", "onnxruntime", "-o", "out.gpuopt")
    result = gpuopt("compile", *asked)
    assert result.code == 0, result.stderr
    for layout in ("0", "1"):
        options = ort.SessionOptions()
        options.optimized_model_filepath = f"optimized-{layout}.onnx"
        session = ort.InferenceSession(
            "out.gpuopt/model.onnx", options, providers=[(cuda_provider, {"prefer_nhwc": layout})]
        )
        (found,) = session.run(None, {"image": pixels(2)})
        assert error(found, wanted(model, pixels(2))) < 1e-2
    kernels = [
        sum(node.domain == "com.ms.internal.nhwc" for node in onnx.load(f"optimized-{layout}.onnx").graph.node)
        for layout in "01"
    ]
    assert kernels[0] == 0
    assert kernels[1] >= 2
    assert onnx_model.opset(onnx.load("out.gpuopt/model.onnx")) == 17
