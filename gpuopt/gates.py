"""May it ship? Every limit of a recipe against what a report says: pure functions of the two.

A gate whose value is not known does not pass: a pipeline that asks for a limit wants to see it kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from gpuopt.errors import AccuracyError, DataError, GpuoptError, PrecisionError, ResourceError, SpeedError
from gpuopt.recipe import Recipe
from gpuopt.report.model import BenchmarkReport, GateReport, Report
from gpuopt.tolerance import DROP_ROUNDING, has_ratio, written

Sense = Literal["at least", "at most"]

ON_THE_CPU = "no engine runs here: latency and throughput are those of model.onnx in ONNX Runtime on the CPU"
"""What is said where speed gates of engines are judged by what stands in for them."""
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
_UNKNOWN_HINT = "A value that is not known does not pass: run it where the engine is built and runs, or drop the gate."


def evaluate(report: Report, recipe: Recipe) -> list[GateReport]:
    """All gates of a run, in the order of `NAMES`.

    Args:
        report: of the run; its own gates play no part.
    """
    found = [*_budget(report, recipe), *accuracy_gates(report, recipe), *_speed(report, recipe)]
    found += [*_resources(report, recipe), *_calibration(report, recipe)]
    return sorted(found, key=lambda gate: NAMES.index(gate.name))


def accuracy_gates(report: Report, recipe: Recipe) -> list[GateReport]:
    """The gates of accuracy and precision that `gpuopt verify` can judge again: a bundle holds no evaluation data."""
    found: list[GateReport] = []
    if report.verification is not None:
        for graph in dict.fromkeys(row["graph"] for row in report.verification["outputs"]):
            rows = [row for row in report.verification["outputs"] if row["graph"] == graph]
            invariance = report.verification["batch_invariance"].get(graph, {})
            failures = [text for text in report.verification["failures"] if text.startswith(f"{graph},")]
            found += _compared(graph, rows, invariance, failures, report.verification["limits"])
    proofs = {engine.target: engine for engine in report.engines if engine.proof is not None}
    for engine in proofs.values():
        proof = engine.proof or {}
        found += _compared(engine.file, proof["outputs"], proof["batch_invariance"], proof["failures"], proof["limits"])
    if report.verification is None and not proofs:
        found += _not_compared(recipe)
    share = recipe.verify.min_precision_coverage
    if share is not None:
        for engine in proofs.values():
            times = (engine.proof or {})["coverage"]["time_share"] or {}
            found.append(_at_least("precision_coverage", engine.file, times.get(report.precision, 0.0), share, "share"))
        for target in _missing(recipe, proofs):
            found.append(_unknown("precision_coverage", target, share, "at least", "share", "no engine was run"))
    return found


def _missing(recipe: Recipe, present: Collection[str]) -> list[str]:
    """Targets of engines that a recipe asks for and that are not there; an empty name where it asks for none."""
    asked = [target for target in recipe.build.target if target != "onnxruntime"]
    if not asked:
        return [] if present else [""]
    return [target for target in asked if target not in present]


def _not_compared(recipe: Recipe) -> Iterator[GateReport]:
    """Limits that were set for outputs which nobody looked at."""
    reason = "outputs were not compared: verify.enabled is false"
    if recipe.verify.min_cosine is not None:
        yield _unknown("cosine", "", recipe.verify.min_cosine, "at least", "", reason)
    if recipe.verify.min_sqnr_db is not None:
        yield _unknown("sqnr_db", "", recipe.verify.min_sqnr_db, "at least", "dB", reason)


def stand_ins(report: Report, recipe: Recipe) -> list[str]:
    """What is to be said of speed gates that were judged by another file than the engines that were asked for."""
    judged = bool(recipe.gates.max_latency_ms) or recipe.gates.min_throughput is not None
    wants_engine = any(target != "onnxruntime" for target in recipe.build.target)
    measured = {one.target for one in report.benchmarks}
    return [ON_THE_CPU] if judged and wants_engine and measured == {"onnxruntime"} else []


def first_failure(gates: Sequence[GateReport]) -> GpuoptError | None:
    """The error of the first gate that does not pass; None if all do."""
    failed = [gate for gate in gates if gate.verdict != "passed"]
    if not failed:
        return None
    kind = _ERRORS[failed[0].name]
    more = f" (and {len(failed) - 1} more gates)" if len(failed) > 1 else ""
    hint = _UNKNOWN_HINT if failed[0].verdict == "unknown" else _HINTS[kind]
    return kind(f"gate {describe(failed[0])}{more}", hint)


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
    unknown = gate.reason if gate.verdict == "failed" else f"unknown, {gate.reason}"
    found = shown(gate.value, gate.unit) if gate.value is not None else unknown
    return f"{gate.name}{of}{where}: {found}, {gate.sense} {shown(gate.limit, gate.unit)}"


def shown(value: float, unit: str) -> str:
    """A value of a gate with its unit."""
    if unit == "share":
        return f"{value:.1%}"
    if unit == "bytes":
        return _bytes(value)
    return f"{value:.6g} {unit}" if unit else written(value)


def _bytes(size: float) -> str:
    """A size, or a difference of sizes, in binary units, with the digits that tell a value from its limit."""
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))
    unit, divisor = next(((name, one) for name, one in units if abs(size) >= one), ("B", 1))
    return f"{size / divisor:.4g} {unit}"


def _budget(report: Report, recipe: Recipe) -> Iterator[GateReport]:
    limit = recipe.accuracy.max_drop
    if limit is None or report.precision != "int8":
        return
    found = report.facts("fallback")
    if not found:
        yield _unknown("accuracy_drop", "", limit, "at most", "", "the search for what falls back did not finish")
        return
    value = report.facts("confirm").get("value", found["final"])
    drop = found["fp32"] - value
    # What the search took for rounding is none here either.
    if limit < drop <= limit + DROP_ROUNDING:
        drop = limit
    yield _at_most("accuracy_drop", "", drop, limit, "", where=str(found["metric"]))


def _compared(
    file: str,
    rows: Sequence[Mapping[str, Any]],
    invariance: Mapping[str, Any],
    failures: Sequence[str],
    limits: Mapping[str, Any],
) -> Iterator[GateReport]:
    """Gates of one file's outputs against the original model's."""
    broken = next((row for row in rows if not row["shape_equal"] or not row["finite"]), None)
    for name, limit, unit in (("cosine", limits["min_cosine"], ""), ("sqnr_db", limits["min_sqnr_db"], "dB")):
        known = [row for row in rows if has_ratio(row) and row[name] is not None]
        if limit is None or not (known or broken):
            continue
        if broken is not None:
            reason = "another shape" if not broken["shape_equal"] else "NaN or infinity"
            yield _failed(name, file, limit, "at least", unit, f"{_corner(broken)}: {reason}")
        else:
            worst = min(known, key=lambda row: float(row[name]))
            yield _at_least(name, file, worst[name], limit, unit, where=_corner(worst))
    if invariance.get("checked"):
        value, limit = invariance["worst_relative_error"], invariance.get("tolerance", limits["batch_tolerance"])
        # JSON has no infinity.
        if value is None or not math.isfinite(value):
            yield _failed("batch_relative_error", file, limit, "at most", "", "NaN or infinity in a batch")
        else:
            yield _at_most("batch_relative_error", file, value, limit, "")
    yield _at_most("verification_failures", file, len(failures), 0, "")


def _corner(row: Mapping[str, Any]) -> str:
    return f"{row['corner']}, output '{row['output']}'"


def _speed(report: Report, recipe: Recipe) -> Iterator[GateReport]:
    gates, race = recipe.gates, report.race or {}
    shipped = race.get("chosen", report.precision)
    ratio = race.get("ratio_to_fp16", {}).get(shipped)
    if shipped == "int8" and ratio is not None:
        yield _at_most("int8_vs_fp16", "", ratio["low"], 1.0, "times", where="lower end of the interval")
    if gates.max_latency_vs_fp16 is not None:
        yield _against_fp16(shipped, ratio, gates.max_latency_vs_fp16)
    # ONNX Runtime's model stands in where no engine at all was measured.
    engines = {one.target for one in report.benchmarks if one.target != "onnxruntime"}
    missing = _missing(recipe, engines) if engines else [] if report.benchmarks else [""]
    for percentile, limit in gates.max_latency_ms.items():
        name = f"latency_{percentile}_ms"
        for one in report.benchmarks:
            yield _at_most(name, one.file, getattr(one, name).value, limit, "ms", where=_place(one))
        for target in missing:
            yield _unknown(name, target, limit, "at most", "ms", _NOT_MEASURED)
    if gates.min_throughput is not None:
        name = "throughput_samples_per_second"
        for one in report.benchmarks:
            value = one.throughput_samples_per_second.value
            yield _at_least(name, one.file, value, gates.min_throughput, "samples/s", where=_place(one))
        for target in missing:
            yield _unknown(name, target, gates.min_throughput, "at least", "samples/s", _NOT_MEASURED)


def _against_fp16(shipped: str, ratio: Mapping[str, float] | None, limit: float) -> GateReport:
    name = "latency_vs_fp16"
    if shipped == "fp16":
        return _at_most(name, "", 1.0, limit, "times")
    if ratio is None:
        reason = "FP16 was not timed beside it, which takes INT8 or auto, speed.check, and an engine that runs here"
        return _unknown(name, "", limit, "at most", "times", reason)
    return _at_most(name, "", ratio["value"], limit, "times")


def _resources(report: Report, recipe: Recipe) -> Iterator[GateReport]:
    gates = recipe.gates
    built = {engine.target: engine for engine in report.engines if engine.target != "onnxruntime"}
    if gates.max_engine_size is not None:
        deployed = built if _missing(recipe, ()) != [""] else {engine.target: engine for engine in report.engines}
        for engine in deployed.values():
            yield _at_most("engine_size_bytes", engine.file, engine.size_bytes, gates.max_engine_size, "bytes")
        for target in _missing(recipe, deployed):
            yield _unknown("engine_size_bytes", target, gates.max_engine_size, "at most", "bytes", "it was not built")
    if gates.max_device_memory is not None:
        limit, run = gates.max_device_memory, set[str]()
        for one in report.benchmarks:
            if one.device_memory_bytes is not None:
                run.add(one.target)
                yield _at_most("device_memory_bytes", one.file, one.device_memory_bytes, limit, "bytes")
        for target in _missing(recipe, run):
            yield _unknown("device_memory_bytes", target, limit, "at most", "bytes", "no engine was run on a GPU")
    if gates.max_build_seconds is not None:
        limit_s, builds = gates.max_build_seconds, set[str]()
        for facts in (stage.facts for stage in report.stages if stage.name == "build"):
            builds.add(facts["target"])
            yield _at_most("build_seconds", facts["file"], facts["build_seconds"], limit_s, "s")
        for target in _missing(recipe, builds):
            yield _unknown("build_seconds", target, limit_s, "at most", "s", "no engine was built")


def _calibration(report: Report, recipe: Recipe) -> Iterator[GateReport]:
    limit = recipe.gates.max_calibration_warnings
    if limit is None:
        return
    facts = report.facts("calibrate")
    reason = "ranges from a file: no data were checked" if "ranges_file" in facts else ""
    if report.precision == "int8" and recipe.quantize.quantizer == "tensorrt":
        reason = "TensorRT's own calibrator does not check the data"
    if reason:
        yield _unknown("calibration_warnings", "", limit, "at most", "", reason)
    else:
        yield _at_most("calibration_warnings", "", len(facts.get("findings", [])), limit, "")


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


def _failed(name: str, target: str, limit: float, sense: Sense, unit: str, reason: str) -> GateReport:
    """A gate that has no value because what it would be of is broken."""
    return _unknown(name, target, limit, sense, unit, reason).model_copy(update={"verdict": "failed"})


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
