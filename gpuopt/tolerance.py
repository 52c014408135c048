"""When an output is near enough, as rules over figures: without numpy, so that reports can be judged by them, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NEGLIGIBLE_ERROR = 1e-6
"""An absolute error that counts as none: outputs that ought to be zero have no meaningful ratio."""
DROP_ROUNDING = 1e-9
"""Rounding of the last digits of a metric is no drop of it."""


@dataclass(frozen=True)
class Limits:
    """What an output has to reach.

    Attributes:
        min_cosine: cosine similarity; blind to a wrong scale.
        min_sqnr_db: 10 log10(signal power / error power); sees scale and offset.
        min_agreement: share of equal values of outputs that are not floating point.
    """

    min_cosine: float
    min_sqnr_db: float
    min_agreement: float


def has_ratio(figures: Mapping[str, Any]) -> bool:
    """Whether cosine and SQNR of an output mean anything: it is of floats, of the right shape, finite and not exact."""
    error = figures["max_abs_error"]
    return bool(figures["shape_equal"] and figures["finite"] and error is not None and error > NEGLIGIBLE_ERROR)


def written(value: float) -> str:
    """A figure or limit without a unit: nine digits, and as many as there are of one that is just below or above 1."""
    return f"{value:.15g}" if 0 < abs(1 - value) < 1e-6 else f"{value:.9g}"


def problem(figures: Mapping[str, Any], limits: Limits) -> str:
    """Which limit the figures of `comparison.compare` miss, in words; empty if none."""
    if not figures["shape_equal"]:
        return f"has the shape {tuple(figures['shape'])}, the reference another"
    if not figures["finite"]:
        return "has NaN or infinity where the reference has other values"
    agreement, cosine, sqnr = figures["agreement"], figures["cosine"], figures["sqnr_db"]
    if agreement is not None:
        return f"only {agreement:.1%} of the values agree" if agreement < limits.min_agreement else ""
    if not has_ratio(figures):
        return ""
    if cosine is not None and cosine < limits.min_cosine:
        return f"cosine {written(cosine)} is below {written(limits.min_cosine)}"
    if sqnr is None or sqnr < limits.min_sqnr_db:
        shown = "undefined" if sqnr is None else f"{sqnr:.1f} dB"
        return f"SQNR {shown} is below {limits.min_sqnr_db:g} dB"
    return ""
