"""The builder's configuration: every option is set, or refused with the reason."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from gpuopt.backends.tensorrt import network as networks
from gpuopt.backends.tensorrt import timing_cache
from gpuopt.backends.tensorrt.library import name_of
from gpuopt.backends.tensorrt.limits import has_precision_flags
from gpuopt.backends.tensorrt.log import library_log
from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.errors import RequirementError, UsageError
from gpuopt.shapes import Profile

TIMING_ITERATIONS = 8
"""As often as trtexec times a tactic. With TensorRT's own default, once, an engine got slower kernels for some layers:
of two builds of one INT8 graph (ResNet-50, batch 32, H100, TensorRT 8.5) one took 0.819 and this one 0.801 ms."""
_HARDWARE = {"ampere+": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}


@dataclass(frozen=True)
class Configured:
    """A configuration, and what was set.

    Attributes:
        config: TensorRT's.
        cache: the timing cache in use.
        applied: option or flag by name, for the facts.
        warnings: what is not as it was asked for.
    """

    config: Any
    cache: timing_cache.Attached | None
    applied: dict[str, Any]
    warnings: tuple[str, ...]


def configure(
    target: str, trt: ModuleType, parsed: networks.Parsed, profiles: tuple[Profile, ...], options: BuildOptions
) -> Configured:
    """Make the configuration of a build; the library's log is the process's own.

    Raises:
        UsageError: an option that this release or this GPU does not have.
        RequirementError: there is no such DLA core.
        BuildError: a profile does not fit, or the required timing cache.
    """
    builder, network = parsed.builder, parsed.network
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    applied: dict[str, Any] = {}
    if has_precision_flags(target, trt, options):
        applied["precision_flags"] = _set_precision(trt, config, network, options)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
        applied["workspace_bytes"] = options.workspace_bytes
    if options.optimization_level is not None:
        config.builder_optimization_level = applied["optimization_level"] = options.optimization_level
    if options.auxiliary_streams is not None:
        config.max_aux_streams = applied["auxiliary_streams"] = options.auxiliary_streams
    if target != "tensorrt-rtx":
        iterations = options.timing_iterations or TIMING_ITERATIONS
        config.avg_timing_iterations = applied["timing_iterations"] = iterations
    if options.tactic_sources:
        _set_tactic_sources(target, trt, config, options.tactic_sources)
        applied["tactic_sources"] = list(options.tactic_sources)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
        applied["tf32"] = False
    if flags := _flags(options):
        for name in flags:
            config.set_flag(getattr(trt.BuilderFlag, name))
        applied["flags"] = flags
    if options.hardware_compatibility != "none":
        _set_hardware_compatibility(trt, config, options.hardware_compatibility)
        applied["hardware_compatibility"] = options.hardware_compatibility
    if options.dla_core is not None:
        _set_dla(trt, builder, config, options.dla_core)
        applied["dla_core"] = options.dla_core
    if options.plugins:
        applied["plugins"] = [path.name for path in options.plugins]
    if options.io_formats:
        applied["io_formats"] = dict(options.io_formats)
    if target == "tensorrt-rtx" and options.compute_capabilities:
        chosen = [_compute_capability(trt, text) for text in options.compute_capabilities]
        config.num_compute_capabilities = len(chosen)
        for index, capability in enumerate(chosen):
            config.set_compute_capability(capability, index)
    networks.fix_static_inputs(network, profiles)
    for profile in profiles:
        config.add_optimization_profile(networks.optimization_profile(builder, network, profile))
    attached = timing_cache.attach(config, trt, options, library_log(trt).messages)
    return Configured(config, attached, applied, attached.warnings if attached else ())


def _set_precision(trt: ModuleType, config: Any, network: Any, options: BuildOptions) -> list[str]:
    """Builder flags of networks that are not strongly typed."""
    fp16 = options.precision == "fp16" or (options.precision == "int8" and options.fp16_remainder)
    # TensorRT 8 refuses a graph with FP16 tensors without the flag.
    fp16 = fp16 or networks.holds_fp16(trt, network)
    names = (["INT8"] if options.precision == "int8" else []) + (["FP16"] if fp16 else [])
    if options.fp32_nodes and networks.keep_in_fp32(trt, network, options.fp32_nodes):
        names.append("PREFER_PRECISION_CONSTRAINTS")
    for name in names:
        config.set_flag(getattr(trt.BuilderFlag, name))
    return names


def _flags(options: BuildOptions) -> list[str]:
    """Builder flags beside those of the precision."""
    asked = {
        "REFIT": options.refit,
        "STRIP_PLAN": options.strip_weights,
        # Stripped weights come back as they were; REFIT allows others, and kernels that do not count on their values.
        "REFIT_IDENTICAL": options.strip_weights and not options.refit,
        "WEIGHT_STREAMING": options.weight_streaming,
        "VERSION_COMPATIBLE": options.version_compatible,
        "SPARSE_WEIGHTS": options.sparsity,
        "GPU_FALLBACK": options.dla_core is not None,
    }
    return [name for name, wanted in asked.items() if wanted]


def _set_tactic_sources(target: str, trt: ModuleType, config: Any, names: tuple[str, ...]) -> None:
    known = trt.TacticSource.__members__
    unknown = [name for name in names if name.upper() not in known]
    if unknown:
        raise UsageError(
            f"{name_of(target)} {trt.__version__} has no tactic source '{unknown[0]}'", f"It has {', '.join(known)}."
        )
    mask = sum(1 << int(known[name]) for name in {name.upper() for name in names})
    if not config.set_tactic_sources(mask):
        raise UsageError(
            f"{name_of(target)} refuses the tactic sources {', '.join(names)}", f"It has {', '.join(known)}."
        )


def _set_hardware_compatibility(trt: ModuleType, config: Any, wanted: str) -> None:
    level = getattr(trt.HardwareCompatibilityLevel, _HARDWARE[wanted], None)
    if level is None:
        raise UsageError(
            f"TensorRT {trt.__version__} has no hardware compatibility '{wanted}'", "Install a newer TensorRT."
        )
    config.hardware_compatibility_level = level


def _set_dla(trt: ModuleType, builder: Any, config: Any, core: int) -> None:
    if core >= builder.num_DLA_cores:
        raise RequirementError(
            f"there is no DLA core {core} here: this machine has {builder.num_DLA_cores}",
            "DLA is a part of Jetson and DRIVE; leave out build.dla_core elsewhere.",
        )
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core


def clamped_workspace(wanted: int | None, free: int | None) -> tuple[int | None, tuple[str, ...]]:
    """The limit of scratch memory that there is room for, bytes, and what to say of it."""
    if wanted is None or free is None or wanted <= free:
        return wanted, ()
    said = f"the workspace of {wanted / 2**30:.1f} GiB is more than is free on the GPU: {free / 2**30:.1f} GiB are used"
    return free, (said,)


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
