"""`gpuopt quantize`, and models that come with Q/DQ of their own, through to TensorRT-RTX engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

from gpuopt.backends.onnxruntime import Session
from gpuopt.backends.tensorrt.builder import build
from gpuopt.backends.tensorrt.library import import_module
from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.progress import Silent
from gpuopt.shapes import ShapeRange
from tests.conftest import Gpuopt
from tests.integration import small

FILES = {"model.onnx", "engine.onnx", "calibration.ranges.json", "quantize.json", "manifest.json"}
SHAPE = (1, 3, 16, 16)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small network as ONNX and its calibration data."""
    folder = tmp_path_factory.mktemp("network")
    small.save("onnx", folder / "net.onnx")
    small.save_data(folder / "calibration.npz")
    return folder


def built(graph: Path, shape: tuple[int, ...] = SHAPE) -> bool:
    """Whether TensorRT-RTX builds an engine from the graph; raises if it refuses."""
    name = onnx.load(str(graph), load_external_data=False).graph.input[0].name
    profile = {name: ShapeRange(shape, shape, shape)}
    return bool(build("tensorrt-rtx", graph, (profile,), BuildOptions(), Silent()).plan)


def nodes_of(folder: Path) -> list[tuple[str, str]]:
    """Name and type of every node but Q and DQ."""
    nodes = onnx.load(str(folder / "model.onnx")).graph.node
    return [(node.name, node.op_type) for node in nodes if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]


def test_the_command_writes_graphs_ranges_and_reasons(network: Path, gpuopt: Gpuopt) -> None:
    result = gpuopt("quantize", "net.onnx", "--json", cwd=network)
    assert result.code == 0, result.stderr
    folder = network / "net.quantized"
    assert {path.name for path in folder.iterdir()} == FILES
    document = result.report()
    assert document == json.loads((folder / "quantize.json").read_text())
    assert set(document["files"]) == FILES - {"manifest.json"}
    assert document["equalization"]["asked"] == document["bias_correction"]["asked"] == "auto"
    decided = {node["node"]: node for node in document["nodes"]}
    assert list(decided) == [name for name, _ in nodes_of(folder)]
    assert decided["/body/Conv"]["quantized"]
    assert decided["/body/Conv"]["note"].startswith("weights per channel, input '/Relu_output_0' scale ")
    assert decided["/stem/Conv"]["note"].startswith("weights per channel, input ")
    assert decided["/Add"]["note"].startswith("residual branch of the Add behind Conv '/body/Conv'")
    assert [operand["tensor"] for operand in decided["/Add"]["inputs"]] == ["/Relu_output_0"]
    assert built(folder / "engine.onnx")


def test_in_the_built_engine_the_quantized_layers_read_int8(network: Path, gpuopt: Gpuopt) -> None:
    """By what TensorRT-RTX itself says of the engine while it builds it: a statement of the result, not of the wish."""
    trt = import_module("tensorrt-rtx")

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity: object, message: str) -> None:
            self.lines += message.splitlines()

    command = ("quantize", "net.onnx", "-o", "inspected", "--nodes-to-exclude", "/stem/*")
    assert gpuopt(*command, cwd=network).code == 0
    log = Log()
    builder = trt.Builder(log)
    graph = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(graph, log).parse_from_file(str(network / "inspected/engine.onnx"))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    assert builder.build_serialized_network(graph, config) is not None
    layers = [line.strip() for line in log.lines if line.strip().startswith("Name: ") and "LayerType: " in line]
    (stem,) = [line for line in layers if line.startswith("Name: /stem/Conv")]
    (body,) = [line for line in layers if line.startswith("Name: /body/Conv")]
    assert "Datatype: Int8" in body.partition("Constants: ")[0]
    assert "Datatype: Int8" not in stem.partition("Constants: ")[0]


def test_explain_prints_a_line_a_node(network: Path, gpuopt: Gpuopt) -> None:
    command = ("quantize", "net.onnx", "-o", "explained", "--explain", "--op-types-to-exclude", "Ad*")
    result = gpuopt(*command, cwd=network)
    assert result.code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [tuple(line.split()[:2]) for line in lines] == nodes_of(network / "explained")
    (add,) = [line for line in lines if line.startswith("/Add ")]
    assert add.split()[2:] == ["float", "Add", "is", "excluded", "by", "quantize.op_types_to_exclude"]
    assert {line.split()[2] for line in lines} == {"INT8", "float"}


def test_failures_have_the_documented_codes_and_leave_nothing(network: Path, gpuopt: Gpuopt, tmp_path: Path) -> None:
    none = gpuopt("quantize", "net.onnx", "-o", tmp_path / "out", "--nodes-to-exclude", "*", "--json", cwd=network)
    assert none.code == 6
    assert none.report()["error"]["kind"] == "quantization"
    assert gpuopt("quantize", "net.onnx", "--set", "precision=fp16", cwd=network).code == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    assert gpuopt("quantize", "net.onnx", "-o", tmp_path / "mine", cwd=network).code == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "notes.txt"]


# Q/DQ of other tools ------------------------------------------------------------------------------


class _Feeds(CalibrationDataReader):
    def __init__(self) -> None:
        self.feeds = small.feeds()

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def by_onnxruntime(network: Path, target: Path, activation: QuantType, symmetric: bool, **settings: Any) -> None:
    options = {"ActivationSymmetric": symmetric, "WeightSymmetric": True}
    quantize_static(
        str(network / "net.onnx"),
        str(target),
        _Feeds(),
        activation_type=activation,
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options=options,
        **settings,
    )


def centre_zero_points(path: Path) -> None:
    """ONNX Runtime 1.23 calls a UINT8 zero point of 127 symmetric, later ones 128."""
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.UINT8 and numpy_helper.to_array(tensor).tolist() == 127:
            tensor.CopyFrom(numpy_helper.from_array(np.array(128, np.uint8), tensor.name))
    onnx.save(model, str(path))


@pytest.mark.parametrize("activation", [QuantType.QInt8, QuantType.QUInt8])
def test_a_symmetric_graph_of_onnxruntime_passes_through(
    activation: QuantType, network: Path, gpuopt: Gpuopt, tmp_path: Path
) -> None:
    """Without calibration data: there is none beside the model, and none is asked for."""
    by_onnxruntime(network, tmp_path / "static.onnx", activation, True)
    centre_zero_points(tmp_path / "static.onnx")
    result = gpuopt("compile", "static.onnx", "-t", "tensorrt-rtx", "--json", cwd=tmp_path)
    assert result.code == 0, result.stderr
    facts = {stage["name"]: stage["facts"] for stage in result.report()["stages"]}
    assert facts["calibrate"] == {"quantized_before": True}
    assert facts["quantize"]["quantized_before"] is True
    assert facts["quantize"]["quantized_nodes"] == 3
    repaired = " ".join(facts["quantize"]["repaired"])
    assert "INT32 behind DQ became floating point" in repaired
    assert ("UINT8 with the zero point 128" in repaired) == (activation is QuantType.QUInt8)
    assert any("Q/DQ on an output" in warning for warning in result.report()["warnings"])
    assert not (tmp_path / "static.gpuopt/calibration.ranges.json").exists()
    x = next(small.feeds())
    (given,) = Session(tmp_path / "static.onnx", optimization="none").run(x).values()
    (made,) = Session(tmp_path / "static.gpuopt/model.onnx", optimization="none").run(x).values()
    # Both are the same Q/DQ; scales are the next FP16 numbers.
    assert np.linalg.norm(made - given) / np.linalg.norm(given) < 0.02


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "asymmetric: UINT8 with the zero point 0"),
        ({"activation_type": QuantType.QInt16}, "it is of the type INT16, not INT8"),
        ({"quant_format": QuantFormat.QOperator}, "an integer operator, where TensorRT reads Q/DQ only"),
    ],
)
def test_what_tensorrt_would_refuse_ends_with_the_node_s_name(
    settings: dict[str, Any], said: str, network: Path, gpuopt: Gpuopt, tmp_path: Path
) -> None:
    settings = dict(settings)
    activation = settings.pop("activation_type", QuantType.QUInt8)
    by_onnxruntime(network, tmp_path / "static.onnx", activation, activation is QuantType.QInt16, **settings)
    result = gpuopt("quantize", "static.onnx", cwd=tmp_path)
    assert result.code == 6
    assert said in result.stderr
    assert "Quantize the model again: symmetric INT8" in result.stderr


class Trained(nn.Module):
    """What quantization-aware training leaves: fake quantization of activations and weights, with its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        for name in ("first", "second"):
            weight = getattr(self, name).weight.detach()
            self.register_buffer(f"{name}_scale", weight.abs().amax((1, 2, 3)) / 127)
            self.register_buffer(f"{name}_zero", torch.zeros(16, dtype=torch.int32))

    def convolved(self, x: Tensor, name: str, scale: float) -> Tensor:
        layer = getattr(self, name)
        x = torch.fake_quantize_per_tensor_affine(x, scale, 0, -128, 127)
        scales, zeros = getattr(self, f"{name}_scale"), getattr(self, f"{name}_zero")
        weight = torch.fake_quantize_per_channel_affine(layer.weight, scales, zeros, 0, -128, 127)
        return nn.functional.conv2d(x, weight, layer.bias, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        hidden = torch.relu(self.convolved(image, "first", 0.03))
        return self.convolved(hidden, "second", 0.02) + hidden


class Converted(Trained):
    """What torchao's `convert_pt2e` writes: its own operators, weights as INT8 numbers in front of a DQ."""

    def convolved(self, x: Tensor, name: str, scale: float) -> Tensor:
        decomposed = torch.ops.quantized_decomposed
        layer, scales, zeros = getattr(self, name), getattr(self, f"{name}_scale"), getattr(self, f"{name}_zero")
        x = decomposed.quantize_per_tensor(x, scale, 0, -128, 127, torch.int8)
        x = decomposed.dequantize_per_tensor(x, scale, 0, -128, 127, torch.int8)
        weight = decomposed.dequantize_per_channel(
            getattr(self, f"{name}_codes"), scales, zeros, 0, -127, 127, torch.int8
        )
        return nn.functional.conv2d(x, weight, layer.bias, padding=1)

    def with_codes(self) -> Converted:
        for name in ("first", "second"):
            codes = getattr(self, name).weight.detach() / getattr(self, f"{name}_scale").reshape(-1, 1, 1, 1)
            self.register_buffer(f"{name}_codes", codes.round().to(torch.int8))
        return self


@pytest.mark.parametrize("kind", ["fake quantization", "torchao"])
def test_a_quantized_program_passes_through(kind: str, gpuopt: Gpuopt, tmp_path: Path) -> None:
    import torch.ao.quantization.fx._decomposed

    torch.manual_seed(0)
    example = torch.randn(2, 3, 16, 16)
    if kind == "torchao":
        batch = torch.export.Dim("batch", min=1, max=4)
        program = torch.export.export(Converted().with_codes().eval(), (example,), dynamic_shapes=({0: batch},))
        torch.export.save(program, tmp_path / "net.pt")
    else:
        torch.jit.trace(Trained().eval(), example).save(str(tmp_path / "net.pt"))
    shape = () if kind == "torchao" else ("--input", "2x3x16x16")
    result = gpuopt("compile", "net.pt", *shape, "-t", "tensorrt-rtx", "--json", cwd=tmp_path)
    assert result.code == 0, result.stderr
    facts = {stage["name"]: stage["facts"] for stage in result.report()["stages"]}
    assert facts["quantize"]["quantized_before"] is True
    assert (facts["quantize"]["quantized_nodes"], facts["quantize"]["qdq_pairs"]) == (2, 4)
    assert (tmp_path / "net.gpuopt/model.tensorrt-rtx.engine").stat().st_size > 10_000
    kinds = {
        t.data_type for t in onnx.load(str(tmp_path / "net.gpuopt/model.onnx")).graph.initializer if len(t.dims) == 4
    }
    assert kinds == {onnx.TensorProto.INT8}


def test_a_program_without_q_and_dq_still_needs_data(gpuopt: Gpuopt, tmp_path: Path) -> None:
    small.save("exported program", tmp_path / "net.pt2")
    result = gpuopt("quantize", "net.pt2", cwd=tmp_path)
    assert result.code == 4
    assert "INT8 needs calibration data" in result.stderr
