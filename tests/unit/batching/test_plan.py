"""The search, and what the plan says of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from gpuopt.batching import command, flags, latency, load, plan, report
from gpuopt.batching.batcher import Settings
from gpuopt.batching.plan import Fixed, Problem, Target
from gpuopt.errors import SpeedError, UsageError
from gpuopt.progress import Silent
from gpuopt.triton import schema
from tests.unit.batching import test_latency as reports


def problem(tmp_path: Path, text: str, rate: float, target_ms: float, **fixed: object) -> Problem:
    path = tmp_path / "table"
    path.write_text(text)
    return Problem(
        latency.read(path), load.make(rate, None, None, None), Target(99, target_ms / 1000), Fixed(**fixed)  # type: ignore[arg-type]
    )  # fmt: skip


LINEAR = "batch,p50\n1,1.2\n128,26.6\n"
"""1 ms and 0.2 ms a sample."""


def search(asked: Problem) -> plan.Found:
    return plan.search(asked, lambda done, total: None)


def test_the_plan_holds_the_target_and_nothing_beats_it(tmp_path: Path) -> None:
    asked = problem(tmp_path, LINEAR, 2000, 30)
    found = search(asked)
    assert found.holds
    assert found.at_load.percentile(99) <= 0.030
    service = asked.service()
    for other in (
        Settings(128, (8, 16, 32), 100_000, preserve_ordering=True),
        Settings(128, max_queue_delay_microseconds=10_000),
        Settings(8),
        Settings(32, (16,)),
    ):
        assert plan.capacity(asked, service, other, plan.FINE) <= found.best.capacity * 1.01
    # Five samples a millisecond are what very large batches come to.
    assert 3500 < found.best.capacity < 5000


def test_the_load_range_rises_and_the_knee_is_inside(tmp_path: Path) -> None:
    found = search(problem(tmp_path, LINEAR, 2000, 30, max_batch_size=128, max_queue_delay_microseconds=0))
    rates = [point.rate for point in found.load_range]
    assert rates == sorted(rates)
    assert rates[-1] > found.best.capacity
    assert 0 < found.knee < len(rates) - 1
    busy = [round(point.outcome.utilisation, 9) for point in found.load_range]
    assert busy == sorted(busy)


def test_a_preferred_size_is_used_where_one_stands_out(tmp_path: Path) -> None:
    # 8 takes as long as 5, 9 takes twice as long: an engine with a profile for 8 and one for 16.
    table = "batch,p50\n1,4.0\n8,4.0\n9,8.0\n16,8.0\n"
    asked = problem(tmp_path, table, 500, 40)
    assert plan._preferred(asked.latencies, 16, None) == [(), (8,)]
    assert plan._preferred(problem(tmp_path, LINEAR, 1, 1).latencies, 128, None) == [()]


def test_instances_that_pay_and_that_do_not(tmp_path: Path) -> None:
    found = {}
    for name, gain in (("no", 1.02), ("yes", 1.9)):
        table = json.dumps({"batches": {"1": 4.0, "8": 8.0}, "streams": {"2": gain}})
        found[name] = search(problem(tmp_path, table, 300, 60, max_batch_size=8, max_queue_delay_microseconds=0))
    assert found["no"].best.settings.instances == 1
    assert found["yes"].best.settings.instances == 2
    assert [one.settings.instances for one in found["no"].by_instances] == [1, 2]


def test_more_instances_than_were_measured_bring_nothing(tmp_path: Path) -> None:
    table = json.dumps({"batches": {"1": 4.0, "8": 8.0}, "streams": {"2": 1.4}})
    for instances in (1, 2, 4, 8):
        asked = problem(tmp_path, table, 300, 60, instances=instances)
        service, settings = asked.service(), Settings(8, instances=instances)
        most = 1000 if instances == 1 else 1400
        assert plan.ceiling(service, settings) == pytest.approx(most)
        assert plan.run(asked, service, settings, 9000, plan.COARSE).throughput == pytest.approx(most, rel=0.02)


def test_a_load_that_cannot_be_served_for_long_does_not_hold(tmp_path: Path) -> None:
    asked = problem(tmp_path, "batch,p50\n1,0.5\n64,1.0\n", 65_000, 1000)
    service, settings = asked.service(), Settings(64)
    # 64 000 requests/s are the most: after a second of 65 000 they wait for 16 ms, and for longer every second.
    outcome = plan.run(asked, service, settings, 65_000, 65_000)
    assert asked.target.holds(outcome)
    assert not asked.holds(service, settings, 65_000, outcome)
    assert asked.holds(service, settings, 60_000, plan.run(asked, service, settings, 60_000, 65_000))
    assert plan.capacity(asked, service, settings, plan.COARSE) < 64_000
    # A share that is refused need not be served.
    limited = dataclasses.replace(settings, max_queue_size=6400)
    dropping = dataclasses.replace(asked, target=Target(99, 1.0, 0.05))
    outcome = plan.run(asked, service, limited, 65_000, 650_000)
    assert outcome.refused
    assert dropping.holds(service, limited, 65_000, outcome)
    assert not dropping.holds(service, limited, 68_000, outcome)


def test_a_simulation_is_long_beside_the_target(tmp_path: Path) -> None:
    asked = problem(tmp_path, LINEAR, 1000, 1000)
    assert [asked.length(plan.FINE, rate) for rate in (1000, 5000, 1e6)] == [40_000, 100_000, 200_000]


def test_the_advised_queue_keeps_an_overload_within_the_target(tmp_path: Path) -> None:
    asked = problem(tmp_path, LINEAR, 300, 60)
    service, settings = asked.service(), Settings(32)
    best = plan.Candidate(settings, plan.capacity(asked, service, settings, plan.COARSE))
    size = plan.queue_size(asked, service, best)
    assert size > 32
    for overload in (1.2, 1.5, 3):
        limited = dataclasses.replace(settings, max_queue_size=size)
        outcome = plan.run(asked, service, limited, overload * best.capacity, plan.COARSE)
        assert outcome.refused
        assert outcome.percentile(99) <= 0.060


def test_what_a_preferred_size_and_a_delay_demand(tmp_path: Path) -> None:
    for fixed in ({"max_batch_size": 8}, {}):
        with pytest.raises(UsageError, match="--preferred-batch-size 256 is larger than the largest batch"):
            search(problem(tmp_path, LINEAR, 300, 60, preferred_batch_size=(256,), **fixed))
    candidates = list(plan._candidates(problem(tmp_path, LINEAR, 300, 60, preferred_batch_size=(16,))))
    assert {candidate.preferred_batch_size for candidate in candidates} == {(16,)}
    assert min(candidate.max_batch_size for candidate in candidates) == 16
    with pytest.raises(SpeedError, match="--max-queue-delay lets a request wait for 50 ms"):
        search(problem(tmp_path, LINEAR, 10, 20, max_batch_size=8, max_queue_delay_microseconds=50_000))


def test_fixed_settings_are_kept(tmp_path: Path) -> None:
    found = search(
        problem(
            tmp_path, LINEAR, 300, 60, max_batch_size=16, preferred_batch_size=(4,), max_queue_delay_microseconds=2000,
            instances=2, preserve_ordering=True, max_queue_size=100, queue_timeout_microseconds=50_000,
        )
    )  # fmt: skip
    assert found.best.settings == Settings(16, (4,), 2000, 2, True, 100, 50_000)
    with pytest.raises(UsageError, match="measured up to 128"):
        search(problem(tmp_path, LINEAR, 300, 60, max_batch_size=256))


def test_a_share_that_may_be_refused_allows_a_queue_limit(tmp_path: Path) -> None:
    asked = problem(tmp_path, LINEAR, 300, 30)
    limits = plan._limits(Problem(asked.latencies, asked.load, Target(99, 0.03, 0.01), asked.fixed), 32, 0)
    assert limits[0] == (0, 0)
    assert len(limits) == 3


def test_a_target_below_the_service_time_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpeedError, match="no settings hold p99 at 1 ms"):
        search(problem(tmp_path, LINEAR, 100, 1))


def request(path: Path, rate: float, **settings: object) -> command.Request:
    return flags.request(
        path, flags.Load(rate), flags.Goal("p99=30ms", "0", "1ms"), flags.Settings(**settings)  # type: ignore[arg-type]
    )  # fmt: skip


def test_the_answer_on_a_bench_report(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(reports.report([*reports.BATCHES, *reports.PHASES, *reports.STREAMS, *reports.OVERLAP]))
    answer = command.make(request(path, 1000, max_queue_delay="0ms"), ["gpuopt"], Silent())
    assert answer.error is None
    made = answer.report
    assert report.PlanReport.model_validate_json(made.model_dump_json()) == made
    assert made.settings.instances in (2, 4)
    assert any("was measured at batch 8" in warning for warning in made.warnings)
    assert made.overlap is not None
    assert made.overlap.gain == pytest.approx(2.48 / 2.0)
    assert made.overlap.measured == {1: 1.0, 2: 1.25}
    config = schema.parse(made.config, "it")
    assert command.settings_of(config).instances == made.settings.instances
    text = report.render(made)
    for told in ("NVIDIA H100", "instances pay", "at most 1.24x", "2 in flight 1.25x", "dynamic_batching"):
        assert told in text


def test_a_load_beyond_the_capacity_is_an_error_and_still_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(LINEAR)
    answer = command.make(request(path, 50_000, max_batch_size=64, max_queue_delay="0ms"), ["gpuopt"], Silent())
    assert answer.error is not None
    assert answer.error.exit_code == 13
    assert "spread the load over" in answer.error.hint
    assert not answer.report.holds
    assert answer.report.capacity > 0


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulations of a few requests, where it is not about their numbers."""
    for name in ("COARSE", "FINE", "FINAL"):
        monkeypatch.setattr(plan, name, 2000)


@pytest.mark.usefixtures("short")
def test_a_queue_that_grows_is_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("batch,p50\n1,0.5\n64,1.0\n")
    asked = dataclasses.replace(request(path, 65_000, max_batch_size=64, max_queue_delay="0ms"), target=Target(99, 1.0))
    answer = command.make(asked, ["gpuopt"], Silent())
    assert not answer.report.holds
    assert answer.error is not None
    assert "at most 64000 requests/s can be served" in answer.error.message


@pytest.mark.usefixtures("short")
def test_settings_that_refuse_every_request(tmp_path: Path) -> None:
    path, other = tmp_path / "table", tmp_path / "other.pbtxt"
    path.write_text(json.dumps({"batches": {"1": 4.0, "8": 8.0}, "streams": {"2": 1.4}}))
    other.write_text(
        "max_batch_size: 8 instance_group { count: 8 } dynamic_batching { max_queue_delay_microseconds: 20000 "
        "default_queue_policy { default_timeout_microseconds: 1000 } }"
    )
    asked = request(path, 10, max_batch_size=8, max_queue_delay="0ms")
    made = command.make(dataclasses.replace(asked, against=other), ["gpuopt"], Silent()).report
    assert made.against is not None
    assert (made.against.at_load.p99_ms, made.against.at_load.drop_rate, made.against.holds) == (None, 1, False)
    assert report.PlanReport.model_validate_json(made.model_dump_json()) == made
    assert "none" in report.render(made)
    assert "instances were measured up to 2: more are taken to bring nothing" in made.warnings


def test_a_number_that_triton_s_configuration_does_not_hold() -> None:
    with pytest.raises(UsageError, match="larger than Triton's configuration can hold"):
        command.config_block(Settings(8, max_queue_size=2**32), on_cpu=False)


@pytest.mark.parametrize("target", ["p99", "99=20", "p100=1ms", "p0=1ms", "=1ms", "p99=0ms", "p99=-1ms"])
def test_targets_that_are_none(target: str) -> None:
    with pytest.raises(UsageError):
        flags.target(target, "0")


@pytest.mark.parametrize("drop", ["x", "-1", "100%", "1"])
def test_shares_that_are_none(drop: str) -> None:
    with pytest.raises(UsageError):
        flags.target("p99=1ms", drop)
