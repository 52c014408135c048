"""What many timings of one thing say, with the uncertainty of each figure."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

PERCENTILES = (50, 90, 95, 99)
_Z95 = 1.959964
_WINDOW = 20
_SETTLED = 0.02
_DRAWS = 500
_FEWEST = 20
_FEWEST_BEYOND = 5


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
    """How many times as long one thing takes as another, with its interval."""

    value: float
    low: float
    high: float

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the interval leaves out 1."""
        return self.low > 1 or self.high < 1


def by_load(rounds: Sequence[float], loads: int) -> list[Sequence[float]]:
    """Rounds that lie one load's behind the other's, a sequence a load.

    Raises:
        ValueError: there are none, or not equally many a load.
    """
    size, rest = divmod(len(rounds), loads)
    if not rounds or rest:
        raise ValueError(f"{len(rounds)} rounds of {loads} loads")
    return [rounds[start : start + size] for start in range(0, len(rounds), size)]


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], loads: int = 1, seed: int = 0) -> Ratio:
    """Median of the ratios ours / theirs of rounds that were measured in turn, which cancels slow drifts of clocks.

    The interval is a percentile bootstrap over the rounds (B. Efron, R. Tibshirani, An Introduction to the Bootstrap,
    chapter 13), 2000 draws; it is a 95 % interval. Rounds of one load have in common where it lies in memory, so that
    loads are drawn first and then rounds of each (A. C. Davison, D. V. Hinkley, Bootstrap Methods and their
    Application, section 3.8). Of few loads that promises too much: with five, two equal engines whose loads differ
    by far more than their rounds are told apart in 8 races of 100, with three in 25 (by simulation).

    Args:
        loads: so many blocks of equally many rounds, one behind the other.

    Raises:
        ValueError: the rounds are not equally many a load.
    """
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    blocks = by_load(ratios, loads)
    generator = random.Random(seed)  # noqa: S311 - statistics, not secrets

    def draw() -> float:
        taken = generator.choices(blocks, k=loads)
        return statistics.median(ratio for block in taken for ratio in generator.choices(block, k=len(block)))

    draws = sorted(draw() for _ in range(2000))
    return Ratio(statistics.median(ratios), draws[50], draws[1949])


def fewest_timings(percent: int) -> int:
    """Timings that a percentile needs before its spread can be told: five beyond it, twenty in all."""
    return max(_FEWEST, math.ceil(_FEWEST_BEYOND * 100 / (100 - percent)))


def percentile_ratios(
    ours: Sequence[float], theirs: Sequence[float], percents: Sequence[int] = PERCENTILES, seed: int = 0
) -> dict[int, Ratio]:
    """Percentiles of our timings over the same of theirs: two runs, each in order, apart in time.

    The interval is a bootstrap of overlapping blocks of contiguous timings, wrapped round at the end (H. R. Kuensch,
    The jackknife and the bootstrap for general stationary observations, Annals of Statistics 17, 1989; D. N. Politis,
    J. P. Romano, A circular block-resampling procedure for stationary data, 1992), 500 draws of each side: blocks keep
    what neighbours have in common, clocks that drift and bursts of slow inferences. A block has sqrt(n) timings. The
    ends are the 5 % and 95 % points, so that each is a bound which holds 19 times of 20.

    It knows the spread within two runs. What differs from run to run (a clock that settles elsewhere, other placement
    in memory) is in neither, and has to fit into what is allowed.

    Args:
        percents: those with fewer timings than `fewest_timings` on a side are left out.

    Returns:
        By percentile.
    """
    import numpy as np

    enough = [percent for percent in percents if min(len(ours), len(theirs)) >= fewest_timings(percent)]
    if not enough:
        return {}
    values, others = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    mine = _resampled_percentiles(values, enough, np.random.default_rng((seed, 0)))
    their = _resampled_percentiles(others, enough, np.random.default_rng((seed, 1)))
    ratios = {}
    for percent in enough:
        low, high = np.quantile(mine[percent] / their[percent], (0.05, 0.95))
        value = _nearest_rank(sorted(ours), percent) / _nearest_rank(sorted(theirs), percent)
        ratios[percent] = Ratio(value, float(low), float(high))
    return ratios


def _nearest_rank(ordered: Sequence[float], percent: int) -> float:
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def _resampled_percentiles(
    values: npt.NDArray[Any], percents: Sequence[int], generator: Any
) -> dict[int, npt.NDArray[Any]]:
    """Percentiles of each draw. No draw is written out: it is how often each timing occurs in it."""
    import numpy as np

    count = len(values)
    length = max(1, round(math.sqrt(count)))
    blocks = math.ceil(count / length)
    starts = generator.integers(0, count, (blocks, _DRAWS))
    falling = np.argsort(-values, kind="stable")
    drawn = blocks * length
    found = {}
    for percent in percents:
        # The percentile is so many timings below the largest one, and seldom far from there in a draw.
        rank = drawn - math.ceil(percent / 100 * drawn) + 1
        for width in (min(count, 4 * rank), count):
            top = falling[:width]
            # By the block's first timing: how many of the largest, second largest, ... timings are in the block.
            inside = np.zeros((count, width), np.int16)
            inside[(top - np.arange(length)[:, None]) % count, np.arange(width)] = 1
            np.cumsum(inside, axis=1, out=inside)
            above = np.zeros((_DRAWS, width), np.int32)
            for block in starts:
                above += inside[block]
            if above[:, -1].min() >= rank:
                break
        found[percent] = values[top[np.argmax(above >= rank, axis=1)]]
    return found
