"""Range collectors: exact properties of the histogram, and the quality of the thresholds."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpuopt.calibration.collectors import METHODS, RangeCollector, TensorRange
from gpuopt.errors import DataError, UsageError

BINS = 256

anything = hnp.arrays(
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.integers(1, 200),
    elements=st.one_of(
        st.just(0.0),
        st.sampled_from([1.0, -1.0, 0.5, 2.0, -4.0, 0.015625]),
        st.floats(-60000, 60000, width=16),
    ),
)
extreme = st.lists(
    st.one_of(
        st.just(-0.0),
        st.floats(allow_nan=False, allow_infinity=False, width=32),
        st.sampled_from([1e-45, -1e-45, 1e-40, 3.4028235e38, -1.0]),
    ),
    min_size=1,
    max_size=60,
)


def collect(method: str, *batches: np.ndarray, **options: float) -> TensorRange:
    collector = RangeCollector(method, bins=BINS, **options)
    for batch in batches:
        collector.update("x", batch)
    return collector.ranges()["x"]


def quantization_error(values: np.ndarray, amax: float) -> float:
    step = amax / 127
    codes = np.clip(np.round(values / step), -127, 127)
    return float(np.mean((values - codes * step) ** 2))


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=60)
@given(values=anything, data=st.data())
def test_range_does_not_depend_on_order_or_batches(method, values, data):
    whole = collect(method, values)
    order = data.draw(st.permutations(range(values.size)))
    cuts = sorted(data.draw(st.lists(st.integers(0, values.size), max_size=6)))
    shuffled = values[list(order)]
    pieces = [shuffled[a:b] for a, b in pairwise([0, *cuts, values.size])]
    again = collect(method, *pieces)
    assert again == whole
    assert math.copysign(1, again.low) == math.copysign(1, whole.low)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=60)
@given(values=extreme, dtype=st.sampled_from([np.float32, np.float64]), data=st.data())
def test_order_independence_holds_for_denormal_and_huge_values(method, values, dtype, data):
    order = data.draw(st.permutations(values))
    singles = [np.array([v], dtype) for v in order]
    whole = collect(method, np.array(values, dtype))
    assert collect(method, *singles) == whole
    assert np.isfinite(whole.amax)
    assert (whole.amax > 0) == bool(np.any(np.array(values, dtype) != 0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("peak", [5e-324, 1e-310, 2.2e-308, 1.7976931348623157e308])
def test_float64_limits(method, peak):
    values = np.array([0.0, peak / 4, -peak / 2, peak])
    result = collect(method, values, percentile=100)
    assert 0 < result.amax <= peak
    assert collect(method, *(values[i : i + 1] for i in (3, 1, 0, 2)), percentile=100) == result


@settings(deadline=None)
@given(values=anything)
def test_minmax_is_exact(values):
    result = collect("minmax", values[::2], values[1::2])
    assert (result.low, result.high) == (float(values.min()), float(values.max()))
    assert result.amax == float(np.abs(values.astype(np.float64)).max())


@settings(deadline=None, max_examples=200)
@given(values=anything, percentile=st.one_of(st.integers(1, 100), st.floats(0.01, 100)))
def test_percentile_is_within_one_bin_above_the_exact_value(values, percentile):
    magnitudes = np.sort(np.abs(values.astype(np.float64)))
    rank = math.ceil(Fraction(str(percentile)) * values.size / 100)
    exact, peak = magnitudes[rank - 1], magnitudes[-1]
    result = collect("percentile", values, percentile=percentile)
    assert result.low == -result.high
    if exact == 0:
        assert result.amax == peak
    else:
        assert exact <= result.amax <= min(peak, exact + peak / (2 * BINS))


def test_percentile_agrees_with_numpy():
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    exact = np.quantile(np.abs(values), 0.999, method="inverted_cdf")
    result = collect("percentile", values, percentile=99.9)
    assert 0 <= result.amax - exact <= np.abs(values).max() / (2 * BINS)


def test_percentile_rank_is_computed_without_rounding():
    values = np.ones(10_000, np.float32)
    values[-1] = 100
    assert collect("percentile", values, percentile=99.99).amax < 2
    values[-2] = 100
    assert collect("percentile", values, percentile=99.99).amax == 100


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_the_number_of_updates(method):
    collector = RangeCollector(method)
    generator = np.random.default_rng(0)
    collector.update("x", generator.normal(size=100).astype(np.float32))
    held = collector.nbytes
    for scale in (1e-3, 1, 1e9, 1e-9):
        for _ in range(20):
            collector.update("x", scale * generator.normal(size=(3, 1000)))
    assert collector.nbytes == held


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("values", "amax"),
    [([0.0, 0.0], 0.0), ([3.0] * 7, 3.0), ([-0.7], 0.7), ([0.0, 0.0, 5.0], 5.0), ([2.0, -2.0], 2.0)],
)
def test_degenerate_tensors(method, values, amax):
    result = collect(method, np.array(values))
    # One bin is what mse may lose to a value that it knows only to lie somewhere inside its bin.
    assert amax * (1 - 1 / BINS) <= result.amax <= amax


@pytest.mark.parametrize("method", METHODS)
def test_empty_updates(method):
    collector = RangeCollector(method)
    collector.update("x", np.zeros((0, 3), np.float32))
    assert collector.ranges() == {}
    collector.update("x", np.ones((2, 3), np.float32))
    collector.update("x", np.zeros((4, 0), np.float32))
    assert collector.ranges()["x"].amax == 1


@pytest.mark.parametrize("method", METHODS)
def test_memory_order_and_large_arrays(method):
    values = np.random.default_rng(1).normal(size=(7, 300, 101)).astype(np.float32)
    whole = collect(method, values)
    assert collect(method, values.transpose(2, 0, 1)) == whole
    assert collect(method, values[:, ::2], values[:, 1::2]) == whole
    assert collect(method, values.astype(">f4")) == whole
    assert collect(method, np.float32(values.flat[0]) * np.ones(()), values) == whole


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused_by_name(bad):
    collector = RangeCollector("entropy")
    with pytest.raises(DataError, match=r"tensor 'conv/out' holds NaN or infinite values"):
        collector.update("conv/out", np.array([0, 1, bad, 2], np.float32))


def test_integer_tensors_are_refused():
    with pytest.raises(DataError, match="tensor 'ids' has dtype int64"):
        RangeCollector("minmax").update("ids", np.arange(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "kl"}, "'kl' is not a calibration method"),
        ({"method": "percentile", "percentile": 0}, "percentile of 0 is out of range"),
        ({"method": "percentile", "percentile": 100.5}, "percentile of 100.5 is out of range"),
        ({"method": "mse", "bins": 1000}, "1000 histogram bins cannot be folded"),
        ({"method": "mse", "bins": 64}, "64 histogram bins cannot be folded"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(UsageError, match=message):
        RangeCollector(**arguments)


def test_entropy_clips_outliers():
    generator = np.random.default_rng(2)
    values = np.concatenate([generator.laplace(size=200_000), [60.0, -45.0]]).astype(np.float32)
    collector = RangeCollector("entropy")
    collector.update("x", values)
    assert np.quantile(np.abs(values), 0.99) < collector.ranges()["x"].amax < 25


def test_entropy_keeps_a_uniform_distribution_whole():
    values = np.random.default_rng(3).uniform(-1, 1, 300_000).astype(np.float32)
    collector = RangeCollector("entropy")
    collector.update("x", values)
    assert collector.ranges()["x"].amax > 0.97


def test_entropy_agrees_with_the_definition():
    """The running totals give what the talk's procedure, written as loops, gives."""
    generator = np.random.default_rng(4)
    values = np.abs(generator.standard_t(4, size=20_000))
    edge = 2.0 ** math.frexp(values.max())[1]
    counts = np.histogram(values, bins=2 * BINS, range=(0, edge))[0].astype(float)
    used = int(np.flatnonzero(counts)[-1]) + 1
    best = (math.inf, 0)
    for i in range(128, used + 1):
        if not counts[i - 1]:
            continue
        p = counts[:i].copy()
        p[-1] += counts[i:].sum()
        q = np.zeros(i)
        levels = np.arange(i) * 128 // i
        for level in range(128):
            inside = (levels == level) & (counts[:i] > 0)
            if inside.any():
                q[inside] = counts[:i][inside].mean()
        p, q = p / p.sum(), q / q.sum()
        best = min(best, (float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))), i))
    expected = min(best[1] * edge / (2 * BINS), float(values.max()))
    assert collect("entropy", values).amax == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: g.normal(size=50_000),
        lambda g: np.maximum(g.normal(size=50_000), 0),
        lambda g: g.laplace(size=50_000),
        lambda g: g.standard_t(3, size=50_000),
        lambda g: g.uniform(-1, 1, 50_000),
        lambda g: np.append(g.normal(size=50_000), 50.0),
        lambda g: g.exponential(size=50_000) ** 2,
    ],
)
def test_mse_is_close_to_brute_force(draw):
    values = draw(np.random.default_rng(5))
    collector = RangeCollector("mse")
    collector.update("x", values)
    found = quantization_error(values, collector.ranges()["x"].amax)
    peak = np.abs(values).max()
    best = min(quantization_error(values, t) for t in np.linspace(peak / 100, peak, 200))
    assert found <= 1.03 * best


@settings(deadline=None, max_examples=50)
@given(
    values=hnp.arrays(np.float64, st.integers(2, 300), elements=st.floats(-100, 100, allow_subnormal=False, width=32))
)
def test_thresholds_never_exceed_the_largest_value(values):
    peak = np.abs(values).max()
    assume(peak > 0)
    for method in METHODS[1:]:
        result = collect(method, values)
        assert 0 < result.high <= peak
        assert result.low == -result.high


# A share of the values ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["entropy", "mse"])
@pytest.mark.parametrize("draw", ["normal", "laplace", "relu"])
def test_a_share_gives_nearly_the_range_of_all(method: str, draw: str) -> None:
    generator = np.random.default_rng(5)
    make = {
        "normal": lambda: generator.standard_normal((1, 60_000)),
        "laplace": lambda: generator.laplace(size=(1, 60_000)),
        "relu": lambda: np.maximum(generator.standard_normal((1, 60_000)), 0),
    }[draw]
    whole, share = RangeCollector(method), RangeCollector(method, values_per_slice=12_000)
    for _ in range(40):
        values = make().astype(np.float32)
        assert whole.update("x", values) == share.update("x", values) == float(np.abs(values).max())
    assert share.ranges()["x"].amax == pytest.approx(whole.ranges()["x"].amax, rel=0.1)


@pytest.mark.parametrize("method", ["entropy", "mse"])
def test_the_estimated_distribution_keeps_to_its_bound(method: str) -> None:
    """Dvoretzky-Kiefer-Wolfowitz: with 1 - 1e-9 certainty no rank is off by more than e."""
    generator = np.random.default_rng(1)
    share, whole = RangeCollector(method, values_per_slice=5_000), RangeCollector(method)
    for _ in range(20):
        values = generator.gamma(0.7, size=(1, 49_999)).astype(np.float32)
        share.update("x", values)
        whole.update("x", values)
    counted, total = share._tensors["x"].histogram, whole._tensors["x"].histogram
    assert counted is not None
    assert total is not None
    assert counted.sum() < total.sum() / 5
    bound = math.sqrt(math.log(2 / 1e-9) / (2 * counted.sum()))
    error = np.abs(np.cumsum(counted) / counted.sum() - np.cumsum(total) / total.sum()).max()
    assert error <= bound


def test_the_extreme_is_kept_where_it_was_not_counted() -> None:
    values = np.full((1, 10_000), 0.01, np.float32)
    values[0, 1] = 100.0
    collector = RangeCollector("percentile", 100.0)
    collector.update("x", values)
    assert collector.ranges()["x"].amax == 100.0
    for method in ("entropy", "mse"):
        shared = RangeCollector(method, values_per_slice=10)
        assert shared.update("x", values) == 100.0
        assert 0.01 <= shared.ranges()["x"].amax <= 100.0
