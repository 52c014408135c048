"""Small networks in opset 17, made without torch, and engines of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gpuopt import engine_record, environment
from gpuopt.backends.tensorrt.builder import BuiltEngine, build
from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.engine_record import EngineRecord, TensorRecord
from gpuopt.progress import Silent
from gpuopt.shapes import Profile, ShapeRange

CHANNELS = 32
CLASSES = 10


def residual_network(
    size: int = 32, batch: int | str = "batch", seed: int = 0, channels: int = CHANNELS
) -> onnx.ModelProto:
    """Conv, residual block, average, Gemm over images; FP32."""
    generator = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        values = generator.standard_normal(shape) * np.sqrt(2 / fan_in) if len(shape) > 1 else np.zeros(shape)
        return numpy_helper.from_array(values.astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "w0", "b0"], ["c0"], "stem", pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"], "relu0"),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], "conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", pads=[1] * 4),
        helper.make_node("Add", ["c2", "r0"], ["s"], "add"),
        helper.make_node("Relu", ["s"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["g"], "pool"),
        helper.make_node("Flatten", ["g"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["logits"], "head", transB=1),
    ]
    weights = [
        weight("w0", channels, 3, 3, 3), weight("b0", channels), weight("w1", channels, channels, 3, 3),
        weight("b1", channels), weight("w2", channels, channels, 3, 3), weight("b2", channels),
        weight("w3", CLASSES, channels), weight("b3", CLASSES),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "residual",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
        weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def images(count: int, size: int = 32, seed: int = 1) -> np.ndarray:
    """Smooth random images, FP32, N3HW."""
    generator = np.random.default_rng(seed)
    coarse = generator.standard_normal((count, 3, 4, 4)).astype(np.float32)
    return np.kron(coarse, np.ones((1, 1, size // 4, size // 4), np.float32))


def profile(low: int = 1, mid: int = 4, high: int = 8, size: int = 32) -> Profile:
    return {"image": ShapeRange(*((batch, 3, size, size) for batch in (low, mid, high)))}


def build_engine(
    folder: Path, model: onnx.ModelProto, profiles: tuple[Profile, ...], options: BuildOptions, name: str = "model"
) -> tuple[Path, BuiltEngine]:
    """An engine with its record beside it."""
    onnx_path = folder / f"{name}.onnx"
    onnx.save(model, onnx_path)
    built = build("tensorrt", onnx_path, profiles, options, Silent())
    path = folder / f"{name}.engine"
    path.write_bytes(built.plan)
    gpu = environment.gpus()[0]
    record = EngineRecord(
        file=path.name,
        sha256=hashlib.sha256(built.plan).hexdigest(),
        size_bytes=len(built.plan),
        target="tensorrt",
        library_version=built.version,
        version_compatible=False,
        compute_capabilities=(gpu.compute_capability,),
        hardware_compatibility="none",
        gpu=gpu.name,
        driver_version=gpu.driver_version,
        precision=options.precision,
        inputs=(TensorRecord(name="image", dtype="float32", shape=("batch", 3, 32, 32)),),
        outputs=(TensorRecord(name="logits", dtype="float32", shape=("batch", CLASSES)),),
        profiles=engine_record.profile_records(profiles),
    )
    engine_record.write(path, record)
    return path, built
