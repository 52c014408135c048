"""Real architectures, from PyTorch to a TensorRT-RTX engine and a verified ONNX Runtime model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Gpuopt

HERE = Path(__file__).parent

IMAGE_SHAPES = ("--min-shapes", "x:1x3x64x64", "--opt-shapes", "x:4x3x64x64", "--max-shapes", "x:8x3x64x64")
CASES = {
    "resnet18": ("images", IMAGE_SHAPES),
    "mobilenet_v3": ("images", IMAGE_SHAPES),
    "vit": ("images", IMAGE_SHAPES),
    "spectral": ("images", IMAGE_SHAPES),
    "unet": (
        "unet_images",
        ("--min-shapes", "image:1x3x32x32", "--opt-shapes", "image:2x3x32x32", "--max-shapes", "image:4x3x64x64"),
    ),
    "encoder": (
        "tokens",
        (
            *("--min-shapes", "ids:1x4,mask:1x4"),
            *("--opt-shapes", "ids:4x32,mask:4x32"),
            *("--max-shapes", "ids:8x128,mask:8x128"),
        ),
    ),
    "two_by_two": (
        "pairs",
        ("--min-shapes", "image:1x3x32x32,table:1x20", "--max-shapes", "image:8x3x32x32,table:8x20"),
    ),
}
NEEDS = {"resnet18": "torchvision", "mobilenet_v3": "torchvision", "vit": "timm"}


@pytest.mark.parametrize("precision", ["int8", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_from_pytorch_to_a_built_engine_and_a_verified_model(
    name: str, precision: str, gpuopt: Gpuopt, tmp_path: Path
) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} has no release for the installed torch")
    data, shapes = CASES[name]
    bundle = tmp_path / "bundle"
    arguments = (f"zoo:{name}", "-p", precision, "-o", bundle, "-c", f"zoo:{data}", "-t", "tensorrt-rtx", *shapes)
    result = gpuopt("compile", *arguments, "--json", cwd=HERE)
    assert result.code == 0, result.stderr
    report = result.report()
    states = {engine["target"]: engine["status"] for engine in report["engines"]}
    assert states == {"tensorrt-rtx": "built", "onnxruntime": "verified"}
    assert (bundle / "model.tensorrt-rtx.engine").stat().st_size > 10_000
    corners = {row["corner"] for row in report["verification"]["outputs"]}
    assert {"profile0-min", "profile0-opt"} <= corners
    invariance = report["verification"]["batch_invariance"]
    assert all(found["checked"] and found["batch"] > 1 for found in invariance.values())
    facts = {stage["name"]: stage["facts"] for stage in report["stages"]}
    if precision == "int8":
        assert facts["quantize"]["quantized_nodes"] >= 4
        assert set(invariance) == {"model.onnx", "engine.onnx"}
        if name == "spectral":
            kept = [row for row in facts["quantize"]["kept_in_floating_point"] if "Fourier" in row["reason"]]
            assert len(kept) == 4
    else:
        assert facts["cast"]["fp16_weights"] > facts["cast"]["fp32_weights"]
    assert gpuopt("verify", bundle).code == 0
