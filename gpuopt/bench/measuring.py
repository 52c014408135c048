"""Timing anything that can be run again and again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gpuopt.bench.statistics import Ratio, Summary, by_load, is_steady, paired_ratio, summarize


class Subject(Protocol):
    """What can be timed."""

    def run(self) -> None:
        """One inference, from enqueueing to its end."""

    def run_many(self, count: int) -> float:
        """Enqueue `count` inferences back to back and wait; gives milliseconds for one."""


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        seconds: of timed iterations.
        least, most: number of timed iterations.
        wanted: so many, where they take no longer than `patience_seconds`.
        warm_up_seconds: at most so long; it ends earlier where timings are steady.
    """

    seconds: float = 2.0
    least: int = 20
    most: int = 5000
    wanted: int = 0
    patience_seconds: float = 10.0
    warm_up_seconds: float = 2.0


@dataclass(frozen=True)
class Measurement:
    """Timings of one subject.

    Attributes:
        latency: of single inferences, each waited for, by the host's clock.
        back_to_back_ms: milliseconds an inference where the next is enqueued before the last has ended: the median of
            the rounds.
        back_to_back_spread: lowest and highest round.
        warm_up_iterations: before the timings were steady.
        was_steady: whether they became so.
        timings_ms: of the single inferences, in order.
    """

    latency: Summary
    back_to_back_ms: float
    back_to_back_spread: tuple[float, float]
    warm_up_iterations: int
    was_steady: bool
    timings_ms: tuple[float, ...] = ()


def measure(subject: Subject, settings: Settings | None = None) -> Measurement:
    """Warm up until timings are steady, then time single inferences and rounds of many."""
    settings = settings or Settings()
    before, was_steady = warm_up(subject, settings)
    timings: list[float] = []
    started = time.perf_counter()
    while _goes_on(len(timings), time.perf_counter() - started, settings):
        timings.append(_once(subject))
    per_round = max(1, int(settings.seconds / 2 / _ROUNDS / max(summarize(timings).mean / 1000, 1e-6)))
    per_round = min(per_round, settings.most)
    # Single inferences leave the GPU idle between them, and its clocks sink: they rise again before the rounds count.
    started = time.perf_counter()
    while time.perf_counter() - started < min(_SHORTEST_WARM_UP, settings.warm_up_seconds):
        subject.run_many(per_round)
    rounds = sorted(subject.run_many(per_round) for _ in range(_ROUNDS))
    return Measurement(
        summarize(timings), rounds[len(rounds) // 2], (rounds[0], rounds[-1]), len(before), was_steady, tuple(timings)
    )


_ROUNDS = 7
_SHORTEST_WARM_UP = 0.5
_WINDOW_SECONDS = 0.1


def _goes_on(count: int, spent: float, settings: Settings) -> bool:
    """Whether more single inferences are timed."""
    if count < settings.least or (count < settings.wanted and spent < settings.patience_seconds):
        return True
    return spent < settings.seconds / 2 and count < settings.most


def warm_up(subject: Subject, settings: Settings | None = None) -> tuple[list[float], bool]:
    """Run until timings are steady, and half a second at least: clocks take some tenths of a second to rise.

    Returns:
        Milliseconds of each run, and whether they became steady before `warm_up_seconds` were over.
    """
    settings = settings or Settings()
    timings: list[float] = []
    started = time.perf_counter()
    spent = 0.0
    while spent < min(_SHORTEST_WARM_UP, settings.warm_up_seconds) or not is_steady(timings, _window(timings)):
        if timings and spent > settings.warm_up_seconds:
            return timings, False
        timings.append(_once(subject))
        spent = time.perf_counter() - started
    return timings, True


def _window(timings: Sequence[float]) -> int:
    """How many timings a window of the warm-up has, by what one takes lately."""
    return int(_WINDOW_SECONDS * 1000 / max(timings[-1], 1e-3))


def _once(subject: Subject) -> float:
    started = time.perf_counter()
    subject.run()
    return (time.perf_counter() - started) * 1000


@dataclass(frozen=True)
class Race:
    """Several subjects measured in turn.

    Attributes:
        milliseconds: median of the rounds for one inference, by name.
        rounds: all of them, by name.
        loads: how often the subjects were loaded; equally many rounds of each, one load's behind the other's.
    """

    milliseconds: Mapping[str, float]
    rounds: Mapping[str, tuple[float, ...]]
    loads: int = 1

    def ratio(self, ours: str, theirs: str) -> Ratio:
        """How many times as long ours takes."""
        return paired_ratio(self.rounds[ours], self.rounds[theirs], self.loads)

    def in_loads(self, name: str) -> list[Sequence[float]]:
        """The rounds of one subject, load by load."""
        return by_load(self.rounds[name], self.loads)

    @staticmethod
    def from_facts(facts: Mapping[str, Any]) -> Race:
        """The race that the facts of `stages/race.py` tell of."""
        rounds = {name: tuple(times) for name, times in facts["rounds"].items()}
        return Race(facts["milliseconds"], rounds, facts["loads"])

    @property
    def fastest(self) -> str:
        return min(self.milliseconds, key=lambda name: self.milliseconds[name])


def race(
    subjects: Mapping[str, Subject],
    seconds: float = 3.0,
    rounds: int = 15,
    tell: Callable[[int, int], None] | None = None,
) -> Race:
    """Measure subjects in turn, round by round, so that a drift of the clocks meets all of them.

    Args:
        seconds: for all subjects together, about.
        rounds: of each.
        tell: called with the rounds done and their number.
    """
    counts = {}
    for name, subject in subjects.items():
        warm_up(subject, Settings(warm_up_seconds=1.0))
        once = subject.run_many(10)
        counts[name] = max(3, min(2000, int(seconds / rounds / len(subjects) / max(once / 1000, 1e-6))))
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    for index in range(rounds):
        for name, subject in subjects.items():
            # Threads of the session before may still be spinning, which on few cores is seen in the first call.
            subject.run()
            taken[name].append(subject.run_many(counts[name]))
        if tell is not None:
            tell(index + 1, rounds)
    return Race(
        {name: statistics.median(times) for name, times in taken.items()},
        {name: tuple(times) for name, times in taken.items()},
    )


def joined(races: Sequence[Race]) -> Race:
    """Races of the same subjects, loaded anew for each, as one."""
    rounds = {name: tuple(time for one in races for time in one.rounds[name]) for name in races[0].rounds}
    return Race({name: statistics.median(times) for name, times in rounds.items()}, rounds, len(races))
