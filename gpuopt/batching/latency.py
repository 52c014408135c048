"""How long a batch takes: from a report of `gpuopt bench`, or from a table of one's own."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpuopt.batching.batcher import QUANTILES, Service
from gpuopt.bench.report import THE_CPU, BenchReport, Row
from gpuopt.errors import DataError, UsageError, first_problem
from gpuopt.storage import storage_errors

_TABLE_HELP = (
    "Give a report of 'gpuopt bench --output', or a CSV with the columns batch and p50_ms (and p90_ms, p99_ms)."
)


@dataclass(frozen=True)
class Phases:
    """Milliseconds of one inference of `batch` samples: copy in, compute, copy out."""

    batch: int
    host_to_device: float
    compute: float
    device_to_host: float


@dataclass(frozen=True)
class Latencies:
    """What is known of the model's speed.

    Attributes:
        origin: where it comes from, for people.
        on_cpu: whether the model ran on a CPU.
        batches: milliseconds by percentile, by batch size.
        phases: of a bench report that has them.
        streams: how many times one instance's throughput so many side by side have; empty: not measured.
        streams_spread: lowest and highest of that, by the rounds' spread.
        streams_batch: samples in an inference of theirs; 0: not measured, or not known.
        depths: measured milliseconds an inference with so many in flight, copies and all; empty: not measured.
        warnings: one line each.
        after_idle: milliseconds that a batch takes longer if its instance had nothing to do before.
    """

    origin: str
    on_cpu: bool
    batches: Mapping[int, Mapping[float, float]]
    phases: Phases | None
    streams: Mapping[int, float]
    streams_spread: Mapping[int, tuple[float, float]]
    streams_batch: int
    depths: Mapping[int, float]
    warnings: tuple[str, ...]
    after_idle: float = 0.0

    @property
    def largest_batch(self) -> int:
        return max(self.batches)

    def milliseconds(self, batch: int) -> dict[float, float]:
        """By percentile; between measured sizes in proportion, copies of a batch added where they are known."""
        sizes = sorted(self.batches)
        percentiles = sorted(set.intersection(*(set(self.batches[size]) for size in sizes)))
        copies = 0.0
        if self.phases is not None:
            each = (self.phases.host_to_device + self.phases.device_to_host) / self.phases.batch
            copies = each * batch
        return {
            percent: float(np.interp(batch, sizes, [self.batches[size][percent] for size in sizes])) + copies
            for percent in percentiles
        }

    def service(self, largest_batch: int, constant_ms: float, instances: int = 1) -> Service:
        """Service times of batches up to a size, seconds, on up to `instances` instances or as many as were measured.

        A quantile between two measured percentiles lies between their times in proportion; below the lowest and beyond
        the highest it is theirs. With n instances at work, of which all together have s times one's throughput, each
        takes n / s as long.
        """
        rows = [np.zeros(QUANTILES)]
        quantiles = (np.arange(QUANTILES) + 0.5) * 100 / QUANTILES
        for batch in range(1, largest_batch + 1):
            known = self.milliseconds(batch)
            rows.append(np.interp(quantiles, list(known), list(known.values())) / 1000)
        slowdown = self.slowdown(max(instances, *self.streams, 1))
        return Service(np.stack(rows), slowdown, constant_ms / 1000, self.after_idle / 1000)

    def slowdown(self, instances: int) -> tuple[float, ...]:
        """Times as long as alone that a batch takes with 1, 2, ... instances at work.

        More than were measured bring nothing; if none were, as many are that many times one.
        """
        if not self.streams:
            return (1.0,) * instances
        counts = sorted({1, *self.streams})
        gains = [self.streams.get(count, 1.0) for count in counts]
        return tuple(max(1.0, n / float(np.interp(n, counts, gains))) for n in range(1, instances + 1))


def read(path: Path) -> Latencies:
    """Read a report of `gpuopt bench`, a JSON table or a CSV table, by content.

    Raises:
        StorageError: it cannot be read.
        DataError: it is none of these, or a value is no time.
        UsageError: the report has no batches.
    """
    with storage_errors("read", path):
        text = path.read_text(encoding="utf-8", errors="replace")
    if text.lstrip().startswith("{"):
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is no JSON: {error}", _TABLE_HELP) from error
        return _of_report(path, document) if "rows" in document else _of_table(path, document)
    return _of_csv(path, text)


class _Table(BaseModel):
    """`{"batches": {"1": 2.0, "8": {"p50": 5.0, "p99": 6.0}}, "streams": {"2": 1.4}, "after_idle": 0.5}`: milliseconds;
    throughput over that of one instance; milliseconds more after idleness."""

    model_config = ConfigDict(extra="forbid")
    batches: dict[int, float | dict[str, float]] = Field(min_length=1)
    streams: dict[int, float] = {}
    after_idle: float = Field(0.0, ge=0)
    on_cpu: bool = False


def _of_table(path: Path, document: Any) -> Latencies:
    try:
        table = _Table.model_validate(document)
    except ValidationError as error:
        raise DataError(f"{path}: {first_problem(error)}", _TABLE_HELP) from error
    batches = {
        size: {50.0: times} if isinstance(times, float) else {_percent(path, p): t for p, t in times.items()}
        for size, times in table.batches.items()
    }
    streams = {1: 1.0, **table.streams} if table.streams else {}
    return _checked(path, Latencies(path.name, table.on_cpu, batches, None, streams, {}, 0, {}, (), table.after_idle))


def _of_csv(path: Path, text: str) -> Latencies:
    try:
        rows = [row for row in csv.reader(io.StringIO(text)) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"{path} is no table of latencies: {error}", _TABLE_HELP) from error
    head = [cell.strip().lower().removesuffix("_ms") for cell in rows[0]] if rows else []
    if "batch" not in head or not any(name.startswith("p") for name in head):
        raise DataError(f"{path} is no table of latencies: its first line is '{','.join(head)[:60]}'", _TABLE_HELP)
    batches: dict[int, dict[float, float]] = {}
    for number, row in enumerate(rows[1:], 2):
        try:
            cells = dict(zip(head, (float(cell) for cell in row), strict=True))
        except ValueError:
            raise DataError(f"{path}, line {number}: not a number in every column", _TABLE_HELP) from None
        if not cells["batch"].is_integer():
            raise DataError(f"{path}, line {number}: batch {cells['batch']:g} is no whole number", _TABLE_HELP)
        batches[int(cells["batch"])] = {_percent(path, n): v for n, v in cells.items() if n.startswith("p")}
    return _checked(path, Latencies(path.name, False, batches, None, {}, {}, 0, {}, ()))


def _percent(path: Path, name: str) -> float:
    try:
        percent = float(name.removeprefix("p").removesuffix("_ms"))
    except ValueError:
        percent = -1.0
    if not 0 <= percent <= 100:
        raise DataError(f"{path}: '{name}' is no percentile", "Write p50, p90, p99.")
    return percent


def _of_report(path: Path, document: Any) -> Latencies:
    try:
        report = BenchReport.model_validate(document)
    except ValidationError as error:
        raise DataError(f"{path} is no report of gpuopt bench: {first_problem(error)}", _TABLE_HELP) from error
    rows = [row for row in report.rows if not row.failed]
    batches = {row.batch: _percentiles(row) for row in rows if row.group == "batches" and row.latency_ms}
    if not batches:
        raise UsageError(
            f"{path} has no latencies of batch sizes", "Measure them: gpuopt bench BUNDLE --only batches --only phases."
        )
    warnings = []
    phases = _phases(rows)
    if phases is None:
        warnings.append(f"{path.name} has no times of copies (bench --only phases): they count as nothing")
    streams, spread = _streams(rows)
    if not streams:
        reason = next((row.failed for row in report.rows if row.group == "streams" and row.failed), "")
        warnings.append(
            f"{path.name} does not say what instances side by side bring"
            + (f": {reason}" if reason else " (bench --only streams)")
        )
    return _checked(
        path,
        Latencies(
            origin=f"{report.subject}, {report.target} {report.library_version} on {report.gpu}",
            on_cpu=report.gpu == THE_CPU,
            batches=batches,
            phases=phases,
            streams=streams,
            streams_spread=spread,
            streams_batch=next((row.batch for row in rows if row.group == "streams"), 0),
            depths={
                int(row.name.split()[1]): row.back_to_back_ms
                for row in rows
                if row.group == "overlap" and row.back_to_back_ms is not None
            },
            warnings=tuple(warnings),
        ),
    )


def _percentiles(row: Row) -> dict[float, float]:
    return {float(name.removeprefix("p")): found.value for name, found in row.latency_ms.items()}


def _phases(rows: Sequence[Row]) -> Phases | None:
    found = {row.name: row for row in rows if row.group == "phases" and row.back_to_back_ms is not None}
    copy_in, compute, copy_out = (found.get(n) for n in ("host to device", "compute", "device to host"))
    if copy_in is None or compute is None or copy_out is None:
        return None
    return Phases(
        compute.batch, copy_in.back_to_back_ms or 0.0, compute.back_to_back_ms or 0.0, copy_out.back_to_back_ms or 0.0
    )


def _streams(rows: Sequence[Row]) -> tuple[dict[int, float], dict[int, tuple[float, float]]]:
    found = {int(row.name.split()[0]): row for row in rows if row.group == "streams" and row.back_to_back_ms}
    one = found.get(1)
    if one is None or one.back_to_back_ms is None or len(found) < 2:
        return {}, {}
    gains, spread = {}, {}
    for count, row in found.items():
        if row.back_to_back_ms is None:
            continue
        gains[count] = one.back_to_back_ms / row.back_to_back_ms
        if None not in (one.lowest_ms, one.highest_ms, row.lowest_ms, row.highest_ms):
            spread[count] = (
                (one.lowest_ms or 0.0) / (row.highest_ms or 1.0),
                (one.highest_ms or 0.0) / (row.lowest_ms or 1.0),
            )
    return gains, spread


def _checked(path: Path, found: Latencies) -> Latencies:
    for size, times in found.batches.items():
        if size < 1 or not times or not all(np.isfinite(time) and time > 0 for time in times.values()):
            raise DataError(f"{path}: batch {size} has no time above zero", "Write milliseconds.")
        ordered = [times[percent] for percent in sorted(times)]
        if ordered != sorted(ordered):
            raise DataError(f"{path}: the percentiles of batch {size} fall", "A higher percentile is not shorter.")
    if not set.intersection(*(set(times) for times in found.batches.values())):
        raise DataError(f"{path}: the batch sizes have no percentile in common", "Give p50 for each.")
    if any(count < 1 or gain <= 0 for count, gain in found.streams.items()):
        raise DataError(
            f"{path}: a gain of streams is not above zero", 'Write {"2": 1.4}: throughput over that of one.'
        )
    return found
