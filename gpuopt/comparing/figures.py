"""The figures of one report that are compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gpuopt.errors import StorageError
from gpuopt.report.model import BenchmarkReport, EngineReport, Estimate, Report

LATENCIES = (50, 90, 95, 99)
EXACT_SQNR_DB = 100.0
"""What counts as exact: beyond it two sums of FP32 differ by their order."""


@dataclass(frozen=True)
class Key:
    """What a figure is about; the same in both reports: `model.Row` has the meaning of each."""

    target: str
    file: str
    name: str
    where: str = ""


@dataclass(frozen=True)
class Figure:
    """A value, or why there is none.

    Attributes:
        is_broken: there is none because the output is no answer.
    """

    value: Estimate | None
    reason: str = ""
    is_broken: bool = False


def of_report(report: Report, name: str = "the report") -> dict[Key, Figure]:
    """Every figure, in the order in which it is shown.

    Args:
        name: what errors call it.

    Raises:
        StorageError: the facts of a stage are not what that stage writes.
    """
    try:
        found = dict(_figures(report))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StorageError(
            f"{name} is damaged: its facts are not what gpuopt writes ({type(error).__name__}: {error})",
            "Compile again.",
        ) from error
    return found


def _figures(report: Report) -> Iterable[tuple[Key, Figure]]:
    for engine in report.engines:
        yield from _accuracy(engine.target, engine.file, _outputs(report, engine))
        if engine.target != "onnxruntime":
            yield from _coverage(engine)
        yield from _speed(engine, benchmark_of(report, engine.target))
        if engine.proof is not None:
            scratch = engine.proof["device_memory_bytes"]
            yield Key(engine.target, engine.file, "scratch_memory_bytes"), Figure(_exact(scratch))
        yield Key(engine.target, engine.file, "engine_size_bytes"), Figure(_exact(engine.size_bytes))
        if engine.target != "onnxruntime":
            yield Key(engine.target, engine.file, "build_seconds"), _build_seconds(report, engine.target)
    files = {engine.file for engine in report.engines}
    for graph in dict.fromkeys(row["graph"] for row in (report.verification or {}).get("outputs", [])):
        if graph not in files:
            yield from _accuracy("", graph, [r for r in (report.verification or {})["outputs"] if r["graph"] == graph])
    yield from _metric(report)
    yield Key("", "", "warnings"), Figure(_exact(len(report.warnings)))


def benchmark_of(report: Report, target: str) -> BenchmarkReport | None:
    """The target's benchmark; None if it was not measured."""
    return next((found for found in report.benchmarks if found.target == target), None)


def _tensor(entry: Mapping[str, Any]) -> str:
    return f"{entry['name']} {entry.get('dtype', '')}".strip()


def interface(report: Report) -> tuple[str, str] | None:
    """Names and dtypes of inputs and outputs in order, as text; None if the report does not tell."""
    facts = report.interface()
    try:
        return (
            ", ".join(_tensor(entry) for entry in facts["inputs"]),
            ", ".join(_tensor(entry) for entry in facts["outputs"]),
        )
    except (KeyError, TypeError):
        return None


def _outputs(report: Report, engine: EngineReport) -> list[Mapping[str, Any]]:
    if engine.proof is not None:
        return list(engine.proof["outputs"])
    return [row for row in (report.verification or {}).get("outputs", []) if row["graph"] == engine.file]


def _accuracy(target: str, file: str, rows: list[Mapping[str, Any]]) -> Iterable[tuple[Key, Figure]]:
    """Of each output the worst over the corners."""
    for output in dict.fromkeys(row["output"] for row in rows):
        mine = [row for row in rows if row["output"] == output]
        whole = all(row.get("finite", True) and row.get("shape_equal", True) for row in mine)
        for name in ("sqnr_db", "cosine", "agreement"):
            values = [_number(row[name]) for row in mine if row[name] is not None]
            # An exact result has no SQNR.
            is_exact = name == "sqnr_db" and any(row["cosine"] is not None for row in mine)
            if not whole:
                if values or name == "sqnr_db":
                    yield Key(target, file, name, output), Figure(None, "NaN, infinity or another shape", True)
            elif values or is_exact:
                worst = min(values, default=EXACT_SQNR_DB)
                if name == "sqnr_db":
                    worst = min(worst, EXACT_SQNR_DB)
                yield Key(target, file, name, output), Figure(_exact(worst))


def _coverage(engine: EngineReport) -> Iterable[tuple[Key, Figure]]:
    shares = engine.proof["coverage"]["time_share"] if engine.proof is not None else None
    for precision, share in sorted((shares or {}).items()):
        yield Key(engine.target, engine.file, "precision_time_share", precision), Figure(_exact(share))


def _speed(engine: EngineReport, found: BenchmarkReport | None) -> Iterable[tuple[Key, Figure]]:
    missing = "no benchmark"
    for percent in LATENCIES:
        key = Key(engine.target, engine.file, f"latency_p{percent}_ms")
        yield key, Figure(getattr(found, f"latency_p{percent}_ms")) if found is not None else Figure(None, missing)
    key = Key(engine.target, engine.file, "throughput_samples_per_second")
    yield key, Figure(found.throughput_samples_per_second) if found is not None else Figure(None, missing)
    if engine.target == "onnxruntime" and (found is None or found.device_memory_bytes is None):
        return
    key = Key(engine.target, engine.file, "device_memory_bytes")
    has_memory = found is not None and found.device_memory_bytes is not None
    yield key, Figure(_exact(found.device_memory_bytes)) if found and has_memory else Figure(None, missing)


def _build_seconds(report: Report, target: str) -> Figure:
    for stage in report.stages:
        if stage.name == "build" and stage.facts["target"] == target:
            return Figure(_exact(stage.facts["build_seconds"]))
    return Figure(None, "it was not built in that run")


def _metric(report: Report) -> Iterable[tuple[Key, Figure]]:
    """The accuracy metric of what ships; the metric and its number of samples are part of what it is."""
    found = report.facts("fallback") or report.facts("measure")
    if found:
        value = report.facts("confirm").get("value", found.get("final", found["int8"]))
        yield Key("", "", "accuracy", f"{found['metric']}, {found['samples']} samples"), Figure(_exact(value))


def _exact(value: Any) -> Estimate:
    return Estimate(value=_number(value), low=None, high=None)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)
