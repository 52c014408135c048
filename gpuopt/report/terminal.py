"""The end of a run as the terminal shows it: a few lines, plain text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from gpuopt.report.markdown import format_bytes
from gpuopt.report.model import Report


def render(report: Report, folder: str, unbuilt: str = "") -> str:
    """A pure function of the report: what was made, how accurate it is, where it lies.

    Args:
        folder: the bundle's folder as the user would write it.
        unbuilt: the graph that engines are still to be built from; empty: none are.
    """
    lines = []
    for engine in report.engines:
        note = f": {engine.note}" if engine.note else ""
        lines.append(
            f"{engine.target:<13}{engine.status:<9}{format_bytes(engine.size_bytes):>10}   {engine.file}{note}"
        )
    if unbuilt:
        lines.append(f"engine       none yet: 'gpuopt build {folder}' on the GPU's machine makes it from {unbuilt}")
    for engine in report.engines:
        if engine.proof is not None:
            lines.append(_proof(engine.target, engine.proof))
    if report.race is not None:
        timed = [row for row in report.race["candidates"] if row["milliseconds"] is not None]
        times = ", ".join(f"{row['name']} {row['milliseconds']:.3f} ms" for row in timed)
        lines.append(f"speed        {report.race['chosen']} ships: {times}")
    if report.format_race is not None:
        lines.append(f"I/O formats  {report.format_race['verdict']}")
    for one in report.benchmarks:
        lines.append(
            f"latency      {one.file}: p50 {one.latency_p50_ms.value:.3f} ms, p99 {one.latency_p99_ms.value:.3f} ms, "
            f"{one.throughput_samples_per_second.value:.0f} samples/s at batch {one.batch}"
        )
    for entry in report.interface().get("inputs", []):
        for profile in entry["profiles"]:
            sizes = list(dict.fromkeys([profile["min"], profile["opt"], profile["max"]]))
            lines.append(f"input        {entry['name']} {entry['dtype']} {' .. '.join(sizes)}{_formats(report, entry)}")
    quantized = report.facts("quantize")
    if quantized:
        lines.append(
            f"INT8         {quantized['quantized_nodes']} of {quantized['candidate_nodes']} candidate nodes, "
            f"{quantized['int8_macs_share']:.1%} of multiply-accumulates"
        )
    budget = report.facts("fallback")
    if budget:
        count = len(budget["fell_back"])
        fell = f"{count} node{'s' if count > 1 else ''} fell back to FP16" if count else "nothing fell back"
        built = report.facts("confirm").get("value", budget["final"])
        lines.append(
            f"budget       {budget['metric']} {built:.6g} (FP32 {budget['fp32']:.6g}, "
            f"all INT8 {budget['int8']:.6g}), limit {_drop(budget['max_drop'])}; {fell}"
        )
    if report.verification:
        cosines = [row["cosine"] for row in report.verification["outputs"] if row["cosine"] is not None]
        sqnrs = [row["sqnr_db"] for row in report.verification["outputs"] if row["sqnr_db"] is not None]
        corners = {row["corner"] for row in report.verification["outputs"]}
        figures = []
        if cosines:
            figures.append(f"cosine {math.floor(min(cosines) * 1e5) / 1e5:.5f}")
        if sqnrs:
            figures.append(f"SQNR {min(sqnrs):.1f} dB")
        invariance = report.verification["batch_invariance"].values()
        if invariance and all(found["checked"] and not found["failures"] for found in invariance):
            figures.append("batch-invariant")
        lines.append(
            f"accuracy     {', '.join(figures) or 'exact'}; worst of {len(corners)} shape corners, "
            f"against {report.verification['reference']}"
        )
    if report.gates:
        passed = sum(gate.verdict == "passed" for gate in report.gates)
        lines.append(f"gates        {passed} of {len(report.gates)} passed")
    if report.facts("export"):
        lines.append(f"report       {folder}/report.md")
    return "\n".join(lines)


def _formats(report: Report, entry: Mapping[str, Any]) -> str:
    """How engines take an input, where that is not as the graph has it: `(model.tensorrt.engine: fp16:hwc8)`."""
    builds = [stage.facts for stage in report.stages if stage.name == "build"]
    formats = {b["file"]: b.get("options", {}).get("io_formats", {}).get(entry["name"]) for b in builds}
    told = ", ".join(f"{file}: {chosen}" for file, chosen in formats.items() if chosen)
    return f" ({told})" if told else ""


def _drop(limit: float) -> str:
    """An accuracy budget in both ways of writing it; metrics of the user's own may have one above 100%."""
    return f"{limit:g} ({limit * 100:g}%)" if limit <= 1 else f"{limit:g}"


def _proof(target: str, proof: Mapping[str, Any]) -> str:
    shares = proof["coverage"]["time_share"] or proof["coverage"]["layer_share"]
    told = ", ".join(f"{share:.1%} {name.upper()}" for name, share in sorted(shares.items(), key=lambda item: -item[1]))
    measured = "computing layers' time" if proof["coverage"]["time_share"] else "computing layers"
    worst = min((row["sqnr_db"] for row in proof["outputs"] if row["sqnr_db"] is not None), default=None)
    accuracy = "exact" if worst is None else f"SQNR {worst:.1f} dB"
    return f"{target:<13}run on {proof['gpu']}: {told} of the {measured}; {accuracy}"


def render_facts(report: Report) -> str:
    """Everything the stages said, one indented JSON document a stage."""
    return "\n".join(
        f"{stage.name} {stage.target or ''}".strip() + f" {json.dumps(stage.facts, indent=2)}"
        for stage in report.stages
    )
