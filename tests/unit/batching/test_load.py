"""Loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpuopt.batching import load
from gpuopt.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("distribution", "burstiness", "variation"), [(None, None, 1.0), ("uniform", None, 0.0), ("bursty", 2.5, 2.5)]
)
def test_rate_and_variation_of_the_gaps(distribution: str | None, burstiness: float | None, variation: float) -> None:
    made = load.make(50.0, distribution, burstiness, None)
    gaps = np.diff(made.arrivals(200.0, 200_000))
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, abs=0.05)
    assert made.burstiness == variation


def test_other_rates_are_the_same_gaps_stretched() -> None:
    made = load.make(50.0, None, None, None)
    np.testing.assert_allclose(made.arrivals(10.0, 100), made.arrivals(1.0, 100) / 10)


def test_a_trace_keeps_its_gaps(tmp_path: Path) -> None:
    times = np.cumsum(np.random.default_rng(0).exponential(0.02, 500)) + 1000
    path = tmp_path / "trace.csv"
    path.write_text("seconds,who\n" + "\n".join(f"{time:.9f},x" for time in times))
    found = load.make(None, None, None, path)
    assert (found.distribution, found.length) == ("trace", 500)
    assert found.rate == pytest.approx(499 / (times[-1] - times[0]), rel=1e-6)
    np.testing.assert_allclose(np.diff(found.arrivals(found.rate, 500)), np.diff(times), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1\n2\n", "has 2 arrivals"),
        ("\n".join(["1", "x", *map(str, range(200))]), "line 2"),
        ("\n".join(map(str, range(200, 0, -1))), "do not ascend"),
        ("\n".join(["1"] * 200), "at once"),
        ("\n".join([*map(str, range(200)), "nan"]), "do not ascend"),
        ("\n".join([*map(str, range(200)), 200_000 * "1"]), "is no CSV"),
    ],
)
def test_a_trace_that_is_none(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=told):
        load.read_trace(path)


@pytest.mark.parametrize(
    "flags",
    [
        (None, None, None, None),
        (5.0, None, None, Path("t")),
        (5.0, "poisson", 2.0, None),
        (None, "uniform", None, None),
    ],
)
def test_flags_that_contradict_each_other(flags: tuple[float | None, str | None, float | None, Path | None]) -> None:
    with pytest.raises(UsageError):
        load.make(*flags)
