"""Building engines: TensorRT >= 10 and TensorRT-RTX, and TensorRT 8.5 and 8.6 as a small legacy branch.

Strongly typed networks take their precision from the ONNX. TensorRT 8 has no such networks: FP16 and INT8 are builder
flags there, over a graph in FP32 with Q/DQ.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from gpuopt.backends.tensorrt import diagnosis
from gpuopt.backends.tensorrt.calibrator import make_calibrator
from gpuopt.backends.tensorrt.configuration import Configurator, load_plugins
from gpuopt.backends.tensorrt.library import MODULES, import_module, is_strongly_typed
from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.environment import install_hint
from gpuopt.errors import RequirementError
from gpuopt.progress import Progress
from gpuopt.shapes import Profile

_MOST_MESSAGES = 200


@dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine and what was said on the way.

    Attributes:
        plan: its bytes.
        version: of the library.
        messages: of the builder, errors and warnings without repeats.
        warnings: of gpuopt, for the report.
        applied: the options, as applied.
        calibration_cache: what TensorRT's own calibrator wrote; empty: it was not used.
    """

    plan: bytes
    version: str
    messages: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    applied: dict[str, Any] = field(default_factory=dict)
    calibration_cache: bytes = b""


def build(
    target: str, onnx_path: Path, profiles: tuple[Profile, ...], options: BuildOptions, progress: Progress
) -> BuiltEngine:
    """Build a serialized engine from an ONNX file.

    Args:
        target: `tensorrt` or `tensorrt-rtx`.
        onnx_path: Q/DQ and FP16 in it decide the engine's precision; with TensorRT 8 the options do.
        profiles: min / opt / max of every input; at least one.

    Raises:
        RequirementError: the module is missing, there is no GPU for a target that needs one, or too little memory.
        UsageError: an option that this release does not have.
        BuildError: the parser or the builder refuses; the message names the node where there is one.
    """
    trt = import_module(target)
    who = f"{target} {trt.__version__}"
    log = _make_log(trt)
    load_plugins(trt, log, options.plugins)
    builder = trt.Builder(log)
    if builder is None:
        raise RequirementError(f"{target} finds no usable GPU driver", f"Install it: {install_hint(MODULES[target])}.")
    network = builder.create_network(_network_flags(target, trt, options))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_path)):
        raise diagnosis.refused_graph(who, parser)
    configurator = Configurator(target, trt, builder, network, log)
    made = configurator.configure(options, profiles, _free_bytes(target))
    calibrator = None
    if options.calibration is not None:
        calibrator = make_calibrator(trt, target, options.calibration)
        made.config.int8_calibrator = calibrator
        made.config.set_calibration_profile(configurator.calibration_profile(options.calibration, profiles[0]))
    # The configuration keeps no reference of its own.
    monitor = _make_monitor(trt, progress) if hasattr(trt, "IProgressMonitor") else None
    if monitor is not None:
        made.config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, made.config)
    if calibrator is not None and calibrator.problem is not None:
        raise calibrator.problem
    if plan is None:
        raise diagnosis.explain(who, log.messages["ERROR"])
    configurator.keep_timing_cache(made, options)
    return BuiltEngine(
        bytes(memoryview(plan)),
        str(trt.__version__),
        tuple(diagnosis.without_repeats(log.messages)),
        tuple(made.warnings),
        made.applied,
        calibrator.written if calibrator is not None else b"",
    )


def compute_capabilities(module: ModuleType) -> list[str]:
    """The compute capabilities that a TensorRT-RTX release can build for, as `8.6`."""
    names = [name for name in dir(module.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    return sorted((f"{name[2:-1]}.{name[-1]}" for name in names), key=lambda text: float(text))


def _network_flags(target: str, trt: ModuleType, options: BuildOptions) -> int:
    flags = trt.NetworkDefinitionCreationFlag
    if is_strongly_typed(target, trt) and options.calibration is None:
        return 1 << int(flags.STRONGLY_TYPED)
    return 1 << int(flags.EXPLICIT_BATCH) if hasattr(flags, "EXPLICIT_BATCH") else 0


def _free_bytes(target: str) -> int | None:
    """Free memory of the GPU that the engine is built on."""
    if target != "tensorrt":
        return None
    from gpuopt.cuda.device import Device

    try:
        with Device() as device:
            return device.free_bytes()
    except RequirementError:
        # pycuda runs engines; it is not needed to build them.
        return None


def _make_log(trt: ModuleType) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps what the library says instead of printing it."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: dict[str, list[str]] = {"ERROR": [], "WARNING": []}

        def log(self, severity: Any, message: str) -> None:
            try:
                level = {"INTERNAL_ERROR": "ERROR"}.get(severity.name, severity.name)
                kept = self.messages.get(level)
                if kept is not None and len(kept) < _MOST_MESSAGES:
                    kept.append(str(message).strip())
            except Exception:  # noqa: S110 - an exception here would pass through C++ and abort
                pass

    return Log()


def _make_monitor(trt: ModuleType, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Passes the outermost phase's steps on; the builder calls from its own threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()
            self._totals: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                with self._lock:
                    self._totals[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            with self._lock:
                total = self._totals.get(phase)
                if total:
                    progress.advance(step + 1, total)
            return True

        def phase_finish(self, phase: str) -> None:
            with self._lock:
                self._totals.pop(phase, None)

    return Monitor()
