"""The document of a sweep: a row a combination, and which of them nothing else beats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from gpuopt.artifact import ENGINE_ONNX_FILE, ONNX_FILE
from gpuopt.report.model import EngineReport, Failure, Report


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(_Part):
    """A combination and what came of it.

    Attributes:
        key: hash of everything that decides the result; None: not all of it can be known, and it is made each time.
        reused: whether an earlier sweep made it.
        file: what is deployed: the engine, or the ONNX Runtime model.
        engine_status: `verified`, `built` where it could not run, or `failed`.
        lowest_sqnr_db, lowest_cosine: of all outputs at all corners, against the original model; of the engine where it
            ran, else of the graph that it was built from. None: exact, or not known.
        latency_p50_ms: of one inference, where it was measured; `measured_on` says on what.
        milliseconds_per_sample: the same over the batch.
        on_front: whether no other combination of its model is as near and as fast (or, where latency was not measured,
            as small), and better in one of the two.
        bundle: folder or URL; None where there is none.
        attempts: how often it was begun.
    """

    name: str
    model: str
    precision: str
    target: str
    target_label: str
    gpu: str
    batch: int | None
    key: str | None
    status: Literal["passed", "failed"]
    error: Failure | None
    reused: bool
    file: str | None
    engine_status: str | None
    size_bytes: int | None
    lowest_sqnr_db: float | None
    lowest_cosine: float | None
    latency_p50_ms: float | None
    milliseconds_per_sample: float | None
    measured_on: str | None
    on_front: bool = False
    bundle: str | None
    manifest_sha256: str | None
    seconds: float
    attempts: int


class SweepReport(_Part):
    """A finished sweep; `gpuopt schema sweep` is its schema."""

    schema_version: Literal[1] = 1
    command: list[str]
    gpuopt_version: str
    created: str
    status: Literal["passed", "failed"]
    error: Failure | None
    output: str
    ran_on: str
    rows: list[Row]
    warnings: list[str]
    seconds: float


def figures(report: Report, target: str) -> dict[str, Any]:
    """What a row takes from the report of a compilation."""
    engine = next((one for one in report.engines if one.target == target), None)
    if engine is None:
        return {}
    outputs = _compared(report, engine)
    benchmark = next((one for one in report.benchmarks if one.file == engine.file), None)
    found: dict[str, Any] = {
        "file": engine.file,
        "engine_status": engine.status,
        "size_bytes": engine.size_bytes,
        "lowest_sqnr_db": _lowest(row.get("sqnr_db") for row in outputs),
        "lowest_cosine": _lowest(row.get("cosine") for row in outputs),
    }
    if benchmark is not None:
        milliseconds = benchmark.latency_p50_ms.value
        found["latency_p50_ms"] = milliseconds
        found["milliseconds_per_sample"] = milliseconds / benchmark.batch if benchmark.batch else None
        found["measured_on"] = benchmark.where
    return found


def _compared(report: Report, engine: EngineReport) -> list[dict[str, Any]]:
    """The comparisons with the original model: the engine's own, else those of the graph that it was built from."""
    if engine.proof is not None:
        return [row for row in engine.proof.get("outputs", []) if isinstance(row, dict)]
    rows = [row for row in (report.verification or {}).get("outputs", []) if isinstance(row, dict)]
    graphs = {row.get("graph") for row in rows}
    built_from = ENGINE_ONNX_FILE if engine.target != "onnxruntime" and ENGINE_ONNX_FILE in graphs else ONNX_FILE
    return [row for row in rows if row.get("graph", built_from) == built_from]


def _lowest(values: Iterable[Any]) -> float | None:
    known = [float(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    return min(known, default=None)


EXACT_DB = 200.0
"""Where an SQNR is not given since there is no noise: beyond what FP32 can tell."""


def cost(row: Row, by_latency: bool) -> float | None:
    """What the front weighs accuracy against: milliseconds a sample, or bytes."""
    return row.milliseconds_per_sample if by_latency else row.size_bytes


def has_latencies(rows: Sequence[Row]) -> bool:
    """Whether every row that passed was measured, all of them on the same machine."""
    passed = [row for row in rows if row.status == "passed"]
    places = {row.measured_on for row in passed}
    return bool(passed) and None not in places and len(places) == 1


def with_front(rows: Sequence[Row]) -> list[Row]:
    """The rows, those marked that no other of their model dominates (Pareto): distance against cost."""
    marked: list[Row] = []
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row.model, []).append(row)
    for row in rows:
        family = [other for other in by_model[row.model] if other.status == "passed"]
        by_latency = has_latencies(family)
        ours = _point(row, by_latency) if row.status == "passed" else None
        points: Mapping[str, tuple[float, float] | None] = {one.name: _point(one, by_latency) for one in family}
        beaten = ours is None or any(point is not None and _dominates(point, ours) for point in points.values())
        marked.append(row.model_copy(update={"on_front": not beaten}))
    return marked


def _point(row: Row, by_latency: bool) -> tuple[float, float] | None:
    """Cost and distance, both the less the better."""
    weighed = cost(row, by_latency)
    if weighed is None:
        return None
    return weighed, -(row.lowest_sqnr_db if row.lowest_sqnr_db is not None else EXACT_DB)


def _dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other
