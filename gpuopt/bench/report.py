"""What `gpuopt bench` answers: one document, and its table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from gpuopt.bench.measuring import Measurement
from gpuopt.bench.statistics import Percentile


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PercentileReport(_Part):
    """A percentile with its 95 % confidence interval, milliseconds."""

    value: float
    low: float | None
    high: float | None


class Row(_Part):
    """One thing that was measured.

    Attributes:
        group: `latency`, `phases`, `overlap`, `streams`, `beside`, `batches` or `baselines`.
        name: what it is.
        batch: samples in one inference.
        includes: what one inference is made of.
        count: timed single inferences.
        latency_ms: p50, p90, p95, p99 of single inferences, each waited for; empty where only throughput is measured.
        back_to_back_ms: milliseconds an inference, the next one enqueued before the last has ended; lowest and highest
            round beside it.
        samples_per_second: from `back_to_back_ms`.
        failed: why there are no figures; empty if there are.
    """

    group: str
    name: str
    batch: int
    includes: str
    count: int = 0
    latency_ms: dict[str, PercentileReport] = {}
    back_to_back_ms: float | None = None
    lowest_ms: float | None = None
    highest_ms: float | None = None
    samples_per_second: float | None = None
    was_steady: bool | None = None
    failed: str = ""


THE_CPU = "the CPU"


class BenchReport(_Part):
    """A run of `gpuopt bench`.

    Attributes:
        target, library_version: of the engine; those of ONNX Runtime here, where there are baselines alone.
        gpu: that the engine ran on; the first of the machine where there are baselines alone, or `THE_CPU`.
    """

    schema_version: Literal[1] = 1
    command: list[str]
    gpuopt_version: str
    created: str
    subject: str
    sha256: str
    target: str
    library_version: str
    gpu: str
    shapes: dict[str, str]
    rows: list[Row]
    memory: dict[str, Any]
    conditions: dict[str, Any]
    warnings: list[str]
    environment: dict[str, Any]
    seconds: float


def row(group: str, name: str, batch: int, includes: str, found: Measurement) -> Row:
    """A measurement as a row."""
    return Row(
        group=group,
        name=name,
        batch=batch,
        includes=includes,
        count=found.latency.count,
        latency_ms={f"p{percent}": _percentile(p) for percent, p in found.latency.percentiles.items()},
        back_to_back_ms=found.back_to_back_ms,
        lowest_ms=found.back_to_back_spread[0],
        highest_ms=found.back_to_back_spread[1],
        samples_per_second=batch / found.back_to_back_ms * 1000,
        was_steady=found.was_steady,
    )


def throughput_row(group: str, name: str, batch: int, includes: str, rounds: Iterable[float]) -> Row:
    """Rounds of milliseconds an inference, without latencies of single ones."""
    ordered = sorted(rounds)
    median = ordered[len(ordered) // 2]
    return Row(
        group=group,
        name=name,
        batch=batch,
        includes=includes,
        back_to_back_ms=median,
        lowest_ms=ordered[0],
        highest_ms=ordered[-1],
        samples_per_second=batch / median * 1000,
    )


def _percentile(found: Percentile) -> PercentileReport:
    return PercentileReport(value=found.value, low=found.low, high=found.high)


def render(report: BenchReport) -> str:
    """The report as plain text: a table a group, then memory and conditions."""
    return "\n".join(_lines(report))


def _lines(report: BenchReport) -> Iterator[str]:
    shapes = ", ".join(f"{name} {shape}" for name, shape in report.shapes.items())
    if all(entry.group == "baselines" for entry in report.rows):
        where = "without an NVIDIA GPU" if report.gpu == THE_CPU else f"with {report.gpu}"
        yield f"{report.subject}: baselines alone, on a machine {where}; {shapes}"
    else:
        yield f"{report.subject}: {report.target} {report.library_version} on {report.gpu}; {shapes}"
    group = ""
    width = max((len(entry.name) for entry in report.rows), default=20) + 2
    for entry in report.rows:
        if entry.group != group:
            group = entry.group
            yield ""
            heads = "".join(f"{name:>10}" for name in (*_SHOWN, "ms/inf"))
            yield f"{group:<{width}}{'batch':>6}{heads}{'lowest .. highest':>20}{'samples/s':>12}"
        if entry.failed:
            yield f"{entry.name:<{width}}{entry.batch:>6}  {entry.failed}"
            continue
        cells = "".join(f"{_ms(entry.latency_ms.get(name)):>10}" for name in _SHOWN)
        rate = f"{entry.samples_per_second:.0f}" if entry.samples_per_second is not None else "-"
        back = f"{entry.back_to_back_ms:.4f}" if entry.back_to_back_ms is not None else "-"
        spread = f"{entry.lowest_ms:.4f} .. {entry.highest_ms:.4f}" if entry.lowest_ms is not None else "-"
        yield f"{entry.name:<{width}}{entry.batch:>6}{cells}{back:>10}{spread:>20}{rate:>12}"
    yield ""
    yield "p50 to p99: ms of single inferences by the host's clock, each waited for; ms/inf: back to back"
    told: dict[str, dict[str, None]] = {}
    for entry in report.rows:
        if entry.includes:
            told.setdefault(entry.includes, {})[entry.name] = None
    yield from (f"{', '.join(names)}: {includes}" for includes, names in told.items())
    if report.memory:
        yield ""
        yield "memory  " + ", ".join(f"{name} {value}" for name, value in report.memory.items())
    spans = [f"{name} {value}" for name, value in report.conditions.items() if value]
    if spans:
        yield "conditions  " + ", ".join(spans)


_SHOWN = ("p50", "p90", "p95", "p99")


def _ms(found: PercentileReport | None) -> str:
    return "-" if found is None else f"{found.value:.4f}"
