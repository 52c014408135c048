"""The time limit of a command: it ends waiting, is lifted for the result, and is told to the builder."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

import pytest

from gpuopt import time_limit
from gpuopt.errors import TimeLimitError, UsageError
from gpuopt.request import duration


def test_waiting_ends_when_the_time_is_up() -> None:
    started = time.monotonic()
    with pytest.raises(TimeLimitError, match=r"0\.2 s"), time_limit.within(0.2):
        time.sleep(20)
    assert time.monotonic() - started < 5
    assert time_limit.ends() is None
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_the_hint_says_whether_anything_is_kept() -> None:
    for resumes, words in ((True, "is in the cache"), (False, "--no-cache")):
        with pytest.raises(TimeLimitError) as caught, time_limit.within(0.05, resumes):
            time.sleep(20)
        assert words in caught.value.hint
        assert ("goes on from there" in caught.value.hint) == resumes


def test_an_error_that_something_caught_is_raised_again() -> None:
    def caught_once() -> None:
        with contextlib.suppress(TimeLimitError):
            time.sleep(20)
        # The interval is seconds; the test does not wait for it.
        assert signal.getitimer(signal.ITIMER_REAL)[1] > 0
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        time.sleep(20)

    with pytest.raises(TimeLimitError), time_limit.within(0.1):
        caught_once()


def test_a_lifted_limit_is_none_any_more() -> None:
    with time_limit.within(0.2):
        assert time_limit.ends() is not None
        time_limit.lift()
        time.sleep(0.4)
    with time_limit.within(None):
        assert time_limit.ends() is None


def test_a_timer_of_somebody_else_is_left_alone() -> None:
    signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        time_limit.lift()
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 90
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), (" 3s ", 3), (None, None)]
)
def test_durations(text: str | None, seconds: float | None) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "1d", "s", "1e9", "nan", "inf", "9" * 20, "٣s", "999999999h"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="is not a time"):
        duration(text)


def test_tensorrt_s_builder_is_stopped_by_its_progress_monitor(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX, which has a progress monitor and builds anywhere")
    from gpuopt import onnx_model
    from gpuopt.backends.tensorrt import builder
    from gpuopt.backends.tensorrt.options import BuildOptions
    from gpuopt.progress import Silent
    from gpuopt.shapes import ShapeRange
    from tests.unit.quantization.graphs import depthwise_block

    path = onnx_model.save(depthwise_block(), tmp_path)
    profile = {"x": ShapeRange((1, 16, 8, 8), (4, 16, 8, 8), (8, 16, 8, 8))}
    options = BuildOptions(precision="fp32")
    with pytest.raises(TimeLimitError):
        builder.build("tensorrt-rtx", path, (profile,), options, Silent(), time.monotonic() - 1)
    assert builder.build("tensorrt-rtx", path, (profile,), options, Silent(), time.monotonic() + 600).plan
