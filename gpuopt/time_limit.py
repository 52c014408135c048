"""The time that a command may take: `--timeout`.

When it is up, the main thread of the command raises `TimeLimitError`, wherever it is; the worker process is ended with
the stage in it, and what was half-written goes with its scratch folder. TensorRT's builder, which lets itself be
stopped from release 10 on, is told the same end beforehand, so that it can keep what it has timed.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from gpuopt.errors import TimeLimitError

_ends: float | None = None
_resumes = True


@contextlib.contextmanager
def within(seconds: float | None, resumes: bool = True) -> Iterator[None]:
    """Let a command take so many seconds; None: as many as it needs. Of the main thread, and not nested.

    Args:
        resumes: whether what is finished is kept for the next run.

    Raises:
        TimeLimitError: they are up.
    """
    global _ends, _resumes
    if seconds is None:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise error_after(seconds)

    before = signal.signal(signal.SIGALRM, stop)
    _ends = time.monotonic() + seconds
    _resumes = resumes
    # Again and again: a library may catch the first one.
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    finally:
        lift()
        signal.signal(signal.SIGALRM, before)


def lift() -> None:
    """Let the command end in peace: what it still does is to write its result, or that it has none."""
    global _ends
    if _ends is not None:
        _ends = None
        signal.setitimer(signal.ITIMER_REAL, 0)


def ends() -> float | None:
    """When the time is up, by `time.monotonic`, which is the same in every process; None: never."""
    return _ends


def error_after(seconds: float | None) -> TimeLimitError:
    """The error of a command that was given so many seconds."""
    limit = "" if seconds is None else f" of {seconds:g} s"
    hint = (
        "What is finished is in the cache: the same command goes on from there. Or give it more time."
        if _resumes
        else "Nothing of it is kept (--no-cache): give it more time, or use the cache, from which it goes on."
    )
    return TimeLimitError(f"the time limit{limit} (--timeout) is up", hint)
