"""Percentiles with intervals, the end of warm-up, ratios of paired rounds."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.bench.statistics import is_steady, paired_ratio, summarize

TIMES = st.lists(st.floats(0.001, 1000, allow_nan=False), min_size=1, max_size=300)


@given(TIMES)
def test_percentiles_are_in_order_and_inside_their_intervals(times: list[float]) -> None:
    found = summarize(times)
    values = [found.percentiles[p].value for p in (50, 90, 95, 99)]
    assert values == sorted(values)
    assert found.minimum <= values[0]
    assert values[-1] <= found.maximum
    for percentile in found.percentiles.values():
        if percentile.low is not None and percentile.high is not None:
            assert percentile.low <= percentile.value <= percentile.high


def test_an_interval_covers_the_true_median_19_times_of_20() -> None:
    generator = random.Random(1)
    hits = 0
    for _ in range(400):
        median = summarize([generator.gauss(10, 2) for _ in range(101)]).percentiles[50]
        assert median.low is not None
        assert median.high is not None
        hits += median.low <= 10 <= median.high
    assert 0.92 <= hits / 400 <= 0.99


def test_few_timings_have_no_interval() -> None:
    assert summarize([1.0, 2.0, 3.0]).percentiles[99].low is None


def test_outliers_are_kept() -> None:
    found = summarize([1.0] * 99 + [50.0])
    assert found.maximum == 50.0
    assert found.mean == pytest.approx(1.49)


def test_warm_up_ends_where_two_windows_agree() -> None:
    falling = [10 - index * 0.1 for index in range(60)]
    assert not is_steady(falling)
    assert is_steady([*falling, *[4.0] * 40])
    assert not is_steady([4.0] * 39)


def test_paired_rounds_see_a_difference_that_drift_would_hide() -> None:
    generator = random.Random(2)
    drift = [1 + 0.2 * index / 30 for index in range(30)]
    ours = [d * 1.03 * generator.gauss(1, 0.005) for d in drift]
    theirs = [d * generator.gauss(1, 0.005) for d in drift]
    found = paired_ratio(ours, theirs)
    assert found.low > 1
    assert found.is_beyond_noise
    assert found.low <= 1.03 <= found.high
    same = paired_ratio(theirs, [d * generator.gauss(1, 0.005) for d in drift])
    assert not same.is_beyond_noise or abs(same.value - 1) < 0.005
    assert found.value == statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("rounds", "loads"), [(5, 3), (2, 3), (0, 1)])
def test_rounds_that_are_not_equally_many_a_load_have_no_ratio(rounds: int, loads: int) -> None:
    with pytest.raises(ValueError, match=f"{rounds} rounds of {loads} loads"):
        paired_ratio([1.0] * rounds, [1.0] * rounds, loads)
