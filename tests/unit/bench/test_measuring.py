"""Timing and racing, on subjects whose time is known."""

from __future__ import annotations

import time

import pytest

from gpuopt.bench.measuring import Race, Settings, joined, measure, race, warm_up


class Sleeper:
    def __init__(self, milliseconds: float) -> None:
        self.seconds = milliseconds / 1000
        self.calls = 0

    def run(self) -> None:
        self.calls += 1
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            pass

    def run_many(self, count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            self.run()
        return (time.perf_counter() - started) / count * 1000


class Clocked:
    """Tells its own time, a round in ten of it a tenth longer; real time plays no part."""

    def __init__(self, milliseconds: float) -> None:
        self.milliseconds = milliseconds
        self.rounds = 0

    def run(self) -> None:
        pass

    def run_many(self, count: int) -> float:
        self.rounds += 1
        return self.milliseconds * (1.1 if self.rounds % 10 == 0 else 1.0)


def test_a_measurement_tells_the_time() -> None:
    found = measure(Sleeper(1.0), Settings(seconds=0.2, warm_up_seconds=0.1))
    assert 1.0 <= found.latency.minimum <= found.latency.percentiles[50].value
    assert found.back_to_back_ms >= 1.0
    assert found.back_to_back_spread[0] <= found.back_to_back_ms <= found.back_to_back_spread[1]
    assert found.latency.count >= 20


def test_a_race_is_won_by_the_faster() -> None:
    told: list[tuple[int, int]] = []
    found = race(
        {"slow": Clocked(1.5), "fast": Clocked(1.0)}, 0.2, 9, tell=lambda done, total: told.append((done, total))
    )
    assert found.fastest == "fast"
    ratio = found.ratio("slow", "fast")
    assert ratio.low > 1
    assert ratio.value == pytest.approx(1.5, rel=0.05)
    assert told[-1] == (9, 9)
    assert {len(rounds) for rounds in found.rounds.values()} == {9}


def test_races_of_several_loads_are_one_and_a_lead_has_to_be_in_every_load() -> None:
    same = {"one": (1.0, 1.0, 1.0), "other": (1.0, 1.0, 1.0)}
    ahead = {"one": (0.9, 0.9, 0.9), "other": (1.0, 1.0, 1.0)}
    behind = {"one": (1.1, 1.1, 1.1), "other": (1.0, 1.0, 1.0)}

    def of(*loads: dict[str, tuple[float, ...]]) -> Race:
        return joined([Race({name: times[0] for name, times in load.items()}, load) for load in loads])

    mixed = of(ahead, same, behind)
    assert mixed.milliseconds == {"one": 1.0, "other": 1.0}
    assert mixed.rounds["one"] == (0.9, 0.9, 0.9, 1.0, 1.0, 1.0, 1.1, 1.1, 1.1)
    assert mixed.loads == 3
    assert mixed.in_loads("one") == [(0.9, 0.9, 0.9), (1.0, 1.0, 1.0), (1.1, 1.1, 1.1)]
    ratio = mixed.ratio("one", "other")
    assert (ratio.low, ratio.value, ratio.high) == (0.9, 1.0, 1.1)
    assert of(ahead, ahead, ahead).ratio("one", "other").is_beyond_noise
    assert not of(ahead, ahead, behind).ratio("one", "other").is_beyond_noise


def test_what_the_subject_before_leaves_running_is_not_in_a_time() -> None:
    at_work: list[object] = []

    class Disturbed:
        """Twice as slow while threads of another subject still spin: the first call after it."""

        def run(self) -> None:
            at_work.append(self)

        def run_many(self, count: int) -> float:
            slow = at_work[-1:] != [self]
            at_work.append(self)
            return (count + slow) / count

    found = race({"one": Disturbed(), "other": Disturbed()}, 0.1, 5)
    assert found.rounds == {"one": (1.0,) * 5, "other": (1.0,) * 5}


def test_warm_up_outlasts_clocks_that_rise_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Rising:
        """Five times as slow at first, at full speed after 0.4 s."""

        def run(self) -> None:
            now[0] += 5e-5 * (1 + 4 * max(0.0, 1 - now[0] / 0.4))

        def run_many(self, count: int) -> float:
            raise AssertionError

    timings, was_steady = warm_up(Rising())
    assert was_steady
    assert timings[-1] == pytest.approx(0.05, rel=0.02)


def test_enough_inferences_are_timed_where_patience_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Slow:
        """10 ms each."""

        def run(self) -> None:
            now[0] += 0.01

        def run_many(self, count: int) -> float:
            now[0] += 0.01 * count
            return 10.0

    def count(**settings: float) -> int:
        return measure(Slow(), Settings(seconds=1.0, **settings)).latency.count  # type: ignore[arg-type]

    assert count() == 50
    assert count(wanted=600) == 600
    assert count(wanted=600, patience_seconds=2.0) == pytest.approx(200, abs=1)
