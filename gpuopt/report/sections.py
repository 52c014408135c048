"""What `report.html` tells, section by section; what there are no data for is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from gpuopt.environment import install_hint
from gpuopt.report import figures
from gpuopt.report.blocks import (
    Block,
    Bullets,
    Cell,
    Column,
    Figure,
    Figures,
    Heading,
    Heads,
    Row,
    Section,
    Table,
    Text,
    Tone,
    code,
    number,
    numeric,
    share,
    some,
    table,
)
from gpuopt.report.markdown import (
    agreeing,
    allowed,
    channel_changes,
    format_bytes,
    kernel_lines,
    layout_lines,
    sentence,
)
from gpuopt.report.model import BenchmarkReport, Estimate, GateReport, Report
from gpuopt.tolerance import Limits, problem

_VERDICTS: Mapping[str, tuple[str, Tone]] = {
    "passed": ("\N{CHECK MARK} passed", "good"),
    "failed": ("\N{BALLOT X} failed", "bad"),
    "unknown": ("? unknown", "warn"),
}
_STATES: Mapping[str, Tone] = {"verified": "good", "built": "", "failed": "bad"}
_UNITS = {
    "ms": "{:,.3f} ms",
    "dB": "{:.2f} dB",
    "s": "{:,.1f} s",
    "samples/s": "{:,.0f} samples/s",
    "times": "{:.3f} times",
}


def _gates(report: Report) -> Section | None:
    if not report.gates:
        return None
    heads: Heads = ["verdict", "gate", *numeric("value", "limit", "margin"), "file", Column("where and why", wide=True)]
    rows: list[Row] = [_gate(gate) for gate in report.gates]
    said = {
        "fail": "A gate that does not pass ends the run with its exit code. Unknown does not pass.",
        "warn": "Gates only warn in this run.",
    }
    return Section("gates", "Gates", (table("What was demanded", heads, rows), Text(said[report.gate_mode])))


def _gate(gate: GateReport) -> tuple[Cell, ...]:
    word, tone = _VERDICTS[gate.verdict]
    margin = Cell("\N{EN DASH}")
    if gate.margin is not None:
        sign = "+" if gate.margin >= 0 else "\N{MINUS SIGN}"
        room = _quantity(abs(gate.margin), gate.unit)
        if gate.margin and not any(digit in room for digit in "123456789"):
            room = f"{abs(gate.margin):.1g} {gate.unit}".strip()
        margin = Cell(sign + room, gate.margin, "bad" if gate.margin < 0 else "")
    value = Cell("\N{EN DASH}") if gate.value is None else Cell(_quantity(gate.value, gate.unit), gate.value)
    limit = Cell(f"{gate.sense} {_quantity(gate.limit, gate.unit)}", gate.limit)
    exit_code = "" if gate.verdict == "passed" else f"exit code {gate.exit_code}"
    where = "; ".join(part for part in (gate.where, gate.reason, exit_code) if part)
    return Cell(word, tone=tone), code(gate.name), value, limit, margin, Cell(gate.target or "the run"), Cell(where)


def _quantity(value: float, unit: str) -> str:
    if unit == "bytes":
        return format_bytes(value)
    if unit == "share":
        return f"{value:.2%}"
    return _UNITS[unit].format(value) if unit in _UNITS else f"{value:,.6g} {unit}".strip()


def _error(report: Report) -> Section | None:
    if report.error is None:
        return None
    error = report.error
    blocks = [Text(kind_of_error(report)), Text(error.message, "bad"), *([Text(error.hint)] if error.hint else [])]
    return Section("error", "What went wrong", tuple(blocks))


def kind_of_error(report: Report) -> str:
    """The kind of failure, where it was and its exit code; empty if there is none."""
    error = report.error
    if error is None:
        return ""
    where = f" in stage {error.stage}" if error.stage else ""
    return f"{error.kind.capitalize()} error{where}, exit code {error.exit_code}."


def _warnings(report: Report) -> Section | None:
    if not report.warnings:
        return None
    return Section("warnings", "Warnings", (Bullets(tuple(dict.fromkeys(report.warnings)), "warn"),))


def _built(report: Report) -> Section | None:
    blocks: list[Block] = []
    if report.engines:
        heads: Heads = [
            "file",
            "for",
            "state",
            Column("size", True),
            "library",
            "compute capability",
            "SHA-256",
            Column("note", wide=True),
        ]
        rows: list[Row] = [
            (
                code(engine.file),
                engine.target,
                Cell(engine.status, tone=_STATES[engine.status]),
                Cell(format_bytes(engine.size_bytes), engine.size_bytes),
                engine.library_version,
                ", ".join(engine.compute_capabilities) or "\N{EN DASH}",
                code(engine.sha256[:16]),
                engine.note,
            )
            for engine in report.engines
        ]
        blocks.append(table("Files", heads, rows))
        blocks.append(
            Text("Verified: its outputs were compared with the original model's here. Built: it was not run here.")
        )
    facts = report.interface()
    if "inputs" in facts:
        heads = ["name", "direction", "dtype", "smallest", "tuned for", "largest"]
        rows = [
            (code(entry["name"]), "input", entry["dtype"], profile["min"], profile["opt"], profile["max"])
            for entry in facts["inputs"]
            for profile in entry["profiles"]
        ]
        rows += [
            (code(entry["name"]), "output", entry["dtype"], entry["shape"], "\N{EN DASH}", "\N{EN DASH}")
            for entry in facts["outputs"]
        ]
        blocks.append(table("Inputs and outputs", heads, rows))
    if lines := layout_lines(report):
        blocks.append(Bullets(tuple(lines)))
    return Section("built", "What was built", tuple(blocks))


def _speed(report: Report) -> Section | None:
    found = report.benchmarks
    if not found:
        return None
    names = ("p50", "p90", "p95", "p99")
    heads: Heads = [
        "file",
        *numeric(*(f"{name}, ms" for name in names)),
        Column("samples/s", True),
        "timings",
        Column("GPU memory", True),
        "CUDA graph",
        "for",
        "on",
        Column("shapes", wide=True),
    ]
    rows: list[Row] = [
        (
            code(one.file),
            *(_estimate(getattr(one, f"latency_{name}_ms")) for name in names),
            number(one.throughput_samples_per_second.value, "{:,.0f}"),
            Cell("steady") if one.was_steady else Cell("not steady", tone="warn"),
            Cell("\N{EN DASH}")
            if one.device_memory_bytes is None
            else Cell(format_bytes(one.device_memory_bytes), one.device_memory_bytes),
            {True: "yes", False: "no", None: "\N{EN DASH}"}[one.cuda_graph],
            f"{one.target} {one.library_version}",
            one.where,
            ", ".join(f"{name} {shape}" for name, shape in one.shapes.items()),
        )
        for one in found
    ]
    blocks: list[Block] = [table("Latency and throughput", heads, rows)]
    told = dict.fromkeys(f"{one.target}: {one.includes}; measured for {one.seconds:g} s." for one in found)
    blocks.append(Text("In brackets: 95 % interval. Latency is that of single inferences, each waited for."))
    drawn = [(lambda anchor, one=one: figures.latency(one, anchor)) for one in found]
    blocks += _plots([*drawn, lambda anchor: figures.parts(found, anchor)], "latency")
    if any(one.compute_ms is not None for one in found):
        blocks.append(_parts(found))
    blocks.append(Bullets((*told, *(line for one in found for line in _conditions(one)))))
    return Section("speed", "Speed", tuple(blocks))


def _estimate(found: Estimate) -> Cell:
    interval = "" if found.low is None or found.high is None else f" [{found.low:.3f}, {found.high:.3f}]"
    return Cell(f"{found.value:.3f}{interval}", found.value)


def _parts(found: Sequence[BenchmarkReport]) -> Table:
    heads: Heads = [
        "file",
        *numeric("copy in, ms", "compute, ms", "copy out, ms", "share of copies"),
    ]
    rows: list[Row] = []
    for one in found:
        times = (one.host_to_device_ms, one.compute_ms, one.device_to_host_ms)
        copies, whole = (times[0] or 0) + (times[2] or 0), sum(time or 0 for time in times)
        rows.append(
            (code(one.file), *(number(time, "{:.4f}") for time in times), share(copies / whole if whole else None))
        )
    return table("Copies and compute", heads, rows)


def _conditions(one: BenchmarkReport) -> Iterator[str]:
    names = {
        "sm_mhz": ("clock", "MHz"),
        "memory_mhz": ("memory clock", "MHz"),
        "celsius": ("temperature", "°C"),
        "watts": ("power", "W"),
    }
    spans = [
        f"{label} {one.conditions[key][0]:g} to {one.conditions[key][1]:g} {unit}"
        for key, (label, unit) in names.items()
        if one.conditions.get(key)
    ]
    if one.conditions.get("cpu_load") is not None:
        spans.append(f"load of the CPU {one.conditions['cpu_load']}")
    if spans:
        yield f"{one.target}, meanwhile: {', '.join(spans)}."
    for reason, part in (one.conditions.get("held_back") or {}).items():
        yield f"{one.target}: the GPU was held back during {part:.0%} of the time: {reason}."
    if one.conditions.get("note"):
        yield f"{one.target}: {one.conditions['note']}."


def _race(report: Report) -> Section | None:
    race = report.race
    if race is None:
        return None
    heads: Heads = [
        "candidate",
        "verdict",
        *numeric("ms, median", "rounds, ms", "lowest SQNR, dB", "against FP16"),
        Column("note", wide=True),
    ]
    rows: list[Row] = []
    for row in race["candidates"]:
        ships, ratio = row["name"] == race["chosen"], race.get("ratio_to_fp16", {}).get(row["name"])
        state = "ships" if ships else "out" if row["state"] == "out" else "measured"
        back = row["back_in_fp16"]
        rows.append(
            (
                row["name"],
                Cell(state, tone="good" if ships else "bad" if state == "out" else ""),
                number(row["milliseconds"], "{:.4f}"),
                f"{row['lowest']:.4f} to {row['highest']:.4f}" if row["lowest"] is not None else "\N{EN DASH}",
                number(row["lowest_sqnr_db"], "{:.1f}"),
                Cell("\N{EN DASH}")
                if ratio is None
                else Cell(f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]", ratio["value"]),
                row["reason"] or (f"back in FP16: {some(back)}" if back else ""),
            )
        )
    shapes = ", ".join(f"{name} {shape}" for name, shape in race["shapes"].items())
    said = Text(f"Timed in turn for {race['target']} at {shapes}: {race['includes']}.")
    drawn = _plots([lambda anchor: figures.candidates(race, anchor)], "candidates")
    return Section("candidates", "Candidates", (*drawn, table("Accuracy against latency", heads, rows), said))


def _format_race(report: Report) -> Section | None:
    race = report.format_race
    if race is None:
        return None
    heads: Heads = [
        "format",
        "verdict",
        *numeric("ms, median", "rounds, ms"),
        Column("inputs and outputs", wide=True),
        Column("note", wide=True),
    ]
    rows: list[Row] = []
    for row in race["candidates"]:
        ships = row["name"] == race["chosen"]
        rows.append(
            (
                row["name"],
                Cell("ships" if ships else row["state"], tone="good" if ships else ""),
                number(row["milliseconds"], "{:.4f}"),
                f"{row['lowest']:.4f} to {row['highest']:.4f}" if row["lowest"] is not None else "\N{EN DASH}",
                ", ".join(f"{name} {text}" for name, text in (row["as_built"] or row["formats"]).items()),
                row["reason"],
            )
        )
    shapes = ", ".join(f"{name} {shape}" for name, shape in race["shapes"].items())
    timed = f"Timed in turn for {race['target']} at {shapes}: {race['includes']}. " if race["includes"] else ""
    said = Text(f"{timed}{sentence(race['verdict'])}")
    blocks: list[Block] = [table("Formats", heads, rows)] if rows else []
    return Section("formats", "Formats of inputs and outputs", (*blocks, said))


def _proofs(report: Report) -> Section | None:
    blocks: list[Block] = []
    for engine in report.engines:
        if engine.proof is not None:
            blocks += _proof(engine.target, engine.proof)
    return Section("proof", "The engine as it was built", tuple(blocks)) if blocks else None


def _proof(target: str, proof: Mapping[str, Any]) -> Iterator[Block]:
    found = proof["coverage"]
    yield Heading(f"{proof['file']}, run on {proof['gpu']}")
    heads: Heads = [
        "computes in",
        *numeric("layers", "share of layers", "share of time"),
    ]
    rows: list[Row] = [
        (
            name.upper(),
            number(count, "{}"),
            share(found["layer_share"].get(name)),
            share((found["time_share"] or {}).get(name)),
        )
        for name, count in sorted(found["layers"].items(), key=lambda item: -item[1])
    ]
    yield table(f"Precision of the computing layers, {target}", heads, rows)
    overhead = found["overhead_time_share"]
    told = f"; together {overhead:.1%} of the time" if overhead is not None else ""
    lines = [
        f"Between the computing layers: {found['reformats']} only change a layout (reformats), "
        f"{found['quantizations']} Q or DQ were not fused{told}.",
        f"Equal inputs give {'equal' if proof['repeats_equal'] else 'different'} bytes.",
        _invariance(proof["file"], proof["batch_invariance"]),
    ]
    if found["milliseconds"] is not None:
        lines.append(f"All layers, each timed alone: {found['milliseconds']:.3f} ms.")
    if proof.get("device_memory_bytes") is not None:
        lines.append(f"Scratch memory: {format_bytes(proof['device_memory_bytes'])}.")
    yield Bullets(tuple(lines))
    if proof["failures"]:
        yield Bullets(tuple(proof["failures"]), "bad")
    formats = [(code(name), text) for name, text in proof["io_formats"].items()]
    yield table("Formats of inputs and outputs", ("name", Column("format", wide=True)), formats)
    limits = proof["limits"]
    yield _outputs(f"Outputs of the engine against {proof['reference']}", proof["outputs"], limits)
    yield Text(_limits(limits))
    if proof["layers"]:
        yield _layers(proof["layers"])


def _layers(layers: Sequence[Mapping[str, Any]]) -> Table:
    heads: Heads = [
        Column("#", True),
        Column("layer", wide=True),
        "kind",
        "computes in",
        *numeric("ms", "share of time"),
        Column("ONNX nodes", wide=True),
        Column("kernel", wide=True),
    ]
    whole = sum(layer["milliseconds"] or 0.0 for layer in layers)
    rows: list[Row] = [
        (
            number(place, "{}"),
            code(layer["name"]),
            layer["kind"],
            layer["precision"].upper() if layer["computes"] else "no computing",
            number(layer["milliseconds"], "{:.4f}"),
            share(layer["milliseconds"] / whole if whole and layer["milliseconds"] is not None else None),
            code(some(layer["onnx_nodes"], 2)),
            code(layer["tactic"]),
        )
        for place, layer in enumerate(layers, 1)
    ]
    return table("Layers of the engine, in order", heads, rows)


def _outputs(caption: str, rows: Iterable[Mapping[str, Any]], limits: Mapping[str, Any]) -> Table:
    """Figures by file, corner and output; those under a limit say so."""
    found = list(rows)
    has_graph, has_profile = "graph" in (found or [{}])[0], "profile" in (found or [{}])[0]
    heads: Heads = [
        *(["file"] if has_graph else []),
        "output",
        "corner",
        *(numeric("profile") if has_profile else []),
        "shape",
        "verdict",
        *numeric("cosine", "SQNR, dB", "max abs error", "equal values"),
    ]
    cells = [
        (
            *([code(row["graph"])] if has_graph else []),
            code(row["output"]),
            row["corner"],
            *([number(row["profile"], "{}")] if has_profile else []),
            "x".join(map(str, row["shape"])) or "scalar",
            _holds(row, limits),
            number(row["cosine"], "{:.6f}"),
            number(row["sqnr_db"], "{:.1f}"),
            number(row["max_abs_error"], "{:.2e}"),
            number(row["agreement"], "{:.2%}"),
        )
        for row in found
    ]
    return table(caption, heads, cells)


def _holds(row: Mapping[str, Any], limits: Mapping[str, Any]) -> Cell:
    found = problem(row, Limits(limits["min_cosine"], limits["min_sqnr_db"], limits["min_agreement"]))
    return Cell(found, tone="bad") if found else Cell("holds", tone="good")


def _limits(limits: Mapping[str, Any]) -> str:
    return (
        f"Limits: cosine at least {limits['min_cosine']}, SQNR at least {limits['min_sqnr_db']:g} dB. "
        "No SQNR: the output is exact, or no floating point."
    )


def _invariance(name: str, found: Mapping[str, Any]) -> str:
    if not found["checked"]:
        return f"Batch invariance of {name} was not checked: {found['reason']}."
    return (
        f"Batch invariance of {name}: a row alone and in a batch of {found['batch']} differ by at most "
        f"{found['worst_relative_error']:.1e} (relative{allowed(found)}){agreeing(found)}."
    )


def _accuracy(report: Report) -> Section | None:
    result = report.verification
    if result is None:
        return None
    blocks: list[Block] = [Bullets(tuple(result["failures"]), "bad")] if result["failures"] else []
    blocks.append(_outputs("Outputs at every corner of the shapes", result["outputs"], result["limits"]))
    blocks.append(Text(_limits(result["limits"])))
    lines = (
        *(_invariance(graph, found) for graph, found in result["batch_invariance"].items()),
        *kernel_lines(result),
    )
    if lines:
        blocks.append(Bullets(lines))
    return Section("accuracy", f"Accuracy in ONNX Runtime against {result['reference']}", tuple(blocks))


def _sensitivity(report: Report) -> Section | None:
    facts = report.facts("analyze")
    layers = facts.get("layers")
    if not layers:
        return None
    heads: Heads = [
        *numeric("rank", "place"),
        Column("node", wide=True),
        "operator",
        *numeric("own, dB", "output, dB", "accumulated, dB", "share of MACs"),
    ]
    rows: list[Row] = [
        (
            number(layer["rank"], "{}"),
            number(layer["position"] + 1, "{}"),
            code(layer["node"]),
            layer["op_type"],
            *(number(layer[key], "{:.1f}") for key in ("own_sqnr_db", "output_sqnr_db", "accumulated_sqnr_db")),
            share(layer["macs_share"]),
        )
        for layer in layers
    ]
    legend = (
        "SQNR against FP32. Own, output: the node's and the model's output with this node alone in INT8. Accumulated: "
        f"the node's output with all nodes in INT8. {facts['samples']} samples of {facts['data']}."
    )
    drawn = _plots([lambda anchor: figures.sensitivity(layers, anchor)], "sensitivity")
    return Section(
        "layers", "What each layer costs in INT8", (*drawn, table("Layers, costliest first", heads, rows), Text(legend))
    )


def _fallback(report: Report) -> Section | None:
    blocks = [*_budget(report), *_left_out(report), *_repairs(report)]
    title = "What is not in INT8, and why" if report.facts("quantize") else "Precision of the graph"
    return Section("fallback", title, tuple(blocks)) if blocks else None


def _budget(report: Report) -> Iterator[Block]:
    found = report.facts("fallback")
    if not found:
        return
    built = report.facts("confirm").get("value", found["final"])
    yield Heading("Accuracy budget")
    yield Text(
        f"{found['metric']} over {found['samples']} samples ({found['data']}): {found['fp32']:.6g} in FP32, "
        f"{found['int8']:.6g} all in INT8, {built:.6g} as built; a drop of {found['max_drop']:g} is allowed. "
        + ("These fell back to FP16, in order of cost:" if found["fell_back"] else "Nothing had to fall back.")
    )
    if found["fell_back"]:
        yield Bullets(tuple(found["fell_back"]), numbered=True, code=True)
        yield Text(
            f"INT8 has {found['int8_macs_share']:.1%} of the multiply-accumulates, "
            f"{found['int8_macs_share_before']:.1%} before."
        )
    if found["steps"]:
        heads: Heads = [
            *numeric("step", "nodes in FP16"),
            Column(found["metric"], True),
            Column("change", True),
            "budget",
            Column("moved", wide=True),
        ]
        yield table("Search for the fewest nodes", heads, _steps(found))


def _steps(found: Mapping[str, Any]) -> Iterator[tuple[Cell, ...]]:
    value, fallen = found["int8"], list[str]()
    for place, step in enumerate(found["steps"], 1):
        down = [node for node in step["in_fp16"] if node not in fallen]
        back = [node for node in fallen if node not in step["in_fp16"]]
        moves = [f"{some(nodes)} to {where}" for nodes, where in ((down, "FP16"), (back, "INT8")) if nodes]
        change, value, fallen = step["metric"] - value, step["metric"], step["in_fp16"]
        verdict = Cell("holds", tone="good") if step["held"] else Cell("too low", tone="bad")
        yield (
            number(place, "{}"),
            number(len(fallen), "{}"),
            number(value, "{:.6g}"),
            number(change, "{:+.3g}"),
            verdict,
            Cell("; ".join(moves)),
        )


def _left_out(report: Report) -> Iterator[Block]:
    quantized, cast = report.facts("quantize"), report.facts("cast")
    if quantized:
        yield Heading("Nodes")
        yield Text(
            f"{quantized['quantized_nodes']} of {quantized['candidate_nodes']} candidate nodes are quantized to INT8 "
            f"({quantized['format']}, {quantized['qdq_pairs']} Q/DQ pairs), "
            f"{quantized['int8_macs_share']:.1%} of multiply-accumulates."
        )
        left = quantized["kept_in_floating_point"]
        if left:
            rows: list[Row] = [(code(entry["node"]), entry["op_type"], entry["reason"]) for entry in left]
            heads = (Column("node", wide=True), "operator", Column("why", wide=True))
            yield table("Left in floating point", heads, rows)
    if cast:
        kept = f" Nodes kept in FP32: {some(cast['kept_in_fp32'])}." if cast["kept_in_fp32"] else ""
        yield Text(f"FP16: {cast['fp16_weights']} weights in FP16, {cast['fp32_weights']} in FP32.{kept}")


def _repairs(report: Report) -> Iterator[Block]:
    lines = [
        f"{stage.target}: {repair}"
        for stage in report.stages
        if stage.name == "build"
        for repair in stage.facts.get("repairs", [])
    ]
    if lines:
        yield Heading("Repairs of the build")
        yield Bullets(tuple(lines), "warn")


def _calibration(report: Report) -> Section | None:
    facts, chosen = report.facts("calibrate"), report.facts("choose")
    blocks: list[Block] = []
    if facts.get("quantized_before"):
        blocks.append(Text("None: the model holds Q/DQ of its own."))
        repaired = tuple(report.facts("quantize").get("repaired", []))
        blocks += [Bullets(repaired)] if repaired else []
    elif facts:
        method = f"{chosen['method']}, chosen by measurement" if chosen else facts["method"]
        blocks.append(Text(f"Method: {method}. {facts['tensors']} tensors; {facts['data']}."))
        if facts.get("random"):
            blocks.append(Text("The ranges come from random data: a smoke test, not a release.", "warn"))
        if facts.get("passes") is not None:
            passes = "1 pass" if facts["passes"] == 1 else f"{facts['passes']} passes"
            blocks.append(
                Text(
                    f"{facts['samples']} samples in {passes} on {facts['provider']}, "
                    f"{facts['samples_per_second']:g} a second, {facts['peak_mib']:g} MiB at most."
                )
            )
        if chosen:
            figures_by_method = [
                (Cell(method + (" (chosen)" if method == chosen["method"] else "")), number(db, "{:.1f}"))
                for method, db in chosen["sqnr_db"].items()
            ]
            heads = ("method", Column("SQNR, dB", True))
            blocks.append(table(f"Methods compared on {chosen['samples']} samples", heads, figures_by_method))
        findings = facts.get("findings", [])
        if findings:
            rows: list[Row] = [
                (found["check"], Cell(found["severity"], tone="warn"), found["message"]) for found in findings
            ]
            blocks.append(
                table("What the data checks found", ("check", "severity", Column("finding", wide=True)), rows)
            )
        elif "findings" in facts and not facts.get("random"):
            blocks.append(Text("The data checks found nothing."))
    changes = channel_changes(report)
    if changes:
        blocks.append(Bullets(tuple(changes)))
    return Section("calibration", "Calibration", tuple(blocks))


def _export(report: Report) -> Section | None:
    facts = report.facts("export")
    if not facts:
        return None
    blocks: list[Block] = [
        Text(
            f"{facts['model_kind']}, exporter: {facts['exporter']}; opset {facts['opset']}, IR {facts['ir_version']}.",
        )
    ]
    lost = tuple(
        f"{attempt['exporter']} lost: {attempt['reason']}" for attempt in facts["attempts"] if attempt["reason"]
    )
    return Section("export", "Export", (*blocks, *([Bullets(lost)] if lost else [])))


def _pipeline(report: Report) -> Section | None:
    if not report.stages:
        return None
    heads: Heads = [
        Column("#", True),
        "stage",
        "target",
        "state",
        *numeric("time, s", "warnings"),
        Column("why it ran", wide=True),
    ]
    rows: list[Row] = [
        (
            number(place, "{}"),
            stage.name,
            stage.target or "\N{EN DASH}",
            "from the cache" if stage.cached else "ran",
            number(stage.seconds, "{:.2f}"),
            number(len(stage.warnings), "{}"),
            stage.reason,
        )
        for place, stage in enumerate(report.stages, 1)
    ]
    cached = sum(stage.cached for stage in report.stages)
    said = (
        f"{report.seconds:.1f} s in all; {cached} of {len(report.stages)} stages came from the cache. "
        "The time of those is what they took when they ran."
    )
    return Section("pipeline", "Pipeline", (table("Stages, in order", heads, rows), Text(said)))


def _provenance(report: Report) -> Section | None:
    machine = report.environment
    gpus = ", ".join(f"{gpu['name']} (compute capability {gpu['compute_capability']})" for gpu in machine["gpus"])
    rows: list[Row] = [
        ("model", code(report.model.path or report.model.factory or "")),
        ("kind", report.model.kind or "not known"),
        ("SHA-256 of the model", code(report.model.sha256 or "from a factory")),
        ("precision", report.precision),
        ("bundle", code(report.bundle or "none")),
        ("command", code(" ".join(report.command))),
        ("made", f"{report.created}, {report.seconds:.1f} s"),
        ("gpuopt", report.gpuopt_version),
        ("Python", f"{machine['python']}, {machine['platform']}"),
        ("GPU", gpus or "none"),
    ]
    packages = [(code(name), version) for name, version in machine["packages"].items()]
    hashes = [(code(engine.file), code(engine.sha256)) for engine in report.engines]
    blocks: list[Block] = [table("This run", ("what", Column("value", wide=True)), rows)]
    if hashes:
        blocks.append(table("SHA-256 of the files", ("file", Column("SHA-256", wide=True)), hashes))
    if packages:
        blocks.append(table("Packages", ("package", "version"), packages))
    return Section("provenance", "Provenance", tuple(blocks))


SECTIONS: tuple[Callable[[Report], Section | None], ...] = (
    _gates,
    _error,
    _warnings,
    _built,
    _speed,
    _race,
    _format_race,
    _proofs,
    _accuracy,
    _fallback,
    _sensitivity,
    _calibration,
    _export,
    _pipeline,
    _provenance,
)
"""In the order of the page."""


def _plots(draw: Sequence[Callable[[str], Figure | None]], anchor: str) -> Iterator[Block]:
    """What can be drawn; a line about the missing package where there is none."""
    if not figures.available():
        yield Text(f"The plot is left out: matplotlib is not installed ({install_hint('matplotlib')}).")
        return
    drawn = [one(f"{anchor}-{place}") for place, one in enumerate(draw, 1)]
    found = tuple(figure for figure in drawn if figure is not None)
    if found:
        yield Figures(found)
