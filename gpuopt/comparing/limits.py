"""How much worse a release may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gpuopt.errors import UsageError

DEFAULTS: Mapping[str, float] = {
    "--max-p50-regress": 0.05,
    "--max-p90-regress": 0.05,
    "--max-p95-regress": 0.05,
    "--max-p99-regress": 0.05,
    "--max-throughput-regress": 0.05,
    "--max-size-regress": 0.10,
    "--max-memory-regress": 0.10,
    "--max-sqnr-drop": 1.0,
    "--max-accuracy-drop": 0.0,
}


@dataclass(frozen=True)
class Limits:
    """By flag.

    Attributes:
        values: what is allowed.
        demanded: flags that were given: what cannot be checked of them is not passed.
    """

    values: Mapping[str, float]
    demanded: frozenset[str]


def read(given: Mapping[str, str | float | None]) -> Limits:
    """The defaults, and over them what was given; None: not given.

    Raises:
        UsageError: a value is no share, or negative.
    """
    found = {flag: _value(flag, text) for flag, text in given.items() if text is not None}
    return Limits({**DEFAULTS, **found}, frozenset(found))


def _value(flag: str, text: str | float) -> float:
    digits = str(text).strip()
    try:
        value = float(digits.removesuffix("%")) / (100 if digits.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        wanted = "in dB, as 1.5" if flag == "--max-sqnr-drop" else "as 5% or 0.05"
        raise UsageError(f"{flag} {text}: write how much is allowed {wanted}", "It is zero or more.")
    return value
