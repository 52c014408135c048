"""What an engine is made of: on what TensorRT 8.5 wrote on an H100, and on the forms of later releases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpuopt.backends.tensorrt.inspector import coverage, layers
from gpuopt.errors import EngineError

SAMPLES = Path(__file__).parents[2] / "golden/inspector"


def sample(name: str) -> tuple[str, dict[str, float]]:
    document = json.loads((SAMPLES / f"{name}.json").read_text())
    return json.dumps(document), document["milliseconds"]


def test_an_int8_engine_of_tensorrt_8_5() -> None:
    text, times = sample("tensorrt-8.5-int8")
    found = layers(text)
    reformat, stem, quantize = found[:3]
    assert reformat.is_reformat
    assert not reformat.computes
    assert (stem.precision, stem.onnx_nodes) == ("fp16", ("/conv1/Conv", "/relu/Relu"))
    assert stem.tactic.startswith("sm90_xmma_fprop_image_first_layer_f16f16")
    assert quantize.is_quantization
    body = found[4]
    assert body.precision == "int8"
    assert "/layer1/layer1.0/conv1/Conv" in body.onnx_nodes
    assert body.inputs[0].shape == (32, 64, 56, 56)
    shares = coverage(found, times)
    assert shares.layers["int8"] > shares.layers["fp16"] > 0
    assert shares.reformats == 2
    assert shares.quantizations == 2
    assert shares.milliseconds == pytest.approx(sum(times.values()))
    assert sum(shares.layer_share.values()) == pytest.approx(1)
    assert shares.time_share is not None
    assert sum(shares.time_share.values()) == pytest.approx(1)
    assert shares.overhead_time_share is not None
    assert 0.1 < shares.overhead_time_share < 0.6


def test_an_fp16_engine_has_no_int8() -> None:
    text, times = sample("tensorrt-8.5-fp16")
    shares = coverage(layers(text), times)
    assert set(shares.layers) == {"fp16"}
    assert shares.quantizations == 0
    assert coverage(layers(text)).time_share is None


def entry(**changes: Any) -> dict[str, Any]:
    tensor = {"Name": "x", "Dimensions": [1, 64, 8, 8], "Format/Datatype": "Half"}
    return {"Name": "conv", "LayerType": "CaskConvolution", "Inputs": [tensor], "Outputs": [tensor], **changes}


def test_later_releases_name_nodes_in_metadata_and_dtypes_apart() -> None:
    tensor = {"Name": "x", "Dimensions": [1, 64, 8, 8], "Format": "NHWC", "Datatype": "Int8"}
    metadata = "[ONNX Layer: /a/Conv]\x1e[ONNX Layer: /a/Relu]"
    (layer,) = layers(json.dumps({"Layers": [entry(Inputs=[tensor], Metadata=metadata)]}))
    assert layer.onnx_nodes == ("/a/Conv", "/a/Relu")
    assert layer.precision == "int8"
    assert layer.bytes_moved == 64 * 64 + 64 * 64 * 2


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("Row major linear FP32", "fp32"), ("Half", "fp16"), ("BFloat16", "bf16"), ("FP8", "fp8"), ("Int64", "int32"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"), ("something new", "other"),
    ],
)  # fmt: skip
def test_dtypes_in_words(text: str, precision: str) -> None:
    tensor = {"Name": "x", "Dimensions": [2], "Format/Datatype": text}
    (layer,) = layers(json.dumps({"Layers": [entry(Inputs=[tensor], Outputs=[tensor])]}))
    assert layer.precision == precision


@pytest.mark.parametrize(
    ("text", "size"), [("UInt8", 1), ("Bool", 1), ("Int8", 1), ("Half", 2), ("FP32", 4), ("Int32", 4), ("Int64", 8)]
)
def test_bytes_moved_are_those_of_the_dtype(text: str, size: int) -> None:
    tensor = {"Name": "x", "Dimensions": [1, 3, 4, 4], "Format/Datatype": f"Row major linear {text} format"}
    (layer,) = layers(json.dumps({"Layers": [entry(Inputs=[tensor], Outputs=[])]}))
    assert layer.bytes_moved == 48 * size


def test_blocks_and_pointwise_fusions_name_their_nodes() -> None:
    names = [
        entry(Name="{ForeignNode[/first/MatMul.../last/Add]}", LayerType="Myelin"),
        entry(Name="PWN(PWN(/sig/Sigmoid), /mul/Mul)", LayerType="PointWiseV2"),
    ]
    block, pointwise = layers(json.dumps({"Layers": names}))
    assert block.onnx_nodes == ("/first/MatMul", "/last/Add")
    assert pointwise.onnx_nodes == ("/sig/Sigmoid", "/mul/Mul")


def test_sizes_that_are_not_known_give_no_bytes() -> None:
    tensor = {"Name": "x", "Dimensions": [-1, 64], "Format/Datatype": "Half"}
    (layer,) = layers(json.dumps({"Layers": [entry(Inputs=[tensor])]}))
    assert layer.bytes_moved is None


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": ["conv", "relu"]}'])
def test_what_tells_no_layers_is_refused(text: str) -> None:
    with pytest.raises(EngineError):
        layers(text)
