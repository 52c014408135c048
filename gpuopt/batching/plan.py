"""The search: settings that hold a percentile of latency at the greatest throughput."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gpuopt.batching.batcher import Outcome, Service, Settings, simulate
from gpuopt.batching.latency import Latencies
from gpuopt.batching.load import Load
from gpuopt.durations import digits
from gpuopt.errors import SpeedError, UsageError

COARSE, FINE, FINAL = 4000, 40_000, 200_000
"""Requests in a simulation: of every candidate, of the best ones, of the one that is chosen."""

_TARGETS, _LONGER = 20, 5
"""The last two are as long as 20 times the target, at most five times as many requests: a queue that grows shows."""

_OVERLOAD = 1.5
"""Times the capacity at which a limit of the queue has to hold the target."""

_SHORTER = 0.85
"""A limit of the queue that is too long is shortened to so much of it."""

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
        ceiling: requests a second that `best` serves at most, however long they wait.
        queue_size: the longest queue of `best` with which an overload is answered within the target.
        by_instances: the best of each number of instances.
        load_range: rates up to over the capacity, ascending.
        knee: index in it where throughput over mean latency is greatest.
    """

    best: Candidate
    at_load: Outcome
    holds: bool
    ceiling: float
    queue_size: int
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
        largest = self.fixed.max_batch_size or self.latencies.largest_batch
        return self.latencies.service(largest, self.constant_ms, self.fixed.instances or 1)

    def length(self, base: int, rate: float) -> int:
        """Requests in a simulation: `base`, and more of a drawn load where they arrive in a few times the target."""
        if self.load.distribution == "trace":
            return base
        return max(base, min(_LONGER * base, int(_TARGETS * self.target.seconds * rate)))

    def holds(self, service: Service, settings: Settings, rate: float, outcome: Outcome) -> bool:
        """Whether a load met the target, and would if it went on: a trace ends, what is drawn does not."""
        if not self.target.holds(outcome):
            return False
        # A queue that is longer after every second is within the target for a while.
        refused = self.target.max_drop if outcome.refused else 0.0
        return self.load.distribution == "trace" or rate * (1 - refused) < ceiling(service, settings)


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
        raise _impossible(problem)
    rate = problem.load.rate
    at_load = run(problem, service, best.settings, rate, problem.load.length or problem.length(FINAL, rate))
    points = load_range(problem, service, best)
    power = [p.outcome.throughput / max(float(np.mean(p.outcome.latencies)), 1e-12) for p in points]
    return Found(
        best=best,
        at_load=at_load,
        holds=problem.holds(service, best.settings, rate, at_load),
        ceiling=ceiling(service, best.settings),
        queue_size=queue_size(problem, service, best),
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
        count: requests in a simulation; from `FINE` on as many as `Problem.length` says.
        highest: rate to begin at, requests a second.
    """

    def holds(rate: float) -> bool:
        length = problem.length(count, rate) if count >= FINE else count
        return problem.holds(service, settings, rate, run(problem, service, settings, rate, length))

    most = min(highest, ceiling(service, settings))
    if most <= 0:
        return 0.0
    held = failed = 0.0
    for share in _GRID:
        rate = share * most
        if holds(rate):
            held = rate
            break
        failed = rate
    if held == 0 or failed == 0:
        return held
    for _ in range(_HALVINGS):
        middle = (held + failed) / 2
        if holds(middle):
            held = middle
        else:
            failed = middle
    if problem.load.rate < held and not holds(problem.load.rate):
        return 0.0
    return held


def queue_size(problem: Problem, service: Service, best: Candidate) -> int:
    """The longest queue, at least a batch, with which half as much again as the capacity is answered within the target.

    What is in the queue has to be served, and so has the request itself, in the time that the target leaves.
    """
    rate, least = _OVERLOAD * best.capacity, best.settings.max_batch_size
    alone = float(service.seconds[least].mean()) + service.constant
    size = int(best.capacity * (problem.target.seconds - alone))
    while size > least:
        limited = dataclasses.replace(best.settings, max_queue_size=size)
        outcome = run(problem, service, limited, rate, problem.length(FINE, rate))
        if outcome.percentile(problem.target.percentile) <= problem.target.seconds:
            return size
        size = int(_SHORTER * size)
    return least


def load_range(problem: Problem, service: Service, best: Candidate) -> tuple[Point, ...]:
    """What rates from a tenth of the capacity to over it meet."""
    count = min(problem.load.length or FINE, FINE)
    rates = [share * best.capacity for share in _RANGE]
    return tuple(Point(rate, run(problem, service, best.settings, rate, count)) for rate in rates)


def _impossible(problem: Problem) -> SpeedError:
    """Why nothing holds the target: the model, the delay that is not to be changed, or something else that is fixed."""
    target = problem.target
    what = f"no settings hold p{target.percentile:g} at {target.seconds * 1000:g} ms"
    known = problem.latencies.milliseconds(1)
    inference = float(np.interp(target.percentile, list(known), list(known.values()))) + problem.latencies.after_idle
    alone = inference + problem.constant_ms
    delay = (problem.fixed.max_queue_delay_microseconds or 0) / 1000
    if alone > target.seconds * 1000:
        besides = f" and {digits(problem.constant_ms, 3)} ms besides" if problem.constant_ms else ""
        return SpeedError(
            f"{what}: a single request takes {digits(inference, 3)} ms of inference{besides}",
            "Raise --target, or make the model faster.",
        )
    if alone + delay > target.seconds * 1000:
        return SpeedError(
            f"{what}: --max-queue-delay lets a request wait for {digits(delay, 4)} ms, "
            f"and alone it takes {digits(alone, 3)} ms",
            "Lower it, or leave it out; or raise --target.",
        )
    return SpeedError(
        f"{what} with {problem.load.rate:.6g} requests/s: a single request would take {digits(alone, 3)} ms",
        "Leave out some of the settings that are fixed, lower the rate, or raise --target.",
    )


def ceiling(service: Service, settings: Settings) -> float:
    """Requests a second if every batch is as large as pays best and no instance ever idles."""
    mean = service.seconds[1 : settings.max_batch_size + 1].mean(axis=1)
    best = float(np.max(np.arange(1, settings.max_batch_size + 1) / mean))
    slowdown = [*service.slowdown, *([service.slowdown[-1]] * settings.instances)][settings.instances - 1]
    return best * settings.instances / slowdown


def _candidates(problem: Problem) -> Iterator[Settings]:
    latencies, fixed, target = problem.latencies, problem.fixed, problem.target
    largest = latencies.largest_batch
    least = max(fixed.preferred_batch_size or (1,))
    if fixed.max_batch_size is not None and fixed.max_batch_size > largest:
        raise UsageError(
            f"--max-batch-size {fixed.max_batch_size}: batches were measured up to {largest}",
            "Measure larger ones: gpuopt bench --batches.",
        )
    if least > (fixed.max_batch_size or largest):
        raise UsageError(
            f"--preferred-batch-size {least} is larger than the largest batch, {fixed.max_batch_size or largest}",
            "Leave it out, or allow larger batches: --max-batch-size.",
        )
    sizes = {size for size in (*(2**power for power in range(largest.bit_length())), largest) if size >= least}
    fast_enough = sorted(size for size in sizes if min(latencies.milliseconds(size).values()) <= target.seconds * 1000)
    batches = [fixed.max_batch_size] if fixed.max_batch_size is not None else fast_enough or [min(sizes)]
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
        return [fixed]
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
