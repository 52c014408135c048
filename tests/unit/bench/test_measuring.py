"""Timing and racing, on subjects whose time is known."""

from __future__ import annotations

import time

import pytest

from gpuopt.bench.measuring import Settings, measure, race


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


def test_a_measurement_tells_the_time() -> None:
    found = measure(Sleeper(1.0), Settings(seconds=0.2, warm_up_seconds=0.1))
    assert found.latency.percentiles[50].value == pytest.approx(1.0, rel=0.3)
    assert found.latency.minimum >= 1.0
    assert found.back_to_back_spread[0] <= found.back_to_back_ms <= found.back_to_back_spread[1]
    assert found.latency.count >= 20


def test_a_race_is_won_by_the_faster() -> None:
    told: list[tuple[int, int]] = []
    found = race(
        {"slow": Sleeper(1.5), "fast": Sleeper(1.0)}, 0.2, 9, tell=lambda done, total: told.append((done, total))
    )
    assert found.fastest == "fast"
    ratio = found.ratio("slow", "fast")
    assert ratio.low > 1
    assert ratio.value == pytest.approx(1.5, rel=0.3)
    assert told[-1] == (9, 9)
    assert {len(rounds) for rounds in found.rounds.values()} == {9}
