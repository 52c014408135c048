"""May it ship? Every limit of a recipe against what a report says: pure functions of the two.

A gate whose value is not known does not pass: a pipeline that asks for a limit wants to see it kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from gpuopt.errors import AccuracyError, DataError, GpuoptError, PrecisionError, ResourceError, SpeedError
from gpuopt.recipe import Recipe
from gpuopt.report.model import BenchmarkReport, EngineReport, GateReport, Report

Sense = Literal["at least", "at most"]

_NOT_MEASURED = "speed was not measured: --benchmark"
_ERRORS: Mapping[str, type[GpuoptError]] = {
    "accuracy_drop": AccuracyError,
    "cosine": AccuracyError,
    "sqnr_db": AccuracyError,
    "batch_relative_error": AccuracyError,
    "verification_failures": AccuracyError,
    "precision_coverage": PrecisionError,
    "int8_vs_fp16": SpeedError,
    "latency_p50_ms": SpeedError,
    "latency_p90_ms": SpeedError,
    "latency_p95_ms": SpeedError,
    "latency_p99_ms": SpeedError,
    "latency_vs_fp16": SpeedError,
    "throughput_samples_per_second": SpeedError,
    "engine_size_bytes": ResourceError,
    "device_memory_bytes": ResourceError,
    "build_seconds": ResourceError,
    "calibration_warnings": DataError,
}
NAMES = tuple(_ERRORS)
"""Stable names of all gates, in their order in a report."""
_HINTS: Mapping[type[GpuoptError], str] = {
    AccuracyError: "The report's accuracy table shows where; more or better calibration data or FP16 help.",
    PrecisionError: "The report's layer table shows what is not; 'gpuopt quantize --explain' says why.",
    SpeedError: "See the report's benchmark; 'gpuopt profile' shows the layers, --precision auto keeps the fastest.",
    ResourceError: "Raise the limit, or choose a smaller precision, batch or --optimization-level.",
    DataError: "The report lists the findings; look at the calibration data.",
}


def evaluate(report: Report, recipe: Recipe) -> list[GateReport]:
    """All gates of a run, in the order of `NAMES`.

    Args:
        report: of the run; its own gates play no part.
    """
    found = [*accuracy_gates(report, recipe), *_speed(report, recipe), *_resources(report, recipe)]
    found += _calibration(report, recipe)
    return sorted(found, key=lambda gate: NAMES.index(gate.name))


def accuracy_gates(report: Report, recipe: Recipe) -> list[GateReport]:
    """The gates of accuracy and precision alone, which `gpuopt verify` can judge again."""
    found = [*_budget(report, recipe)]
    if report.verification is not None:
        for graph in dict.fromkeys(row["graph"] for row in report.verification["outputs"]):
            rows = [row for row in report.verification["outputs"] if row["graph"] == graph]
            invariance = report.verification["batch_invariance"].get(graph, {})
            failures = [text for text in report.verification["failures"] if text.startswith(f"{graph},")]
            found += _compared(graph, rows, invariance, failures, report.verification["limits"])
    proofs = [engine for engine in report.engines if engine.proof is not None]
    for engine in proofs:
        proof = engine.proof or {}
        found += _compared(engine.file, proof["outputs"], proof["batch_invariance"], proof["failures"], proof["limits"])
    share = recipe.verify.min_precision_coverage
    if share is not None:
        for engine in proofs:
            times = (engine.proof or {})["coverage"]["time_share"] or {}
            found.append(_at_least("precision_coverage", engine.file, times.get(report.precision, 0.0), share, "share"))
        if not proofs:
            found.append(_unknown("precision_coverage", "", share, "at least", "share", "no engine was run"))
    return found


def first_failure(gates: Sequence[GateReport]) -> GpuoptError | None:
    """The error of the first gate that does not pass; None if all do."""
    failed = [gate for gate in gates if gate.verdict != "passed"]
    if not failed:
        return None
    kind = _ERRORS[failed[0].name]
    more = f" (and {len(failed) - 1} more gates)" if len(failed) > 1 else ""
    return kind(f"gate {describe(failed[0])}{more}", _HINTS[kind])


def settle(
    gates: Sequence[GateReport], mode: Literal["fail", "warn"], error: GpuoptError | None
) -> tuple[GpuoptError | None, list[str]]:
    """What a finished run ends in, and what it only warns of.

    Args:
        error: of a limit that was checked before the gates; it comes first.
    """
    if mode == "fail":
        return error or first_failure(gates), []
    said = [f"gate {describe(gate)}" for gate in gates if gate.verdict != "passed"]
    return None, said or ([error.message] if error is not None else [])


def describe(gate: GateReport) -> str:
    """A gate as one line: `latency_p99_ms of model.onnx: 6.1 ms, at most 5 ms`."""
    of = f" of {gate.target}" if gate.target else ""
    where = f" ({gate.where})" if gate.where else ""
    found = f"{shown(gate.value, gate.unit)}" if gate.value is not None else f"unknown, {gate.reason}"
    return f"{gate.name}{of}{where}: {found}, {gate.sense} {shown(gate.limit, gate.unit)}"


def shown(value: float, unit: str) -> str:
    """A value of a gate with its unit."""
    if unit == "share":
        return f"{value:.1%}"
    if unit == "bytes":
        return f"{value / 2**20:.1f} MiB"
    return f"{value:.5g} {unit}".strip()


def _budget(report: Report, recipe: Recipe) -> Iterator[GateReport]:
    limit = recipe.accuracy.max_drop
    if limit is None or report.precision != "int8":
        return
    found = report.facts("fallback")
    if not found:
        yield _unknown("accuracy_drop", "", limit, "at most", "", "the search for what falls back did not finish")
        return
    value = report.facts("confirm").get("value", found["final"])
    yield _at_most("accuracy_drop", "", found["fp32"] - value, limit, "", where=str(found["metric"]))


def _compared(
    file: str,
    rows: Sequence[Mapping[str, Any]],
    invariance: Mapping[str, Any],
    failures: Sequence[str],
    limits: Mapping[str, Any],
) -> Iterator[GateReport]:
    """Gates of one file's outputs against the original model's."""
    for name, limit, unit in (("cosine", limits["min_cosine"], ""), ("sqnr_db", limits["min_sqnr_db"], "dB")):
        known = [row for row in rows if row[name] is not None and math.isfinite(row[name])]
        if limit is not None and known:
            worst = min(known, key=lambda row: float(row[name]))
            where = f"{worst['corner']}, output '{worst['output']}'"
            yield _at_least(name, file, worst[name], limit, unit, where=where)
    if invariance.get("checked"):
        value, limit = invariance["worst_relative_error"], limits["batch_tolerance"]
        yield _at_most("batch_relative_error", file, value, limit, "")
    yield _at_most("verification_failures", file, len(failures), 0, "")


def _speed(report: Report, recipe: Recipe) -> Iterator[GateReport]:
    gates, race = recipe.gates, report.race or {}
    ratio = race.get("ratio_to_fp16", {}).get(report.precision)
    if report.precision == "int8" and recipe.precision == "int8" and ratio is not None:
        yield _at_most("int8_vs_fp16", "", ratio["low"], 1.0, "times", where="lower end of the interval")
    if gates.max_latency_vs_fp16 is not None:
        yield _against_fp16(report, ratio, gates.max_latency_vs_fp16)
    for percentile, limit in gates.max_latency_ms.items():
        name = f"latency_{percentile}_ms"
        for one in report.benchmarks:
            yield _at_most(name, one.file, getattr(one, name).value, limit, "ms", where=_place(one))
        if not report.benchmarks:
            yield _unknown(name, "", limit, "at most", "ms", _NOT_MEASURED)
    if gates.min_throughput is not None:
        name = "throughput_samples_per_second"
        for one in report.benchmarks:
            value = one.throughput_samples_per_second.value
            yield _at_least(name, one.file, value, gates.min_throughput, "samples/s", where=_place(one))
        if not report.benchmarks:
            yield _unknown(name, "", gates.min_throughput, "at least", "samples/s", _NOT_MEASURED)


def _against_fp16(report: Report, ratio: Mapping[str, float] | None, limit: float) -> GateReport:
    name = "latency_vs_fp16"
    if report.precision == "fp16":
        return _at_most(name, "", 1.0, limit, "times")
    if ratio is None:
        return _unknown(name, "", limit, "at most", "times", "FP16 was not timed beside it")
    return _at_most(name, "", ratio["value"], limit, "times")


def _resources(report: Report, recipe: Recipe) -> Iterator[GateReport]:
    gates = recipe.gates
    if gates.max_engine_size is not None:
        for engine in _deployed(report):
            yield _at_most("engine_size_bytes", engine.file, engine.size_bytes, gates.max_engine_size, "bytes")
        if not report.engines:
            reason = "nothing was built"
            yield _unknown("engine_size_bytes", "", gates.max_engine_size, "at most", "bytes", reason)
    if gates.max_device_memory is not None:
        limit = gates.max_device_memory
        for one in report.benchmarks:
            if one.device_memory_bytes is not None:
                yield _at_most("device_memory_bytes", one.file, one.device_memory_bytes, limit, "bytes")
        if all(one.device_memory_bytes is None for one in report.benchmarks):
            yield _unknown("device_memory_bytes", "", limit, "at most", "bytes", "no engine was run on a GPU")
    if gates.max_build_seconds is not None:
        builds = [stage.facts for stage in report.stages if stage.name == "build"]
        for facts in builds:
            yield _at_most("build_seconds", facts["file"], facts["build_seconds"], gates.max_build_seconds, "s")
        if not builds:
            yield _unknown("build_seconds", "", gates.max_build_seconds, "at most", "s", "no engine was built")


def _deployed(report: Report) -> Sequence[EngineReport]:
    """The engines; where there is none, the ONNX Runtime model."""
    engines = [engine for engine in report.engines if engine.target != "onnxruntime"]
    return engines or report.engines


def _calibration(report: Report, recipe: Recipe) -> Iterator[GateReport]:
    limit = recipe.gates.max_calibration_warnings
    if limit is not None:
        count = sum(len(stage.warnings) for stage in report.stages if stage.name == "calibrate")
        yield _at_most("calibration_warnings", "", count, limit, "")


def _place(one: BenchmarkReport) -> str:
    return f"batch {one.batch}, {one.where}"


def _at_most(name: str, target: str, value: float, limit: float, unit: str, where: str = "") -> GateReport:
    return _gate(name, target, value, limit, "at most", unit, where)


def _at_least(name: str, target: str, value: float, limit: float, unit: str, where: str = "") -> GateReport:
    return _gate(name, target, value, limit, "at least", unit, where)


def _gate(name: str, target: str, value: float, limit: float, sense: Sense, unit: str, where: str) -> GateReport:
    margin = limit - value if sense == "at most" else value - limit
    return GateReport(
        name=name,
        target=target,
        where=where,
        verdict="passed" if margin >= 0 else "failed",
        value=value,
        limit=limit,
        margin=margin,
        sense=sense,
        unit=unit,
        reason="",
        exit_code=_ERRORS[name].exit_code,
    )


def _unknown(name: str, target: str, limit: float, sense: Sense, unit: str, reason: str) -> GateReport:
    return GateReport(
        name=name,
        target=target,
        where="",
        verdict="unknown",
        value=None,
        limit=limit,
        margin=None,
        sense=sense,
        unit=unit,
        reason=reason,
        exit_code=_ERRORS[name].exit_code,
    )
