"""The simulated batcher: what Triton's guide says of each setting, and queueing theory where there is a formula."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.batching.batcher import QUANTILES, Outcome, Service, Settings, constant_service, simulate

MS = 1e-3


def service(*milliseconds: float) -> Service:
    return constant_service([value * MS for value in milliseconds])


def latencies(arrivals_ms: list[float], of: Service, settings: Settings) -> list[float]:
    """Latencies in the order of arrival, milliseconds, with a millionth of one's precision."""
    outcome = simulate(np.asarray(arrivals_ms) * MS, of, settings)
    return [round(value / MS, 6) for value in outcome.latencies.tolist()]


def test_a_lone_request_takes_its_service_time() -> None:
    assert latencies([0], service(5), Settings(1)) == [5]
    outcome = simulate(np.asarray([0.0]), Service(service(5).seconds, constant=2 * MS), Settings(1))
    assert outcome.latencies.tolist() == pytest.approx([7 * MS])


def test_what_waits_when_an_instance_becomes_free_goes_together() -> None:
    assert latencies([0, 1, 2, 3], service(10, 12, 14), Settings(3)) == [10, 23, 22, 21]


def test_a_batch_is_at_most_the_largest() -> None:
    assert latencies([0, 1, 1, 1], service(10, 10), Settings(2)) == [10, 19, 19, 29]


def test_a_delay_holds_a_batch_until_its_oldest_request_is_that_old() -> None:
    settings = Settings(4, max_queue_delay_microseconds=5000)
    assert latencies([0, 2, 20], service(1, 1, 1, 1), settings) == [6, 4, 6]


def test_a_full_batch_does_not_wait_for_the_delay() -> None:
    settings = Settings(2, max_queue_delay_microseconds=5000)
    assert latencies([0, 2], service(1, 1), settings) == [3, 1]


def test_a_preferred_size_goes_at_once() -> None:
    settings = Settings(4, (2,), 5000)
    assert latencies([0, 1, 2], service(1, 1, 1, 1), settings) == [2, 1, 6]


def test_the_largest_preferred_size_that_is_there_is_taken() -> None:
    outcome = simulate(np.asarray([0.0, *[MS] * 7]), service(*[10.0] * 8), Settings(8, (2, 4), 1_000_000))
    # The first waits for a partner; of the seven behind it one joins it, and of the six left four are taken.
    assert sorted(np.unique(np.round(outcome.latencies / MS), return_counts=True)[1].tolist()) != [8]
    assert outcome.batches == 3


def test_without_a_delay_a_batch_is_closed_at_the_first_preferred_size_that_it_reaches() -> None:
    of = service(*[10.0] * 8)
    trickling = [0.0, 1, 2, 3, 4, 5, 6]
    assert simulate(np.asarray(trickling) * MS, of, Settings(8, (2, 8))).batches == 4
    assert simulate(np.asarray(trickling) * MS, of, Settings(8)).batches == 2


def test_instances_work_side_by_side_and_slow_each_other_down() -> None:
    assert latencies([0, 0], service(10), Settings(1, instances=2)) == [10, 10]
    slowed = Service(service(10).seconds, slowdown=(1.0, 1.5))
    assert latencies([0, 0, 0], slowed, Settings(1, instances=2)) == [10, 15, 25]


def test_responses_in_order_wait_for_earlier_ones() -> None:
    of = service(10, 30)
    settings = Settings(2, max_queue_delay_microseconds=1, instances=2)
    arrivals = [0.0, 0, 5]
    assert latencies(arrivals, of, settings) == [30, 30, 10.001]
    ordered = Settings(2, max_queue_delay_microseconds=1, instances=2, preserve_ordering=True)
    assert latencies(arrivals, of, ordered) == [30, 30, 25]


def test_a_full_queue_refuses() -> None:
    outcome = simulate(np.asarray([0, 1, 1, 1, 1]) * MS, service(10), Settings(1, max_queue_size=2))
    assert outcome.refused == 2
    assert outcome.drop_rate == pytest.approx(0.4)


def test_a_request_that_waits_too_long_is_refused_or_put_behind() -> None:
    arrivals = [0.0, 1, 11]
    refusing = Settings(1, queue_timeout_microseconds=5000)
    outcome = simulate(np.asarray(arrivals) * MS, service(10), refusing)
    assert outcome.refused == 1
    delaying = Settings(1, queue_timeout_microseconds=8000, timeout_action="DELAY")
    outcome = simulate(np.asarray([0.0, 1, 9]) * MS, service(10), delaying)
    assert outcome.refused == 0
    # The second one is overdue when the instance is free: the third overtakes it.
    assert [round(value / MS) for value in outcome.latencies.tolist()] == [10, 11, 29]


def test_a_batch_that_waited_for_longer_than_the_delay_is_merged_with_the_one_before() -> None:
    of = service(*[20.0] * 4)
    settings = Settings(4, (2,), 1000)
    # While the instance works two batches of two are formed; both are overdue when it is free, and fit into one.
    outcome = simulate(np.asarray([0, 0, 2, 2, 3, 3]) * MS, of, settings)
    assert outcome.batches == 2


def mean_wait(outcome: Outcome, service_seconds: float) -> float:
    return float(outcome.latencies.mean()) - service_seconds


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_instance_without_batches_is_the_m_d_1_queue(load: float) -> None:
    """Mean wait of M/D/1: rho / (2 (1 - rho)) service times (Pollaczek, Khinchine)."""
    arrivals = np.cumsum(np.random.default_rng(1).exponential(1 / load, 400_000))
    found = mean_wait(simulate(arrivals, constant_service([1.0]), Settings(1)), 1.0)
    assert found == pytest.approx(load / (2 * (1 - load)), rel=0.04)


def test_exponential_service_is_the_m_m_1_queue() -> None:
    """Mean wait of M/M/1: rho / (1 - rho) service times; and M/M/2's by Erlang's C formula."""
    quantiles = (np.arange(QUANTILES) + 0.5) / QUANTILES
    times = -np.log(1 - quantiles)
    times /= times.mean()
    of = Service(np.stack([np.zeros(QUANTILES), times]))
    generator = np.random.default_rng(2)
    arrivals = np.cumsum(generator.exponential(1 / 0.6, 400_000))
    # Cutting the exponential's tail at its 256th part takes 2 % of the variance away.
    assert mean_wait(simulate(arrivals, of, Settings(1)), 1.0) == pytest.approx(1.5, rel=0.06)
    arrivals = np.cumsum(generator.exponential(1 / 1.2, 400_000))
    assert mean_wait(simulate(arrivals, of, Settings(1, instances=2)), 1.0) == pytest.approx(0.5625, rel=0.06)


@given(
    seed=st.integers(0, 1000),
    rate=st.floats(10, 2000),
    largest=st.integers(1, 16),
    preferred=st.lists(st.integers(1, 16), max_size=3),
    delay=st.sampled_from([0, 100, 5000, 50_000]),
    instances=st.integers(1, 3),
    ordered=st.booleans(),
    queue=st.sampled_from([0, 1, 5, 40]),
    timeout=st.sampled_from([0, 2000, 30_000]),
    action=st.sampled_from(["REJECT", "DELAY"]),
)  # fmt: skip
def test_every_request_is_served_once_or_refused(
    seed: int, rate: float, largest: int, preferred: list[int], delay: int, instances: int, ordered: bool, queue: int,
    timeout: int, action: str,
) -> None:  # fmt: skip
    settings = Settings(
        largest, tuple(size for size in preferred if size <= largest), delay, instances, ordered, queue, timeout,
        "DELAY" if action == "DELAY" else "REJECT",
    )  # fmt: skip
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, 300))
    of = constant_service([(1 + 0.3 * size) * MS for size in range(1, largest + 1)])
    outcome = simulate(arrivals, of, settings)
    assert len(outcome.latencies) + outcome.refused == 300
    assert outcome.latencies.min(initial=1) >= 1.3 * MS - 1e-12
    assert outcome.batches * largest >= len(outcome.latencies)
    assert 0 <= outcome.utilisation <= 1 + 1e-9
    if not queue and not timeout:
        assert outcome.refused == 0
        # No request waits for a batch longer than the delay once an instance could take it: the whole run is bounded.
        assert outcome.seconds <= arrivals[-1] - arrivals[0] + 300 * 6 * MS + delay * 1e-6 + 0.001


def test_a_batch_after_idleness_takes_longer() -> None:
    of = Service(service(10, 10).seconds, after_idle=2 * MS)
    assert latencies([0, 1, 30], of, Settings(1)) == [12, 21, 12]
    assert latencies([0, 1, 30], of, Settings(1, max_queue_size=9)) == [12, 21, 12]
