"""`gpuopt plan-batching` without its command line."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gpuopt
from gpuopt.batching import latency, plan
from gpuopt.batching.batcher import Outcome, Settings
from gpuopt.batching.latency import Latencies
from gpuopt.batching.load import Load
from gpuopt.batching.plan import Fixed, Found, Problem, Target
from gpuopt.batching.report import (
    AgainstReport,
    InstancesReport,
    LoadReport,
    OverlapReport,
    PlanReport,
    PredictionReport,
    SettingsReport,
    TargetReport,
)
from gpuopt.durations import digits
from gpuopt.errors import GpuoptError, SpeedError, UsageError
from gpuopt.progress import Progress
from gpuopt.storage import write_text
from gpuopt.triton import check, schema


@dataclass(frozen=True)
class Request:
    """What to plan.

    Attributes:
        latencies: a bench report or a table.
        against: a `config.pbtxt` whose settings are predicted beside the plan; None: none.
        constant_ms: what every request takes besides: network, client.
    """

    latencies: Path
    load: Load
    target: Target
    fixed: Fixed = field(default_factory=Fixed)
    against: Path | None = None
    constant_ms: float = 0.0


@dataclass(frozen=True)
class Answer:
    """A plan, and the error if it does not hold the load."""

    report: PlanReport
    error: GpuoptError | None


def make(request: Request, command: Sequence[str], progress: Progress) -> Answer:
    """Plan.

    Raises:
        StorageError, DataError, UsageError, ConfigurationError: something given cannot be read.
        SpeedError: no settings hold the target at any rate.
    """
    started = time.monotonic()
    known = latency.read(request.latencies)
    problem = Problem(known, request.load, request.target, request.fixed, request.constant_ms)
    other = _other_settings(request.against, known) if request.against is not None else None
    with progress.stage("plan"):
        found = plan.search(problem, progress.advance)
        against = _against(problem, other, request.against) if other is not None and request.against else None
    best = found.best
    report = PlanReport(
        command=list(command),
        gpuopt_version=gpuopt.__version__,
        latencies=known.origin,
        on_cpu=known.on_cpu,
        load=LoadReport(
            distribution=request.load.distribution,
            rate=request.load.rate,
            burstiness=request.load.burstiness,
            requests=len(found.at_load.latencies) + found.at_load.refused,
        ),
        target=TargetReport(
            percentile=request.target.percentile,
            milliseconds=request.target.seconds * 1000,
            max_drop=request.target.max_drop,
        ),
        settings=_settings(best.settings),
        capacity=best.capacity,
        holds=found.holds,
        at_load=_prediction(request.load.rate, found.at_load, request.target),
        load_range=[_prediction(point.rate, point.outcome, request.target) for point in found.load_range],
        knee=found.load_range[found.knee].rate,
        instances=[
            InstancesReport(instances=one.settings.instances, capacity=one.capacity) for one in found.by_instances
        ],
        overlap=_overlap(known),
        against=against,
        advised_queue_size=found.queue_size,
        config=config_block(best.settings, known.on_cpu),
        warnings=[*known.warnings, *_warnings(known, request, found, other)],
        seconds=round(time.monotonic() - started, 3),
    )
    return Answer(report, None if found.holds else _too_slow(report, found.ceiling))


def write(report: PlanReport, path: Path) -> None:
    """Write the document.

    Raises:
        StorageError: it cannot be written.
    """
    write_text(path, report.model_dump_json(indent=2) + "\n")


def config_block(settings: Settings, on_cpu: bool) -> str:
    """The settings as fields of a `config.pbtxt`.

    Raises:
        UsageError: a number is larger than Triton's type for it.
    """
    config = schema.new()
    with schema.numbers_that_fit():
        config.max_batch_size = settings.max_batch_size
        batching = config.dynamic_batching
        batching.SetInParent()
        batching.preferred_batch_size.extend(settings.preferred_batch_size)
        batching.max_queue_delay_microseconds = settings.max_queue_delay_microseconds
        batching.preserve_ordering = settings.preserve_ordering
        if settings.max_queue_size or settings.queue_timeout_microseconds:
            policy = batching.default_queue_policy
            policy.timeout_action = ("REJECT", "DELAY").index(settings.timeout_action)
            policy.default_timeout_microseconds = settings.queue_timeout_microseconds
            policy.max_queue_size = settings.max_queue_size
        group = config.instance_group.add()
        group.count = settings.instances
        group.kind = ("KIND_AUTO", "KIND_GPU", "KIND_CPU").index("KIND_CPU" if on_cpu else "KIND_GPU")
    return schema.render(config)


def settings_of(config: schema.ModelConfig) -> Settings:
    """The batcher's settings of a configuration.

    Raises:
        UsageError: it has none, or priorities, which are not simulated.
    """
    if not config.HasField("dynamic_batching") or config.max_batch_size < 1:
        raise UsageError("--against: the configuration has no dynamic batcher", "Name one with dynamic_batching.")
    batching = config.dynamic_batching
    if batching.priority_levels > 1:
        raise UsageError("--against: priority levels are not simulated", "Take them out for the comparison.")
    policy = batching.default_queue_policy
    action: Literal["REJECT", "DELAY"] = "DELAY" if policy.timeout_action else "REJECT"
    return Settings(
        max_batch_size=config.max_batch_size,
        preferred_batch_size=tuple(batching.preferred_batch_size),
        max_queue_delay_microseconds=batching.max_queue_delay_microseconds,
        instances=sum(max(1, group.count) * max(1, len(group.gpus)) for group in config.instance_group) or 1,
        preserve_ordering=batching.preserve_ordering,
        max_queue_size=policy.max_queue_size,
        queue_timeout_microseconds=policy.default_timeout_microseconds,
        timeout_action=action,
    )


def _other_settings(path: Path, known: Latencies) -> Settings:
    config, _ = check.read(path)
    settings = settings_of(config)
    if settings.max_batch_size > known.largest_batch:
        raise UsageError(
            f"--against: max_batch_size {settings.max_batch_size}, batches were measured up to {known.largest_batch}",
            "Measure larger ones: gpuopt bench --batches.",
        )
    return settings


def _against(problem: Problem, settings: Settings, path: Path) -> AgainstReport:
    fixed = dataclasses.replace(problem.fixed, max_batch_size=None, instances=settings.instances)
    problem = dataclasses.replace(problem, fixed=fixed)
    service, rate = problem.service(), problem.load.rate
    length = problem.load.length or problem.length(plan.FINAL, rate)
    outcome = plan.run(problem, service, settings, rate, length)
    return AgainstReport(
        config=str(path),
        settings=_settings(settings),
        at_load=_prediction(rate, outcome, problem.target),
        holds=problem.holds(service, settings, rate, outcome),
        capacity=plan.capacity(problem, service, settings, plan.FINE),
    )


def _settings(settings: Settings) -> SettingsReport:
    fields: dict[str, Any] = dataclasses.asdict(settings)
    return SettingsReport(**fields)


def _prediction(rate: float, outcome: Outcome, target: Target) -> PredictionReport:
    served = len(outcome.latencies) > 0
    p50, p95, p99, of_target = (
        outcome.percentile(percent) * 1000 if served else None for percent in (50, 95, 99, target.percentile)
    )
    return PredictionReport(
        rate=rate,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        target_ms=of_target,
        throughput=outcome.throughput,
        utilisation=outcome.utilisation,
        drop_rate=outcome.drop_rate,
        mean_batch=outcome.mean_batch,
    )


def _overlap(known: Latencies) -> OverlapReport | None:
    phases = known.phases
    if phases is None:
        return None
    parts = (phases.host_to_device, phases.compute, phases.device_to_host)
    one = known.depths.get(1)
    return OverlapReport(
        batch=phases.batch,
        host_to_device_ms=phases.host_to_device,
        compute_ms=phases.compute,
        device_to_host_ms=phases.device_to_host,
        serial_ms=sum(parts),
        bound_ms=max(parts),
        gain=sum(parts) / max(parts),
        measured={depth: one / time for depth, time in known.depths.items()} if one else {},
    )


def _warnings(known: Latencies, request: Request, found: Found, other: Settings | None) -> list[str]:
    warnings = []
    for settings in (found.best.settings, *([other] if other is not None else [])):
        instances = settings.instances
        if instances > 1 and not known.streams:
            warnings.append(
                f"{instances} instances are taken as {instances} times one, as on GPUs of their own: nothing was "
                "measured"
            )
        if known.streams and instances > max(known.streams):
            warnings.append(f"instances were measured up to {max(known.streams)}: more are taken to bring nothing")
        if instances > 1 and 0 < known.streams_batch < settings.max_batch_size:
            warnings.append(
                f"what {instances} instances bring was measured at batch {known.streams_batch}: larger ones leave less "
                "of the GPU for others"
            )
    warnings = list(dict.fromkeys(warnings))
    requests = len(found.at_load.latencies)
    if requests * (1 - request.target.percentile / 100) < 20:
        warnings.append(
            f"{requests} requests are few for a p{request.target.percentile:g}: a longer trace would tell more"
        )
    return warnings


def _too_slow(report: PlanReport, ceiling: float) -> SpeedError:
    met, target = report.at_load, report.target
    if met.target_ms is None or met.drop_rate > target.max_drop:
        reason = f"{met.drop_rate:.2%} of requests are refused"
    elif met.target_ms > target.milliseconds:
        reason = f"p{target.percentile:g} is {digits(met.target_ms, 4)} ms, {target.milliseconds:g} ms are allowed"
    else:
        reason = f"at most {ceiling:.6g} requests/s can be served, and the queue grows as long as the load lasts"
    return SpeedError(
        f"no settings hold {report.load.rate:.6g} requests/s: {reason}",
        f"They carry {report.capacity:.6g} requests/s: spread the load over "
        f"{-(-report.load.rate // max(report.capacity, 1e-9)):.0f} GPUs, or raise --target.",
    )
