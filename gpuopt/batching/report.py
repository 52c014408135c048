"""What `gpuopt plan-batching` answers: one document, its text, and the block for `config.pbtxt`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gpuopt.durations import digits, written
from gpuopt.errors import DataError, first_problem
from gpuopt.storage import storage_errors


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SettingsReport(_Part):
    """The batcher's settings, by the names of `config.pbtxt`; 0 and empty: not set."""

    max_batch_size: int
    preferred_batch_size: tuple[int, ...] = ()
    max_queue_delay_microseconds: int = 0
    instances: int = 1
    preserve_ordering: bool = False
    max_queue_size: int = 0
    queue_timeout_microseconds: int = 0
    timeout_action: Literal["REJECT", "DELAY"] = "REJECT"


class LoadReport(_Part):
    """Requests a second, and how they are spread; `burstiness` is the gaps' coefficient of variation."""

    distribution: str
    rate: float
    burstiness: float
    requests: int


class TargetReport(_Part):
    percentile: float
    milliseconds: float
    max_drop: float


class PredictionReport(_Part):
    """What a rate meets: latencies from arrival to response, milliseconds; utilisation of all instances.

    The latencies are None where no request was served.
    """

    rate: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    target_ms: float | None
    throughput: float
    utilisation: float
    drop_rate: float
    mean_batch: float


class InstancesReport(_Part):
    """The most that a number of instances carries within the target, requests a second."""

    instances: int
    capacity: float


class OverlapReport(_Part):
    """What overlapping copies with computing brings at one batch size, milliseconds.

    Attributes:
        serial: copy in, compute, copy out, one after the other.
        bound: the longest of the three: an inference cannot take less, however many overlap.
        gain: serial over bound.
        measured: throughput over that of one in flight, by how many are; empty: not measured.
    """

    batch: int
    host_to_device_ms: float
    compute_ms: float
    device_to_host_ms: float
    serial_ms: float
    bound_ms: float
    gain: float
    measured: dict[int, float]


class AgainstReport(_Part):
    """Other settings beside the plan's."""

    config: str
    settings: SettingsReport
    at_load: PredictionReport
    holds: bool
    capacity: float


class PlanReport(_Part):
    """A plan.

    Attributes:
        capacity: the greatest rate at which the settings hold the target, requests a second.
        knee: the rate where throughput over mean latency is greatest (Kleinrock's power).
        instances: the most that each number of instances carries.
        advised_queue_size: a limit with which half as much again as the capacity is answered in time, at least a batch.
        config: the block for `config.pbtxt`.
    """

    schema_version: Literal[1] = 1
    command: list[str]
    gpuopt_version: str
    latencies: str
    on_cpu: bool
    load: LoadReport
    target: TargetReport
    settings: SettingsReport
    capacity: float
    holds: bool
    at_load: PredictionReport
    load_range: list[PredictionReport]
    knee: float
    instances: list[InstancesReport]
    overlap: OverlapReport | None
    against: AgainstReport | None
    advised_queue_size: int
    config: str
    warnings: list[str]
    seconds: float


def read(path: Path) -> PlanReport:
    """A plan that was written before.

    Raises:
        StorageError: it cannot be read.
        DataError: it is none.
    """
    try:
        with storage_errors("read", path):
            return PlanReport.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(
            f"{path} is no plan: {first_problem(error)}", "Name what 'gpuopt plan-batching --output' wrote."
        ) from error


def render(plan: PlanReport) -> str:
    """The plan as plain text."""
    return "\n".join(_lines(plan))


def settings_text(settings: SettingsReport) -> str:
    """Settings on one line."""
    parts = [f"max_batch_size {settings.max_batch_size}"]
    if settings.preferred_batch_size:
        parts.append("preferred " + "/".join(str(size) for size in settings.preferred_batch_size))
    parts.append(f"delay {written(settings.max_queue_delay_microseconds)}")
    parts.append(f"{settings.instances} instance{'s' if settings.instances > 1 else ''}")
    if settings.preserve_ordering:
        parts.append("in order")
    if settings.max_queue_size:
        parts.append(f"queue {settings.max_queue_size}")
    if settings.queue_timeout_microseconds:
        parts.append(f"timeout {written(settings.queue_timeout_microseconds)} {settings.timeout_action}")
    return ", ".join(parts)


def _lines(plan: PlanReport) -> Iterator[str]:
    target = f"p{plan.target.percentile:g} of {plan.target.milliseconds:g} ms"
    yield f"latencies  {plan.latencies}"
    yield f"load       {plan.load.rate:.6g} requests/s, {plan.load.distribution}, {plan.load.requests} simulated"
    yield f"settings   {settings_text(plan.settings)}"
    yield f"capacity   {plan.capacity:.6g} requests/s within {target}; knee at {plan.knee:.6g}"
    verdict = "holds" if plan.holds else "does not hold"
    yield f"this load  {verdict} {target}"
    yield ""
    yield from _table([("this load", plan.at_load)])
    if plan.against is not None:
        yield from _table([(plan.against.config, plan.against.at_load)])[1:]
        yield (
            f"{plan.against.config}: {settings_text(plan.against.settings)}; "
            f"carries {plan.against.capacity:.6g} requests/s within the target"
        )
    yield ""
    yield from _table([(_share(point, plan), point) for point in plan.load_range[::2]])
    yield ""
    best = plan.settings.instances
    told = ", ".join(f"{entry.instances}: {entry.capacity:.6g}" for entry in plan.instances)
    pays = "one instance is enough" if best == 1 else f"{best} instances pay"
    yield f"instances  {pays} (requests/s by instances, within the target: {told})"
    if plan.overlap is not None:
        yield _overlap(plan.overlap)
    yield f"overload   --max-queue-size {plan.advised_queue_size} refuses what could not be answered in time"
    yield ""
    yield plan.config.rstrip()


def _share(point: PredictionReport, plan: PlanReport) -> str:
    return f"{point.rate / plan.capacity:.0%} of capacity"


def _table(rows: list[tuple[str, PredictionReport]]) -> list[str]:
    heads = ("requests/s", "p50 ms", "p95 ms", "p99 ms", "served/s", "busy", "refused", "batch")
    lines = [f"{'':<18}" + "".join(f"{head:>11}" for head in heads)]
    for name, row in rows:
        times = ("none" if time is None else digits(time, 4) for time in (row.p50_ms, row.p95_ms, row.p99_ms))
        cells = (
            digits(row.rate, 5), *times, digits(row.throughput, 5), f"{row.utilisation:.1%}", f"{row.drop_rate:.2%}",
            f"{row.mean_batch:.3g}",
        )  # fmt: skip
        lines.append(f"{name[-17:]:<18}" + "".join(f"{cell:>11}" for cell in cells))
    return lines


def _overlap(overlap: OverlapReport) -> str:
    measured = ", ".join(f"{depth} in flight {gain:.2f}x" for depth, gain in overlap.measured.items() if depth > 1)
    return (
        f"overlap    copies {overlap.host_to_device_ms:.3g} + {overlap.device_to_host_ms:.3g} ms, compute "
        f"{overlap.compute_ms:.3g} ms at batch {overlap.batch}: at most {overlap.gain:.2f}x"
        + (f"; measured: {measured}" if measured else "; not measured (bench --only overlap)")
    )
