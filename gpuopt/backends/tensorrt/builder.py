"""Building engines: TensorRT >= 10, TensorRT-RTX, and TensorRT 8.5 / 8.6.

From TensorRT 10 on networks are strongly typed: precision is what the ONNX says. TensorRT 8, and the calibrator of
8.5 to 10, get it as builder flags over an FP32 graph.
"""

from __future__ import annotations

import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gpuopt import environment, time_limit
from gpuopt.artifact import ONNX_FILE
from gpuopt.backends.tensorrt import calibrator as calibrators
from gpuopt.backends.tensorrt import configuration, diagnosis, legacy, limits, timing_cache
from gpuopt.backends.tensorrt import network as networks
from gpuopt.backends.tensorrt.library import import_module, version
from gpuopt.backends.tensorrt.log import library_log
from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.errors import BuildError, GpuoptError
from gpuopt.progress import Progress
from gpuopt.shapes import Profile


@dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine, and how it came about.

    Attributes:
        plan: the engine.
        version: of the library.
        messages: what the builder said, errors and warnings, each once.
        warnings: for the user: what is not as it was asked for, repairs among them.
        repairs: what was changed so that the engine could be built, a line each.
        applied: options and flags in force, by name.
        timing_cache: what was done with it; None: there is none.
        timings: what the build read there and timed itself, without what others have added since: a timing cache that
            gives this engine again; None without one.
        calibration_cache: of TensorRT's own calibrator, its text; None without it.
        io_dtypes: numpy dtype by input and output.
        seconds: of the whole build, repairs included.
    """

    plan: bytes
    version: str
    messages: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    applied: dict[str, Any] = field(default_factory=dict)
    timing_cache: timing_cache.TimingCacheUse | None = None
    timings: bytes | None = None
    calibration_cache: bytes | None = None
    io_dtypes: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class _Request:
    """One try: what repairs change, and what they do not."""

    target: str
    trt: ModuleType
    graph: Path
    profiles: tuple[Profile, ...]
    options: BuildOptions


@dataclass(frozen=True)
class _Failure:
    """A try that gave no engine."""

    messages: dict[str, list[str]]


def build(
    target: str,
    onnx_path: Path,
    profiles: tuple[Profile, ...],
    options: BuildOptions,
    progress: Progress,
    deadline: float | None = None,
) -> BuiltEngine:
    """Build a serialized engine from an ONNX file.

    Args:
        target: `tensorrt` or `tensorrt-rtx`.
        onnx_path: Q/DQ and FP16 in it decide the engine's precision; for TensorRT 8 it is FP32 with or without Q/DQ,
            of opset 17 or less.
        profiles: min / opt / max of every input; at least one.
        deadline: when to stop, by `time.monotonic`; only a builder with a progress monitor can.

    Raises:
        TimeLimitError: it was stopped; what it had timed is in the timing cache of the options.
        RequirementError: the module is missing, or there is no GPU for a target that needs one.
        UsageError: an option that this release does not have.
        BuildError: the parser or the builder refuses; the message names the node where there is one.
        DataError: calibration data is not what the network takes.
    """
    started = time.monotonic()
    trt = import_module(target)
    limits.check(target, str(trt.__version__), options)
    check_opset(target, trt, onnx_path)
    networks.load_plugins(trt, options.plugins)
    wanted, warnings = configuration.clamped_workspace(
        options.workspace_bytes, environment.free_gpu_memory() if options.workspace_bytes is not None else None
    )
    options = replace(options, workspace_bytes=wanted)
    with tempfile.TemporaryDirectory(prefix="gpuopt-build-") as scratch:
        graph = _with_known_operators(target, trt, onnx_path, Path(scratch) / "known")
        graph = _with_io_dtypes(target, trt, graph, options, Path(scratch) / "io")
        request = _Request(target, trt, graph, profiles, options)
        repaired: list[str] = []
        while True:
            result = _attempt(request, progress, deadline)
            if isinstance(result, BuiltEngine):
                break
            repair = _repaired(request, result, repaired, Path(scratch)) if options.repairs else None
            if repair is None:
                raise _error(request, result, repaired)
            request, said = repair
            repaired.append(said)
            progress.line(f"{target}: {said}")
    return replace(
        result,
        warnings=(*warnings, *(f"{target}: {said}" for said in repaired), *result.warnings),
        repairs=tuple(repaired),
        seconds=time.monotonic() - started,
    )


def _error(request: _Request, failure: _Failure, repaired: list[str]) -> GpuoptError:
    error = diagnosis.builder_error(f"{request.target} {request.trt.__version__}", failure.messages)
    if not repaired:
        return error
    last = type(error)(f"{error.message} (tried in vain: {'; '.join(repaired)})", error.hint)
    last.details = error.details
    return last


def _with_known_operators(target: str, trt: ModuleType, onnx_path: Path, folder: Path) -> Path:
    """The graph in operators that this release has."""
    if target != "tensorrt" or version(trt) >= legacy.FIRST_WITH_LAYER_NORMALIZATION:
        return onnx_path
    import onnx

    from gpuopt import onnx_model

    replaced = legacy.without_layer_normalization(onnx.load(str(onnx_path)))
    return onnx_model.save(replaced, folder) if replaced is not None else onnx_path


def _with_io_dtypes(target: str, trt: ModuleType, onnx_path: Path, options: BuildOptions, folder: Path) -> Path:
    """The graph with the dtypes of `io_formats`, which a strongly typed network takes from the graph."""
    formats = networks.parse_io_formats(options.io_formats)
    if not formats or limits.has_precision_flags(target, trt, options):
        return onnx_path
    import onnx

    from gpuopt import onnx_model
    from gpuopt.backends.tensorrt import repairs

    dtypes = [(name, dtype) for name, (dtype, _) in formats.items()]
    onnx_model.save(repairs.with_io_dtypes(onnx.load(str(onnx_path)), dtypes), folder)
    return folder / ONNX_FILE


def _attempt(request: _Request, progress: Progress, deadline: float | None) -> BuiltEngine | _Failure:
    """One try of a build."""
    target, trt, options = request.target, request.trt, request.options
    log = library_log(trt)
    log.clear()
    weakly_typed = limits.has_precision_flags(target, trt, options)
    parsed = networks.parse(target, trt, log, request.graph, weakly_typed)
    networks.set_io_formats(trt, parsed.network, options, weakly_typed)
    made = configuration.configure(target, trt, parsed, request.profiles, options)
    calibrator = _set_calibrator(trt, parsed, made.config, request)
    # The builder calls it, so that it has to outlive the build.
    monitor = _make_monitor(trt, progress, deadline) if hasattr(trt, "IProgressMonitor") else None
    if monitor is not None:
        made.config.progress_monitor = monitor
    try:
        plan = parsed.builder.build_serialized_network(parsed.network, made.config)
        if calibrator is not None and calibrator.failure is not None:
            raise calibrator.failure
    finally:
        if calibrator is not None:
            calibrator.close()
    if plan is None and monitor is not None and monitor.stopped:
        if made.cache is not None and options.timing_cache is not None:
            timing_cache.save(made.config, made.cache, options.timing_cache, log.messages)
        raise time_limit.error_after(None)
    if plan is None:
        return _Failure(log.messages)
    warnings, use, timings = list(made.warnings), None, None
    if made.cache is not None and options.timing_cache is not None:
        timings = timing_cache.serialized(made.cache)
        use, said = timing_cache.save(made.config, made.cache, options.timing_cache, log.messages)
        warnings.extend(said)
    return BuiltEngine(
        plan=bytes(plan),
        version=str(trt.__version__),
        messages=tuple(networks.without_repeats(log.messages)),
        warnings=tuple(warnings),
        applied=made.applied,
        timing_cache=use,
        timings=timings,
        calibration_cache=calibrator.content if calibrator is not None else None,
        io_dtypes={name: _numpy_name(tensor.dtype) for name, tensor in networks.io_tensors(parsed.network).items()},
    )


_NUMPY_NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3fn"}


def _numpy_name(dtype: Any) -> str:
    name = str(dtype.name)
    return _NUMPY_NAMES.get(name, name.lower())


def _numpy_type(dtype: Any) -> np.dtype[Any]:
    """Of a calibrator's input. TensorRT 8.5's own `nptype` needs `numpy.bool`, which numpy 1.24 to 1.26 lack."""
    return np.dtype(_numpy_name(dtype))


def _set_calibrator(trt: ModuleType, parsed: networks.Parsed, config: Any, request: _Request) -> Any:
    """Give the builder TensorRT's own calibrator, where it is asked for."""
    calibration = request.options.calibration
    if calibration is None:
        return None
    if not request.profiles:
        raise BuildError("calibration needs a shape profile", "Give the shapes of the inputs: --input NAME:SHAPE.")
    inputs = [parsed.network.get_input(index) for index in range(parsed.network.num_inputs)]
    is_cached = calibration.cache_file is not None and calibration.cache_file.is_file()
    batches = None
    if not is_cached:
        batches = calibrators.Batches(calibration, {tensor.name: _numpy_type(tensor.dtype) for tensor in inputs})
    shapes = batches.peek() if batches is not None else {}
    profile = calibrators.calibration_profile(request.profiles[0], shapes)
    config.set_calibration_profile(networks.optimization_profile(parsed.builder, parsed.network, profile))
    calibrator = calibrators.make_calibrator(trt, calibration, batches)
    config.int8_calibrator = calibrator
    return calibrator


def _repaired(request: _Request, failure: _Failure, repaired: list[str], scratch: Path) -> tuple[_Request, str] | None:
    """The next try, and what it changes; None if there is nothing left to try."""
    finding = diagnosis.find(failure.messages)
    limit = request.options.workspace_bytes
    if finding.cause.name == diagnosis.OUT_OF_MEMORY:
        return _with_smaller_workspace(request, limit, sum("workspace" in said for said in repaired))
    if finding.cause.name != diagnosis.NO_IMPLEMENTATION or not finding.node:
        return None
    import onnx

    from gpuopt import onnx_model
    from gpuopt.backends.tensorrt import repairs

    if sum("FP32" in said for said in repaired) >= repairs.MOST_NODE_REPAIRS:
        return None
    repair = repairs.with_nodes_in_fp32(onnx.load(str(request.graph)), finding.node)
    if repair is None:
        return None
    folder = scratch / f"repair{len(repaired)}"
    onnx_model.save(repair.model, folder)
    shown = ", ".join(repair.nodes[:4]) + (f" and {len(repair.nodes) - 4} more" if len(repair.nodes) > 4 else "")
    said = f"no kernel for {shown} in the asked-for precision: it computes in FP32"
    return replace(request, graph=folder / ONNX_FILE), said


def _with_smaller_workspace(request: _Request, limit: int | None, tried: int) -> tuple[_Request, str] | None:
    from gpuopt.backends.tensorrt import repairs

    smaller = repairs.smaller_workspace(limit, environment.free_gpu_memory())
    if smaller is None or tried >= repairs.MOST_WORKSPACE_REPAIRS:
        return None
    options = replace(request.options, workspace_bytes=smaller)
    said = f"the GPU's memory did not suffice: the workspace is limited to {smaller / 2**20:.0f} MiB"
    return replace(request, options=options), said


def _make_monitor(trt: ModuleType, progress: Progress, deadline: float | None) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Passes the outermost phase's steps on and stops the builder in time; it calls from its own threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()
            self._totals: dict[str, int] = {}
            self.stopped = False

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                with self._lock:
                    self._totals[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            with self._lock:
                total = self._totals.get(phase)
                if total:
                    progress.advance(step + 1, total)
                self.stopped = self.stopped or (deadline is not None and time.monotonic() >= deadline)
                return not self.stopped

        def phase_finish(self, phase: str) -> None:
            with self._lock:
                self._totals.pop(phase, None)

    return Monitor()


def check_opset(target: str, trt: ModuleType, onnx_path: Path) -> None:
    """Refuse an opset that TensorRT 8 misreads without a word.

    Raises:
        BuildError: the opset is above 17, and TensorRT is 8.
    """
    if target != "tensorrt" or version(trt) >= (10, 0):
        return
    import onnx

    from gpuopt import onnx_model

    opset = onnx_model.opset(onnx.load(str(onnx_path), load_external_data=False))
    if opset > 17:
        raise BuildError(
            f"TensorRT {trt.__version__} takes ONNX opsets up to 17, and the graph has {opset}",
            "Export with --opset 17 --set export.exporters=torchscript.",
        )
