"""Options that a release lacks are refused with the reason; options that are unknown name what is there."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gpuopt.backends.tensorrt import limits, network
from gpuopt.backends.tensorrt.configuration import clamped_workspace
from gpuopt.backends.tensorrt.options import BuildOptions, NativeCalibration
from gpuopt.errors import RequirementError, UsageError

CALIBRATION = NativeCalibration("entropy", list)

RTX = "tensorrt-rtx"
REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("tensorrt", "8.5.3.1", {"optimization_level": 3}, "8.6 or newer"),
    ("tensorrt", "8.5.3.1", {"auxiliary_streams": 0}, "8.6 or newer"),
    ("tensorrt", "8.5.3.1", {"version_compatible": True}, "8.6 or newer"),
    ("tensorrt", "8.5.3.1", {"hardware_compatibility": "ampere+"}, "8.6 or newer"),
    ("tensorrt", "8.6.1", {"strip_weights": True}, "10.0 or newer"),
    ("tensorrt", "8.6.1", {"weight_streaming": True}, "10.0 or newer"),
    ("tensorrt", "10.16", {"weight_streaming": True, "calibration": CALIBRATION}, "strongly typed"),
    ("tensorrt", "11.4", {"compute_capabilities": ("8.9",)}, "for tensorrt-rtx"),
    (RTX, "1.7", {"timing_cache": Path("t")}, "without timing"),
    (RTX, "1.7", {"require_timing_cache": True}, "without timing"),
    (RTX, "1.7", {"timing_iterations": 4}, "without timing"),
    (RTX, "1.7", {"attempts": 2}, "without timing"),
    ("tensorrt", "8.5.3.1", {"attempts": 2, "require_timing_cache": True}, "from a file"),
    (RTX, "1.7", {"plugins": (Path("p.so"),)}, "no plugins"),
    (RTX, "1.7", {"dla_core": 0}, "GPUs alone"),
    (RTX, "1.7", {"version_compatible": True}, "lean runtime"),
    (RTX, "1.7", {"hardware_compatibility": "ampere+"}, "every GPU"),
]


def release(version: str) -> ModuleType:
    """A stand-in that has nothing but a version, which is all that is looked at."""
    module = ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(("target", "version", "options", "words"), REFUSED)
def test_an_option_that_a_release_lacks_is_refused(
    target: str, version: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        limits.check(target, version, BuildOptions(**options))
    assert caught.value.hint
    limits.check(target, version, BuildOptions())


@pytest.mark.parametrize(("target", "version"), [("tensorrt", "11.0.1"), ("tensorrt", "11.4.0.106"), (RTX, "1.7")])
def test_the_native_calibrator_is_refused_where_there_is_none(target: str, version: str) -> None:
    with pytest.raises(RequirementError, match="has no calibrator: it reads INT8 from Q/DQ"):
        limits.check(target, version, BuildOptions(calibration=CALIBRATION))
    limits.check("tensorrt", "8.5.3.1", BuildOptions(calibration=CALIBRATION))
    limits.check("tensorrt", "10.16.1", BuildOptions(calibration=CALIBRATION))


def test_precision_is_in_flags_where_networks_are_not_strongly_typed() -> None:
    flags = limits.has_precision_flags
    assert flags("tensorrt", release("8.6.1"), BuildOptions())
    assert not flags("tensorrt", release("10.16"), BuildOptions())
    assert flags("tensorrt", release("10.16"), BuildOptions(calibration=CALIBRATION))
    assert not flags(RTX, release("1.7"), BuildOptions())


def test_formats_are_written_as_trtexec_does() -> None:
    assert network.parse_io_formats([("x", "fp16:hwc8"), ("y", "INT8:CHW32")]) == {
        "x": ("fp16", "hwc8"),
        "y": ("int8", "chw32"),
    }
    for wrong in ("fp16", "fp16:nhwc", "half:chw", ""):
        with pytest.raises(UsageError, match="no DTYPE:FORMAT"):
            network.parse_io_formats([("x", wrong)])


def test_the_workspace_is_clamped_to_what_is_free() -> None:
    assert clamped_workspace(None, 1) == (None, ())
    assert clamped_workspace(2, None) == (2, ())
    assert clamped_workspace(1 << 30, 1 << 31) == (1 << 30, ())
    size, (said,) = clamped_workspace(1 << 40, 1 << 30)
    assert size == 1 << 30
    assert "1024.0 GiB is more than is free on the GPU: 1.0 GiB" in said


def test_a_plugin_library_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    from gpuopt.errors import BuildError

    broken = tmp_path / "broken.so"
    with pytest.raises(BuildError, match=r"broken\.so does not exist"):
        network.load_plugins(release("8.5"), [broken])
    broken.write_bytes(b"no library")
    with pytest.raises(BuildError, match=r"broken\.so cannot be loaded"):
        network.load_plugins(release("8.5"), [broken])
