"""The search: settings that hold a percentile of latency at the greatest throughput."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gpuopt.batching.batcher import Outcome, Service, Settings, simulate
from gpuopt.batching.latency import Latencies
from gpuopt.batching.load import Load
from gpuopt.errors import SpeedError, UsageError

COARSE, FINE, FINAL = 4000, 40_000, 200_000
"""Requests in a simulation: of every candidate, of the best ones, of the one that is chosen."""

_FINALISTS = 8
_GRID = (1.0, 0.97, 0.93, 0.88, 0.82, 0.75, 0.65, 0.55, 0.45, 0.35, 0.25, 0.15, 0.08, 0.03)
"""Shares of the greatest possible throughput at which a candidate is tried, until one holds."""

_HALVINGS = 5
_DELAY_SHARES = (0.0, 0.05, 0.1, 0.2, 0.4)
_NO_WORSE = 0.99
"""Capacities this near to the best are equal: the simpler settings win."""

INSTANCE_GAIN = 1.05
"""What a further instance has to bring to be worth its memory."""

_PREFERENCE = 1.05
_RANGE = tuple(round(0.1 + 0.05 * step, 2) for step in range(22))


@dataclass(frozen=True)
class Target:
    """What has to hold.

    Attributes:
        percentile: as 99.
        seconds: at most, from a request's arrival to its response.
        max_drop: share of requests that may be refused.
    """

    percentile: float
    seconds: float
    max_drop: float = 0.0

    def holds(self, outcome: Outcome) -> bool:
        """Whether a load met it."""
        return outcome.drop_rate <= self.max_drop and outcome.percentile(self.percentile) <= self.seconds


@dataclass(frozen=True)
class Fixed:
    """Settings that the search leaves alone; None: it chooses."""

    max_batch_size: int | None = None
    preferred_batch_size: tuple[int, ...] | None = None
    max_queue_delay_microseconds: int | None = None
    instances: int | None = None
    preserve_ordering: bool = False
    max_queue_size: int | None = None
    queue_timeout_microseconds: int | None = None


@dataclass(frozen=True)
class Candidate:
    """Settings and the greatest rate, requests a second, at which they hold the target; 0: at none."""

    settings: Settings
    capacity: float


@dataclass(frozen=True)
class Point:
    """What a rate meets."""

    rate: float
    outcome: Outcome


@dataclass(frozen=True)
class Found:
    """What the search found.

    Attributes:
        best: the settings to use.
        at_load: what the load itself meets with them.
        holds: whether that is within the target.
        by_instances: the best of each number of instances.
        load_range: rates up to over the capacity, ascending.
        knee: index in it where throughput over mean latency is greatest.
    """

    best: Candidate
    at_load: Outcome
    holds: bool
    by_instances: tuple[Candidate, ...]
    load_range: tuple[Point, ...]
    knee: int


@dataclass(frozen=True)
class Problem:
    """Everything that the search is about."""

    latencies: Latencies
    load: Load
    target: Target
    fixed: Fixed
    constant_ms: float = 0.0

    def service(self) -> Service:
        """Service times of batches up to the largest one that may be formed."""
        return self.latencies.service(self.fixed.max_batch_size or self.latencies.largest_batch, self.constant_ms)


def search(problem: Problem, advance: Callable[[int, int], None]) -> Found:
    """Try all candidates on a short load, the best ones on a longer one, and look at the winner in full.

    All see the same arrivals and the same draws of service times, stretched to the rate: they differ by their settings
    alone.

    Args:
        advance: told how many of how many candidates are done.

    Raises:
        UsageError: a fixed setting is not one that was measured.
        SpeedError: no candidate holds the target at any rate.
    """
    service = problem.service()
    tried = list(_candidates(problem))
    total = len(tried) + _FINALISTS
    coarse = []
    for index, settings in enumerate(tried):
        coarse.append(Candidate(settings, capacity(problem, service, settings, COARSE)))
        advance(index + 1, total)
    finalists = _finalists(coarse)
    fine = []
    for index, candidate in enumerate(finalists):
        rate = capacity(problem, service, candidate.settings, FINE, candidate.capacity * 1.1)
        fine.append(Candidate(candidate.settings, rate))
        advance(len(tried) + min(index + 1, _FINALISTS), total)
    by_instances = tuple(
        _simplest([c for c in fine if c.settings.instances == count])
        for count in sorted({c.settings.instances for c in fine})
    )
    best = _worth_it(by_instances, problem.latencies)
    if best.capacity == 0:
        alone = problem.latencies.milliseconds(1)
        raise SpeedError(
            f"no settings hold p{problem.target.percentile:g} at {problem.target.seconds * 1000:g} ms: "
            f"a single request takes {max(alone.values()):.3g} ms of inference",
            "Raise --target, or make the model faster.",
        )
    at_load = run(problem, service, best.settings, problem.load.rate, problem.load.length or FINAL)
    points = load_range(problem, service, best)
    power = [p.outcome.throughput / max(float(np.mean(p.outcome.latencies)), 1e-12) for p in points]
    return Found(
        best=best,
        at_load=at_load,
        holds=problem.target.holds(at_load),
        by_instances=by_instances,
        load_range=points,
        knee=int(np.argmax(power)),
    )


def run(problem: Problem, service: Service, settings: Settings, rate: float, count: int) -> Outcome:
    """One simulation at a rate."""
    return simulate(problem.load.arrivals(rate, count), service, settings)


def capacity(
    problem: Problem, service: Service, settings: Settings, count: int, highest: float = float("inf")
) -> float:
    """The greatest rate at which settings hold the target, requests a second; 0 if they hold it nowhere.

    Latency does not rise with the rate everywhere (with a queue delay it falls first), so that rates are tried from the
    highest possible one downwards, and the last step is halved. They have to hold the load's own rate as well, if that
    is below.

    Args:
        count: requests in a simulation.
        highest: rate to begin at, requests a second.
    """
    ceiling = min(highest, _ceiling(service, settings))
    if ceiling <= 0:
        return 0.0
    held = failed = 0.0
    for share in _GRID:
        rate = share * ceiling
        if problem.target.holds(run(problem, service, settings, rate, count)):
            held = rate
            break
        failed = rate
    if held == 0 or failed == 0:
        return held
    for _ in range(_HALVINGS):
        middle = (held + failed) / 2
        if problem.target.holds(run(problem, service, settings, middle, count)):
            held = middle
        else:
            failed = middle
    own = problem.load.rate
    if own < held and not problem.target.holds(run(problem, service, settings, own, count)):
        return 0.0
    return held


def load_range(problem: Problem, service: Service, best: Candidate) -> tuple[Point, ...]:
    """What rates from a tenth of the capacity to over it meet."""
    count = min(problem.load.length or FINE, FINE)
    rates = [share * best.capacity for share in _RANGE]
    return tuple(Point(rate, run(problem, service, best.settings, rate, count)) for rate in rates)


def _ceiling(service: Service, settings: Settings) -> float:
    """Requests a second if every batch is as large as pays best and no instance ever idles."""
    mean = service.seconds[1 : settings.max_batch_size + 1].mean(axis=1)
    best = float(np.max(np.arange(1, settings.max_batch_size + 1) / mean))
    slowdown = [*service.slowdown, *([service.slowdown[-1]] * settings.instances)][settings.instances - 1]
    return best * settings.instances / slowdown


def _candidates(problem: Problem) -> Iterator[Settings]:
    latencies, fixed, target = problem.latencies, problem.fixed, problem.target
    largest = latencies.largest_batch
    if fixed.max_batch_size is not None and fixed.max_batch_size > largest:
        raise UsageError(
            f"--max-batch-size {fixed.max_batch_size}: batches were measured up to {largest}",
            "Measure larger ones: gpuopt bench --batches.",
        )
    sizes = {2**power for power in range(largest.bit_length()) if 2**power <= largest} | {largest}
    fast_enough = sorted(size for size in sizes if min(latencies.milliseconds(size).values()) <= target.seconds * 1000)
    batches = [fixed.max_batch_size] if fixed.max_batch_size is not None else fast_enough or [1]
    delays = (
        [fixed.max_queue_delay_microseconds]
        if fixed.max_queue_delay_microseconds is not None
        else [round(share * target.seconds * 1e6) for share in _DELAY_SHARES]
    )
    counts = [fixed.instances] if fixed.instances is not None else sorted({1, *latencies.streams})
    for batch, delay, instances in itertools.product(batches, delays, counts):
        for preferred in _preferred(latencies, batch, fixed.preferred_batch_size):
            for size, timeout in _limits(problem, batch, delay):
                yield Settings(
                    max_batch_size=batch,
                    preferred_batch_size=preferred,
                    max_queue_delay_microseconds=delay,
                    instances=instances,
                    preserve_ordering=fixed.preserve_ordering,
                    max_queue_size=size,
                    queue_timeout_microseconds=timeout,
                )


def _preferred(latencies: Latencies, largest: int, fixed: tuple[int, ...] | None) -> list[tuple[int, ...]]:
    """None, and the measured sizes below the largest batch whose throughput stands out of their neighbours'.

    Triton's guide: a preferred size is for one that is significantly faster than the others.
    """
    if fixed is not None:
        return [tuple(size for size in fixed if size <= largest)]
    rates = {size: size / min(latencies.milliseconds(size).values()) for size in range(1, largest + 1)}
    better = tuple(
        size
        for size in sorted(latencies.batches)
        if 1 < size < largest and rates[size] > _PREFERENCE * rates[size + 1] and rates[size] >= rates[size - 1]
    )
    return [(), better] if better else [()]


def _limits(problem: Problem, batch: int, delay: int) -> list[tuple[int, int]]:
    fixed, target = problem.fixed, problem.target
    if fixed.max_queue_size is not None or fixed.queue_timeout_microseconds is not None:
        return [(fixed.max_queue_size or 0, fixed.queue_timeout_microseconds or 0)]
    if target.max_drop == 0:
        return [(0, 0)]
    spare = target.seconds * 1000 - min(problem.latencies.milliseconds(batch).values())
    timeout = round(spare * 1000)
    return [(0, 0), (2 * batch, 0), *([(0, timeout)] if timeout > delay else [])]


def _finalists(coarse: Sequence[Candidate]) -> list[Candidate]:
    """The best few of every number of instances."""
    found: list[Candidate] = []
    counts = sorted({c.settings.instances for c in coarse})
    for count in counts:
        ours = sorted((c for c in coarse if c.settings.instances == count), key=lambda c: -c.capacity)
        found += ours[: max(2, _FINALISTS // len(counts))]
    return found


def _simplest(candidates: Sequence[Candidate]) -> Candidate:
    """Of those that are as good as the best one, the one with the fewest and smallest settings."""
    best = max(candidate.capacity for candidate in candidates)
    near = [candidate for candidate in candidates if candidate.capacity >= _NO_WORSE * best]
    return min(near, key=lambda c: _complexity(c.settings))


def _complexity(settings: Settings) -> tuple[int, ...]:
    return (
        len(settings.preferred_batch_size),
        int(bool(settings.max_queue_size)) + int(bool(settings.queue_timeout_microseconds)),
        settings.max_queue_delay_microseconds,
        -settings.max_batch_size,
    )


def _worth_it(by_instances: Sequence[Candidate], latencies: Latencies) -> Candidate:
    """More instances only where each step up was worth it, and the measured gain is beyond its spread."""
    best = by_instances[0]
    for candidate in by_instances[1:]:
        low, _ = latencies.streams_spread.get(candidate.settings.instances, (INSTANCE_GAIN, 0.0))
        if candidate.capacity >= INSTANCE_GAIN * best.capacity and low >= 1:
            best = candidate
    return best
