"""What many timings of one thing say, with the uncertainty of each figure."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

PERCENTILES = (50, 90, 95, 99)
_Z95 = 1.959964
_WINDOW = 20
_SETTLED = 0.02


@dataclass(frozen=True)
class Percentile:
    """A percentile of latency with its 95 % confidence interval, milliseconds.

    Attributes:
        low, high: None where there are too few timings for an interval.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Summary:
    """Timings of one thing, milliseconds.

    Attributes:
        count: timings, outliers among them.
        percentiles: p50, p90, p95, p99 by their number.
    """

    count: int
    mean: float
    minimum: float
    maximum: float
    percentiles: dict[int, Percentile]


def summarize(milliseconds: Sequence[float]) -> Summary:
    """Mean, extremes and percentiles.

    The intervals are those of order statistics: the q-quantile of n independent timings lies between the j-th and
    k-th smallest, j and k being the 2.5 % and 97.5 % points of a binomial distribution B(n, q), in its normal
    approximation (J.-Y. Le Boudec, Performance Evaluation of Computer and Communication Systems, section 2.2).
    """
    ordered = sorted(milliseconds)
    percentiles = {percent: _percentile(ordered, percent / 100) for percent in PERCENTILES}
    return Summary(len(ordered), statistics.fmean(ordered), ordered[0], ordered[-1], percentiles)


def _percentile(ordered: Sequence[float], quantile: float) -> Percentile:
    count = len(ordered)
    value = ordered[min(count - 1, max(0, math.ceil(quantile * count) - 1))]
    spread = _Z95 * math.sqrt(count * quantile * (1 - quantile))
    low, high = math.floor(count * quantile - spread), math.ceil(count * quantile + spread) + 1
    inside = low >= 1 and high <= count
    return Percentile(value, ordered[low - 1] if inside else None, ordered[high - 1] if inside else None)


def is_steady(milliseconds: Sequence[float], window: int = 0) -> bool:
    """Whether warm-up is over: the medians of the last two windows of timings differ by at most 2 %.

    Args:
        window: timings in one; 20 at least.
    """
    window = max(window, _WINDOW)
    if len(milliseconds) < 2 * window:
        return False
    before = statistics.median(milliseconds[-2 * window : -window])
    after = statistics.median(milliseconds[-window:])
    return abs(after - before) <= _SETTLED * max(before, 1e-9)


@dataclass(frozen=True)
class Ratio:
    """How many times as long one thing takes as another, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the interval leaves out 1."""
        return self.low > 1 or self.high < 1


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Ratio:
    """Median of the ratios ours / theirs of rounds that were measured in turn, which cancels slow drifts of clocks.

    The interval is a percentile bootstrap over the rounds (B. Efron, R. Tibshirani, An Introduction to the Bootstrap,
    chapter 13), 2000 draws.
    """
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    generator = random.Random(seed)  # noqa: S311 - statistics, not secrets
    draws = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(2000))
    return Ratio(statistics.median(ratios), draws[50], draws[1949])
