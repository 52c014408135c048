"""From the command line's words to a request."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gpuopt.batching import load
from gpuopt.batching.command import Request
from gpuopt.batching.plan import Fixed, Target
from gpuopt.durations import microseconds
from gpuopt.errors import UsageError
from gpuopt.request import sizes

_TARGET = re.compile(r"p?(\d{1,2}(?:\.\d+)?)=(.+)")


@dataclass(frozen=True)
class Load:
    """The flags of the load; None: not given."""

    rate: float | None = None
    distribution: str | None = None
    burstiness: float | None = None
    trace: Path | None = None


@dataclass(frozen=True)
class Goal:
    """The flags of what has to hold, and beside what."""

    target: str
    max_drop: str = "0"
    overhead: str | None = None
    against: Path | None = None


@dataclass(frozen=True)
class Settings:
    """The flags of settings that the search leaves alone; None: it chooses."""

    instances: int | None = None
    max_batch_size: int | None = None
    preferred_batch_size: str | None = None
    max_queue_delay: str | None = None
    preserve_ordering: bool = False
    max_queue_size: int | None = None
    queue_timeout: str | None = None


def request(latencies: Path, load_flags: Load, goal: Goal, settings: Settings) -> Request:
    """A request from the flags.

    Raises:
        UsageError: one cannot be read, or two contradict each other.
        DataError, StorageError: the trace cannot be read.
    """
    preferred = settings.preferred_batch_size
    return Request(
        latencies=latencies,
        load=load.make(load_flags.rate, load_flags.distribution, load_flags.burstiness, load_flags.trace),
        target=target(goal.target, goal.max_drop),
        fixed=Fixed(
            max_batch_size=settings.max_batch_size,
            preferred_batch_size=sizes(preferred) if preferred is not None else None,
            max_queue_delay_microseconds=_duration(settings.max_queue_delay, "--max-queue-delay"),
            instances=settings.instances,
            preserve_ordering=settings.preserve_ordering,
            max_queue_size=settings.max_queue_size,
            queue_timeout_microseconds=_duration(settings.queue_timeout, "--queue-timeout"),
        ),
        against=goal.against,
        constant_ms=(_duration(goal.overhead, "--overhead") or 0) / 1000,
    )


def target(text: str, max_drop: str) -> Target:
    """Parse `p99=20ms` and a share.

    Raises:
        UsageError: one is none.
    """
    found = _TARGET.fullmatch(text.strip().lower())
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"--target '{text}' is no percentile and time", "Write it as p99=20ms.")
    limit = microseconds(found[2], "--target")
    if limit <= 0:
        raise UsageError(f"--target '{text}': nothing takes no time", "Write it as p99=20ms.")
    return Target(float(found[1]), limit * 1e-6, _share(max_drop))


def _share(text: str) -> float:
    digits = text.strip()
    try:
        value = float(digits.removesuffix("%")) / (100 if digits.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise UsageError(f"--max-drop '{text}' is no share", "Write it as 0.1% or 0.001.")
    return value


def _duration(text: str | None, flag: str) -> int | None:
    return None if text is None else microseconds(text, flag)
