"""Engines built by TensorRT on this machine's GPU: precisions, timing cache, formats, its calibrator, its errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gpuopt import environment, onnx_model
from gpuopt.backends.tensorrt.builder import BuiltEngine, build
from gpuopt.backends.tensorrt.library import version
from gpuopt.backends.tensorrt.options import BuildOptions, NativeCalibration
from gpuopt.calibration import ranges
from gpuopt.calibration.collectors import TensorRange
from gpuopt.errors import BuildError, DataError, RequirementError, UsageError
from gpuopt.progress import Silent
from gpuopt.quantization import placement, qdq
from gpuopt.recipe import QuantizeSection
from gpuopt.shapes import ShapeRange

Array = np.ndarray[Any, Any]
CHANNELS, SIDE = 64, 32
LEGACY_SOURCES = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")


@pytest.fixture(scope="module")
def trt() -> ModuleType:
    if not environment.gpus():
        pytest.skip("this machine has no NVIDIA GPU")
    module = pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    assert isinstance(module, ModuleType)
    return module


@pytest.fixture(scope="module")
def options(trt: ModuleType) -> BuildOptions:
    """What builds here: TensorRT 8 finds the library of its other tactics on few machines."""
    if version(trt) < (10, 0):
        return BuildOptions(precision="fp32", tactic_sources=LEGACY_SOURCES)
    return BuildOptions(precision="fp32", optimization_level=0)


def network(channels: int = CHANNELS) -> onnx.ModelProto:
    """Two convolutions and a residual, opset 17."""
    generator = np.random.default_rng(0)
    shape = (channels, channels, 3, 3)
    deviation = (9 * channels) ** -0.5
    weights = [(generator.standard_normal(shape) * deviation).astype(np.float32) for _ in range(2)]
    constants = [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], "conv0", pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"], "relu0"),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], "conv1", pads=[1] * 4),
        helper.make_node("Add", ["c1", "r0"], ["s"], "add"),
        helper.make_node("Relu", ["s"], ["y"], "relu1"),
    ]
    dims = ["batch", channels, SIDE, SIDE]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx_model.kernel_shapes_stated(model)
    return onnx_model.with_types(model)


def quantized() -> onnx.ModelProto:
    """The same with FP32 Q/DQ."""
    model, section = network(), QuantizeSection(min_channels=8)
    known = {name: TensorRange(-5, 5, "test") for name in placement.candidate_tensors(model)}
    engine = qdq.quantize(model, section, placement.place(model, section, known, False), known, False).engine
    assert engine is not None
    return engine


def images(count: int = 2, seed: int = 0, channels: int = CHANNELS) -> Array:
    return np.random.default_rng(seed).standard_normal((count, channels, SIDE, SIDE)).astype(np.float32)


def make(model: onnx.ModelProto, folder: Path, options: BuildOptions) -> BuiltEngine:
    channels = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    profile = {"x": ShapeRange(*((batch, channels, SIDE, SIDE) for batch in (1, 2, 4)))}
    return build("tensorrt", onnx_model.save(model, folder), (profile,), options, Silent())


def reference(x: Array) -> Array:
    import onnxruntime as ort

    model = network(x.shape[1])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    output: Array = session.run(None, {"x": x})[0]
    return output


def sqnr_db(got: Array, want: Array) -> float:
    noise = np.sum((got.astype(np.float64) - want) ** 2)
    return float(10 * np.log10(np.sum(want.astype(np.float64) ** 2) / noise))


@pytest.fixture(scope="module")
def context(trt: ModuleType) -> Iterator[Any]:
    cuda = pytest.importorskip("pycuda.driver", reason="pycuda is not installed")
    cuda.init()
    context = cuda.Device(0).retain_primary_context()
    yield context
    context.detach()


def infer(trt: ModuleType, context: Any, plan: bytes, x: Array) -> tuple[Array, str]:
    """Output `y` as float32, and what the inspector says of the layers."""
    import pycuda.driver as cuda

    context.push()
    try:
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        engine = runtime.deserialize_cuda_engine(plan)
        execution = engine.create_execution_context()
        stream = cuda.Stream()
        given = np.ascontiguousarray(x.astype(trt.nptype(engine.get_tensor_dtype("x"))))
        made = np.empty(x.shape, trt.nptype(engine.get_tensor_dtype("y")))
        buffers = {"x": cuda.mem_alloc(given.nbytes), "y": cuda.mem_alloc(made.nbytes)}
        cuda.memcpy_htod(buffers["x"], given)
        assert execution.set_input_shape("x", x.shape)
        for name, buffer in buffers.items():
            assert execution.set_tensor_address(name, int(buffer))
        assert execution.execute_async_v3(stream.handle)
        stream.synchronize()
        cuda.memcpy_dtoh(made, buffers["y"])
        inspector = engine.create_engine_inspector()
        layers = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        for buffer in buffers.values():
            buffer.free()
        del inspector, execution, engine, runtime, stream
        return made.astype(np.float32), str(layers)
    finally:
        context.pop()


def test_the_gpu_is_described(trt: ModuleType) -> None:
    gpu = environment.gpus()[0]
    assert re.fullmatch(r"\d+\.\d", gpu.compute_capability)
    assert float(gpu.driver_version) >= 11
    free = environment.free_gpu_memory()
    assert free is not None
    assert 0 < free <= gpu.total_bytes


def test_fp32_and_a_timing_cache_that_the_second_build_reads(
    trt: ModuleType, options: BuildOptions, context: Any, tmp_path: Path
) -> None:
    file = tmp_path / "cache/timings"
    with pytest.raises(BuildError, match="there is no timing cache"):
        make(network(), tmp_path / "a", replace(options, timing_cache=file, require_timing_cache=True))
    file.parent.mkdir()
    file.write_bytes(b"damaged" * 100)
    first = make(network(), tmp_path / "a", replace(options, timing_cache=file))
    assert any("does not fit" in warning for warning in first.warnings), first
    assert first.timing_cache is not None
    assert first.timing_cache.read_bytes == 0
    assert first.timing_cache.written_bytes == file.stat().st_size > 100
    second = make(network(), tmp_path / "a", replace(options, timing_cache=file, require_timing_cache=True))
    assert second.timing_cache is not None
    assert second.timing_cache.read_bytes == first.timing_cache.written_bytes
    assert first.timing_cache.hits is None or (second.timing_cache.hits or 0) > first.timing_cache.hits
    assert second.warnings == ()
    got, _ = infer(trt, context, second.plan, images())
    assert sqnr_db(got, reference(images())) > 40
    assert first.io_dtypes == {"x": "float32", "y": "float32"}


def test_fp16_is_delivered(trt: ModuleType, options: BuildOptions, context: Any, tmp_path: Path) -> None:
    model = network()
    if version(trt) >= (10, 0):
        from onnxruntime.transformers import float16

        model = float16.convert_float_to_float16(model, keep_io_types=True)
    built = make(model, tmp_path, replace(options, precision="fp16"))
    assert built.applied.get("precision_flags") == (["FP16"] if version(trt) < (10, 0) else None)
    assert built.applied["timing_iterations"] == 8
    got, layers = infer(trt, context, built.plan, images())
    assert re.search("fp16|half", layers, re.IGNORECASE), layers[:2000]
    assert sqnr_db(got, reference(images())) > 30


def test_a_graph_with_fp16_tensors_gets_the_flag_for_it(trt: ModuleType, options: BuildOptions, tmp_path: Path) -> None:
    if version(trt) >= (10, 0):
        pytest.skip("networks of TensorRT 10 and newer are strongly typed")
    from gpuopt.backends.tensorrt import repairs

    model = repairs.with_io_dtypes(network(), [("y", "fp16")])
    built = make(model, tmp_path, options)
    assert built.applied["precision_flags"] == ["FP16"]
    assert built.io_dtypes == {"x": "float32", "y": "float16"}


def test_int8_from_qdq(trt: ModuleType, options: BuildOptions, context: Any, tmp_path: Path) -> None:
    built = make(quantized(), tmp_path, replace(options, precision="int8"))
    if version(trt) < (10, 0):
        assert built.applied["precision_flags"] == ["INT8", "FP16"]
    got, layers = infer(trt, context, built.plan, images())
    assert re.search("int8|i8i8", layers, re.IGNORECASE), (built.messages, built.calibration_cache, layers)
    assert sqnr_db(got, reference(images())) > 15


def test_nodes_kept_in_fp32_and_tactic_sources(trt: ModuleType, options: BuildOptions, tmp_path: Path) -> None:
    if version(trt) < (10, 0):
        built = make(network(), tmp_path, replace(options, precision="fp16", fp32_nodes=("conv0", "nothing")))
        assert built.applied["precision_flags"] == ["FP16", "PREFER_PRECISION_CONSTRAINTS"]
        assert built.applied["tactic_sources"] == list(LEGACY_SOURCES)
    with pytest.raises(UsageError, match="no tactic source 'NOTHING'"):
        make(network(), tmp_path, replace(options, tactic_sources=("NOTHING",)))


def test_io_formats(trt: ModuleType, options: BuildOptions, tmp_path: Path) -> None:
    formats = (("x", "fp16:hwc8"), ("y", "fp16:chw"))
    built = make(network(), tmp_path, replace(options, precision="fp16", io_formats=formats))
    assert built.io_dtypes == {"x": "float16", "y": "float16"}
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(built.plan)
    assert engine.get_tensor_dtype("x") == trt.float16
    description = engine.get_tensor_format_desc("x")
    assert re.search(r"% ?8|hwc8|eight", description, re.IGNORECASE), description
    with pytest.raises(BuildError, match="format"):
        make(network(), tmp_path / "b", replace(options, io_formats=(("x", "fp32:hwc8"),)))


def test_the_workspace_is_clamped_with_a_warning(trt: ModuleType, options: BuildOptions, tmp_path: Path) -> None:
    built = make(network(), tmp_path, replace(options, workspace_bytes=1 << 50))
    assert "more than is free on the GPU" in built.warnings[0]
    assert built.applied["workspace_bytes"] <= environment.gpus()[0].total_bytes


@pytest.mark.parametrize("method", ["entropy", "minmax"])
def test_the_native_calibrator(
    method: Any, trt: ModuleType, options: BuildOptions, context: Any, tmp_path: Path
) -> None:
    # Wide enough that INT8 is the fastest by far.
    given, channels = list[int](), 512
    model = network(channels)

    def feeds() -> Iterator[dict[str, Array]]:
        for seed in range(4):
            given.append(seed)
            yield {"x": images(2, seed, channels)}

    file = tmp_path / "table.cache"
    asked = replace(
        options, precision="int8", fp16_remainder=False, calibration=NativeCalibration(method, feeds, 2, file)
    )
    if version(trt) >= (11, 0):
        with pytest.raises(RequirementError, match="has no calibrator"):
            make(model, tmp_path, asked)
        return
    built = make(model, tmp_path, asked)
    assert given == [0, 1, 2, 3]
    assert built.calibration_cache == file.read_bytes()
    found = ranges.read(file).ranges
    assert {"x", "y"} <= found.keys()
    assert 2 < found["x"].high < 6
    got, layers = infer(trt, context, built.plan, images(seed=9, channels=channels))
    assert re.search("int8|i8i8", layers, re.IGNORECASE), (built.messages, built.calibration_cache, layers)
    assert sqnr_db(got, reference(images(seed=9, channels=channels))) > 15
    again = make(model, tmp_path, asked)
    assert given == [0, 1, 2, 3], "the second build reads the cache"
    assert again.calibration_cache == built.calibration_cache


def test_bad_calibration_data_is_refused(trt: ModuleType, options: BuildOptions, tmp_path: Path) -> None:
    if version(trt) >= (11, 0):
        pytest.skip("TensorRT 11 has no calibrator")
    pytest.importorskip("pycuda.driver", reason="pycuda is not installed")
    bad = [images(), np.full_like(images(), np.nan)]
    calibration = NativeCalibration("minmax", lambda: ({"x": x} for x in bad), 2, tmp_path / "cache")
    with pytest.raises(DataError, match="calibration batch 2: 'x' holds NaN"):
        make(network(), tmp_path, replace(options, precision="int8", calibration=calibration))
    assert not (tmp_path / "cache").exists()


def test_options_of_newer_releases_are_refused(trt: ModuleType, options: BuildOptions, tmp_path: Path) -> None:
    if version(trt) >= (8, 6):
        pytest.skip("TensorRT 8.6 and newer have the option")
    with pytest.raises(UsageError, match=r"needs TensorRT 8.6 or newer"):
        make(network(), tmp_path, replace(options, optimization_level=3))


def test_an_operator_that_nobody_knows_is_named(trt: ModuleType, options: BuildOptions, tmp_path: Path) -> None:
    model = network()
    model.graph.node[1].op_type = "Strange"
    with pytest.raises(BuildError, match=r"at node 'relu0' \(Strange\): the operator is no"):
        make(model, tmp_path, options)


def test_a_zero_point_is_explained(trt: ModuleType, options: BuildOptions, tmp_path: Path) -> None:
    model = quantized()
    zeros = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for tensor in model.graph.initializer:
        if tensor.name in zeros:
            value = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(value, 3), tensor.name))
    with pytest.raises(BuildError, match="quantizes symmetrically alone"):
        make(model, tmp_path, replace(options, precision="int8"))


_FULL_GPU = """
import json, sys
from pathlib import Path
import pycuda.driver as cuda
from gpuopt.backends.tensorrt.builder import build
from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.errors import GpuoptError
from gpuopt.progress import Silent
from gpuopt.shapes import ShapeRange

cuda.init()
context = cuda.Device(0).retain_primary_context()
context.push()
taken = cuda.mem_alloc(cuda.mem_get_info()[0] - (3 << 30))
shape = (64, 64, 512, 512)
try:
    build("tensorrt", Path(sys.argv[1]), ({"x": ShapeRange(shape, shape, shape)},),
          BuildOptions(precision="fp32", tactic_sources=tuple(sys.argv[2:])), Silent())
    said = {"kind": "none", "message": "", "hint": ""}
except GpuoptError as error:
    said = {"kind": error.kind, "message": error.message, "hint": error.hint}
taken.free()
context.pop()
context.detach()
print(json.dumps(said))
"""


def test_a_full_gpu_is_told_as_such(trt: ModuleType, options: BuildOptions, tmp_path: Path) -> None:
    pytest.importorskip("pycuda.driver", reason="pycuda is not installed")
    model = network()
    for value in [*model.graph.input, *model.graph.output]:
        for axis in (2, 3):
            value.type.tensor_type.shape.dim[axis].dim_value = 512
    del model.graph.value_info[:]
    path = onnx_model.save(model, tmp_path)
    command = [sys.executable, "-c", _FULL_GPU, str(path), *options.tactic_sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["kind"] == "build", said
    assert "GPU's memory does not suffice" in said["message"], said
    assert "nvidia-smi" in said["hint"], said
