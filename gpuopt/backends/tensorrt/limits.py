"""Which option which release has: an option that it lacks is refused with the reason, never dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from gpuopt.backends.tensorrt.library import is_strongly_typed, name_of, release
from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.errors import RequirementError, UsageError

_NO_TIMING = "it chooses kernels without timing them"
_ONE_PLATFORM = "its engines run on every GPU of the compute capabilities that they are built for"


@dataclass(frozen=True)
class _Limit:
    """Where an option exists.

    Attributes:
        key: in the recipe.
        given: whether the user asks for it.
        since: first release of TensorRT that has it.
        rtx: why TensorRT-RTX does not have it; empty: it does.
    """

    key: str
    given: Callable[[BuildOptions], Any]
    since: tuple[int, int] = (8, 5)
    rtx: str = ""


_LIMITS = (
    _Limit("build.optimization_level", lambda o: o.optimization_level is not None, (8, 6)),
    _Limit("build.timing_cache", lambda o: o.timing_cache or o.require_timing_cache, rtx=_NO_TIMING),
    _Limit("build.timing_iterations", lambda o: o.timing_iterations, rtx=_NO_TIMING),
    _Limit("build.attempts", lambda o: o.attempts > 1, rtx=_NO_TIMING),
    _Limit("build.auxiliary_streams", lambda o: o.auxiliary_streams is not None, (8, 6)),
    _Limit("build.version_compatible", lambda o: o.version_compatible, (8, 6), "it has no lean runtime"),
    _Limit("build.hardware_compatibility", lambda o: o.hardware_compatibility != "none", (8, 6), _ONE_PLATFORM),
    _Limit("build.strip_weights", lambda o: o.strip_weights, (10, 0)),
    _Limit("build.weight_streaming", lambda o: o.weight_streaming, (10, 0)),
    _Limit("build.plugins", lambda o: o.plugins, rtx="it takes no plugins"),
    _Limit("build.dla_core", lambda o: o.dla_core is not None, rtx="it builds for GPUs alone"),
)


def check(target: str, version: str, options: BuildOptions) -> None:
    """Refuse what this release cannot do.

    Args:
        version: of the target's library, as `8.5.3.1`.

    Raises:
        UsageError: names the option and the release that has it.
        RequirementError: TensorRT's calibrator is asked for where there is none.
    """
    present = release(version)
    for limit in _LIMITS:
        if not limit.given(options):
            continue
        if target == "tensorrt-rtx" and limit.rtx:
            raise UsageError(f"TensorRT-RTX has no {limit.key}: {limit.rtx}", "Leave it out, or build for tensorrt.")
        if target == "tensorrt" and present < limit.since:
            raise UsageError(
                f"{limit.key} needs TensorRT {limit.since[0]}.{limit.since[1]} or newer; here is {version}",
                "Leave it out, or install a newer TensorRT.",
            )
    if target == "tensorrt" and options.compute_capabilities:
        raise UsageError(
            "build.compute_capability is for tensorrt-rtx: TensorRT builds for the GPU of this machine",
            "Leave it out, or use --set build.hardware_compatibility=ampere+.",
        )
    if options.attempts > 1 and options.require_timing_cache:
        raise UsageError(
            "build.attempts times tactics anew from the second on, build.require_timing_cache takes them from a file",
            "Leave out one of the two: model.tensorrt.timing beside an engine that attempts chose gives it again.",
        )
    if options.weight_streaming and options.calibration is not None:
        raise UsageError(
            "build.weight_streaming needs a strongly typed network, which TensorRT's calibrator does not work on",
            "Leave it out, or use --set quantize.quantizer=gpuopt.",
        )
    if options.calibration is not None:
        check_calibrator(target, version)


def check_calibrator(target: str, version: str) -> None:
    """Refuse TensorRT's own calibrator where there is none.

    Raises:
        RequirementError: TensorRT 11 or newer, or TensorRT-RTX.
    """
    if target == "tensorrt-rtx" or release(version) >= (11, 0):
        raise RequirementError(
            f"{name_of(target)} {version} has no calibrator: it reads INT8 from Q/DQ in the graph",
            "Use gpuopt's Q/DQ (--set quantize.quantizer=gpuopt), or install TensorRT 8.5 to 10.",
        )


def has_precision_flags(target: str, module: ModuleType, options: BuildOptions) -> bool:
    """Whether precision is asked for by builder flags: TensorRT 8, and wherever its calibrator is used."""
    return options.calibration is not None or not is_strongly_typed(target, module)
