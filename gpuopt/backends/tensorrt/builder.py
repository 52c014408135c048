"""Building engines: TensorRT >= 10 and TensorRT-RTX.

Networks are strongly typed: precision is what the ONNX says, so there are no precision flags here.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gpuopt.backends.tensorrt.library import MODULES, import_module
from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.environment import install_hint
from gpuopt.errors import BuildError, RequirementError, UsageError
from gpuopt.progress import Progress
from gpuopt.shapes import Profile, format_shape

_MOST_MESSAGES = 200


@dataclass(frozen=True)
class BuiltEngine:
    """A serialized engine and what the builder said on the way, its warnings without repeats."""

    plan: bytes
    version: str
    messages: tuple[str, ...]


def build(
    target: str, onnx_path: Path, profiles: tuple[Profile, ...], options: BuildOptions, progress: Progress
) -> BuiltEngine:
    """Build a serialized engine from an ONNX file.

    Args:
        target: `tensorrt` or `tensorrt-rtx`.
        onnx_path: Q/DQ and FP16 in it decide the engine's precision.
        profiles: min / opt / max of every input; at least one.

    Raises:
        RequirementError: the module is missing, or there is no GPU for a target that needs one.
        BuildError: the parser or the builder refuses; the message names the node where there is one.
    """
    trt = import_module(target)
    log = _make_log(trt)
    builder = trt.Builder(log)
    if builder is None:
        raise RequirementError(f"{target} finds no usable GPU driver", f"Install it: {install_hint(MODULES[target])}.")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_path)):
        raise _parser_error(target, trt, parser)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if target == "tensorrt-rtx" and options.compute_capabilities:
        chosen = [_compute_capability(trt, text) for text in options.compute_capabilities]
        config.num_compute_capabilities = len(chosen)
        for index, capability in enumerate(chosen):
            config.set_compute_capability(capability, index)
    for profile in profiles:
        config.add_optimization_profile(_optimization_profile(builder, network, profile))
    monitor = _make_monitor(trt, progress)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _builder_error(target, trt, log.messages)
    return BuiltEngine(bytes(plan), str(trt.__version__), tuple(_without_repeats(log.messages)))


def compute_capabilities(module: ModuleType) -> list[str]:
    """The compute capabilities that a TensorRT-RTX release can build for, as `8.6`."""
    names = [name for name in dir(module.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    return sorted((f"{name[2:-1]}.{name[-1]}" for name in names), key=lambda text: float(text))


def _compute_capability(trt: ModuleType, text: str) -> Any:
    name = "CURRENT" if text == "current" else f"SM{text.replace('.', '').removeprefix('sm')}"
    capability = getattr(trt.ComputeCapability, name, None)
    if capability is None:
        raise UsageError(
            f"TensorRT-RTX {trt.__version__} does not build for compute capability '{text}'",
            f"It knows {', '.join(compute_capabilities(trt))} and current.",
        )
    return capability


def _optimization_profile(builder: Any, network: Any, profile: Profile) -> Any:
    result = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes = profile[tensor.name]
        if tensor.is_shape_tensor:
            raise BuildError(
                f"input '{tensor.name}' is a shape tensor, whose values (not sizes) a profile would have to bound",
                "Make the size a constant of the model, or derive it from another input's shape.",
            )
        if not all(size == -1 or size == wanted for size, wanted in zip(tensor.shape, shapes.opt, strict=True)):
            raise BuildError(
                f"input '{tensor.name}' is {format_shape(tensor.shape)} in the network, not {format_shape(shapes.opt)}",
                "This is a defect of the exported graph; try the other exporter: --set export.exporters=torchscript.",
            )
        result.set_shape(tensor.name, shapes.min, shapes.opt, shapes.max)
    return result


def _parser_error(target: str, trt: ModuleType, parser: Any) -> BuildError:
    problems = [parser.get_error(index) for index in range(parser.num_errors)]
    first = problems[0] if problems else None
    where = ""
    if first is not None:
        name, operator = getattr(first, "node_name", lambda: "")(), getattr(first, "node_operator", lambda: "")()
        where = f" at node '{name}' ({operator})" if name or operator else ""
    detail = " ".join(str(first.desc()).split())[:300] if first is not None else "no reason given"
    return BuildError(
        f"{target} {trt.__version__} does not take the graph{where}: {detail}",
        "Keep the node out of INT8 (--set quantize.nodes_to_exclude=[NAME]) or FP16 (cast.nodes_to_keep), "
        "or change the operator in the model.",
    )


def _builder_error(target: str, trt: ModuleType, messages: Mapping[str, list[str]]) -> BuildError | RequirementError:
    errors = messages["ERROR"] or ["no reason given"]
    text = " ".join(errors[-1].split())[:400]
    if "cudaError 35" in text or "insufficient for CUDA runtime" in text:
        return RequirementError(
            f"{target} {trt.__version__} needs an NVIDIA GPU and a current driver for this build",
            "Leave out the compute capability 'current', or build on the machine with the GPU.",
        )
    node = re.search(r"node[ _]?(?:name)?[: ]*'?([\w./:-]+)", text)
    where = f" at {node.group(1)}" if node else ""
    return BuildError(
        f"{target} {trt.__version__} cannot build the engine{where}: {text}",
        "Keep that node out of INT8 (quantize.nodes_to_exclude) or FP16 (cast.nodes_to_keep).",
    )


def _without_repeats(messages: Mapping[str, list[str]]) -> list[str]:
    return list(dict.fromkeys([*messages["ERROR"], *messages["WARNING"]]))


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
