"""Whether a comparison of p99 tells noise from a slowdown: 2000 timings a side, 5 % allowed, 10 % injected.

Each model of noise is one release's inferences, in order; no two have the same drift or outliers. What they share:

- the body is lognormal, sigma 2 to 5 % of the median: kernels, launches and the host's clock;
- slow drift by up to 2 % either way, over the whole run: clocks and temperature. As a random walk, a sine, a line with
  another slope for each side (so that the sides differ by up to 2 % at the end), or steps between two clocks;
- occasional outliers: one to two inferences of 1000, alone, take 1.5 to 5 times as long (interrupts, the scheduler).

Heavy tails of the body: Student's t with 4 degrees of freedom on the logarithm; or, in 5 % of the inferences, a delay
of a Pareto distribution with the exponent 3 and a mean of 2.5 %.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpuopt.bench.statistics import percentile_ratios

COUNT = 2000
PAIRS = 100
ALLOWED = 1.05
SLOWDOWN = 1.10
Generator = np.random.Generator
Array = np.ndarray[Any, np.dtype[np.float64]]


def lognormal(generator: Generator, sigma: float) -> Array:
    return np.exp(generator.normal(0, sigma, COUNT))


def student(generator: Generator, sigma: float) -> Array:
    return np.exp(np.clip(generator.standard_t(4, COUNT) * sigma, -0.3, None))


def walk(generator: Generator, most: float) -> Array:
    steps = np.cumsum(generator.normal(size=COUNT))
    steps -= steps.mean()
    return 1 + most * steps / np.abs(steps).max()


def sine(generator: Generator, most: float) -> Array:
    return 1 + most * np.sin(2 * np.pi * (generator.uniform(0.5, 2) * np.arange(COUNT) / COUNT + generator.uniform()))


def line(generator: Generator, most: float) -> Array:
    return 1 + most * generator.uniform(-1, 1) * np.arange(COUNT) / COUNT


def steps(generator: Generator, most: float) -> Array:
    return np.where(np.arange(COUNT) // generator.integers(100, 300) % 2, 1 + most, 1.0)


def delayed(generator: Generator, share: float, delays: Array) -> Array:
    return 1 + (generator.random(COUNT) < share) * delays


def with_outliers(generator: Generator, times: Array, share: float) -> Array:
    return times * np.where(generator.random(COUNT) < share, generator.uniform(1.5, 5, COUNT), 1)


def with_bursts(generator: Generator, times: Array, share: float) -> Array:
    """Five neighbours on average, all as late as each other."""
    found = times.copy()
    for start in generator.integers(0, COUNT, generator.poisson(share * COUNT / 5)):
        found[start : start + generator.geometric(1 / 5)] *= generator.uniform(1.3, 3)
    return found


MODELS: dict[str, Callable[[Generator], Array]] = {
    "lognormal 3 %, walk": lambda g: with_outliers(g, lognormal(g, 0.03) * walk(g, 0.02), 0.002),
    "lognormal 5 %, walk": lambda g: with_outliers(g, lognormal(g, 0.05) * walk(g, 0.02), 0.002),
    "lognormal 2 %, steps": lambda g: with_outliers(g, lognormal(g, 0.02) * steps(g, 0.02), 0.002),
    "Student 1.5 %, sine": lambda g: with_outliers(g, student(g, 0.015) * sine(g, 0.02), 0.001),
    "Pareto delays, line": lambda g: with_outliers(
        g, lognormal(g, 0.02) * delayed(g, 0.05, 0.05 * g.pareto(3, COUNT)) * line(g, 0.015), 0.001
    ),
}

# Here 10 % cannot be told from 5 % at p99 in 99 of 100: the p99 of 2000 timings itself is not known well enough. The
# margin between the two is 4.7 %; to be 95 % sure of it 99 times of 100, the ratio of two p99 of the same release may
# have a standard deviation of 1.2 %, about. Of 300 pairs these were caught, with that deviation:
#   outliers in 1 % of the inferences: p99 lies on the edge between body and outliers, and jumps: 14 %, 44 %;
#   bursts that hold up 0.5 % of them: in some runs 1 %, and p99 is in a burst there: 55 %, 29 %;
#   delays of 10 % on average (exponential) in 2 % of them: p99 is the median of 40 delays: 88 %, 1.3 %;
#   delays twice as long as above (Pareto) in 3 % of them: 95 %, 1.1 %.
# p99 stays quiet on noise there (outliers: 2 alarms in 300), and p90 catches the same slowdown.
BEYOND: dict[str, Callable[[Generator], Array]] = {
    "1 % outliers": lambda g: with_outliers(g, lognormal(g, 0.02) * walk(g, 0.02), 0.01),
    "bursts": lambda g: with_bursts(g, lognormal(g, 0.02) * walk(g, 0.02), 0.005),
    "2 % delays": lambda g: lognormal(g, 0.03) * delayed(g, 0.02, g.exponential(0.1, COUNT)) * walk(g, 0.02),
    "3 % delays": lambda g: with_outliers(
        g, lognormal(g, 0.02) * delayed(g, 0.03, 0.1 * g.pareto(3, COUNT)) * line(g, 0.01), 0.001
    ),
}


def alarms(model: Callable[[Generator], Array], slowdown: float, percent: int, pairs: int, seed: int) -> int:
    """In how many pairs the new side is called worse."""
    found = 0
    for pair in range(pairs):
        generator = np.random.default_rng((seed, pair))
        old, new = model(generator), slowdown * model(generator)
        found += percentile_ratios(new.tolist(), old.tolist(), (percent,))[percent].low > ALLOWED
    return found


@pytest.mark.parametrize("name", MODELS)
def test_p99_is_quiet_on_noise_and_catches_a_slowdown(name: str) -> None:
    assert alarms(MODELS[name], 1.0, 99, PAIRS, seed=1) == 0
    assert alarms(MODELS[name], SLOWDOWN, 99, PAIRS, seed=2) >= 99


@pytest.mark.parametrize("name", BEYOND)
def test_where_p99_is_not_known_well_enough_it_stays_quiet_and_p90_catches(name: str) -> None:
    assert alarms(BEYOND[name], 1.0, 99, 40, seed=1) <= 1
    assert alarms(BEYOND[name], SLOWDOWN, 90, 40, seed=3) == 40


def test_the_bound_holds_about_19_times_of_20() -> None:
    """A slowdown of just what is allowed is called worse once in twenty, about."""
    assert alarms(MODELS["lognormal 3 %, walk"], ALLOWED, 99, PAIRS, seed=3) <= 12
