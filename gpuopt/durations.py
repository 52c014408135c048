"""Durations as users write them: 100ms, 500us, 1.5s."""

from __future__ import annotations

import re

from gpuopt.errors import UsageError

_MICROSECONDS = {"us": 1.0, "ms": 1e3, "s": 1e6}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)")


def microseconds(text: str, flag: str) -> int:
    """Parse a duration.

    Raises:
        UsageError: it has no number or no unit.
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{flag} '{text}' is no duration", "Write a number with its unit, as 500us, 100ms or 1.5s.")
    return round(float(found[1]) * _MICROSECONDS[found[2]])


def written(duration: float) -> str:
    """Microseconds in the largest unit that leaves a number of at least 1: `100 ms`, `1.5 s`, `20 us`."""
    for unit in ("s", "ms"):
        if duration >= _MICROSECONDS[unit]:
            return f"{duration / _MICROSECONDS[unit]:.4g} {unit}"
    return f"{duration:.4g} us"


def digits(number: float, most: int) -> str:
    """A number with at most so many digits; a large one with all before its point instead of an exponent."""
    text = f"{number:.{most}g}"
    return f"{number:.0f}" if "e+" in text else text
