"""The report as Markdown, short enough for a pull-request comment."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpuopt import gates
from gpuopt.report.model import BenchmarkReport, Estimate, Report

_MOST_ROWS = 30
_MOST_NAMES = 5
_UNDERSCORE = re.compile(r"(?<!\w)_|_(?!\w)")


def render(report: Report) -> str:
    """A pure function of the report."""
    sections = [
        _headline(report),
        _error(report),
        _gates(report),
        _warnings(report),
        _engines(report),
        _race(report),
        _format_race(report),
        _benchmarks(report),
        _proofs(report),
        _interface(report),
        _precision(report),
        _fallback(report),
        _accuracy(report),
        _export(report),
        _stages(report),
        _provenance(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def format_bytes(size: float) -> str:
    """A size in binary units: `12.1 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("the loop ends at GiB")


def _headline(report: Report) -> str:
    name = Path(report.model.path).name if report.model.path else report.model.factory
    return f"# gpuopt: {escaped(str(name))}, {report.precision.upper()}: {report.status}"


def _error(report: Report) -> str:
    if report.error is None:
        return ""
    where = f" in {code(report.error.stage)}" if report.error.stage else ""
    lines = [
        f"**Failed{where}** ({report.error.kind}, exit code {report.error.exit_code}): {escaped(report.error.message)}",
        escaped(report.error.hint),
    ]
    return "\n\n".join(line for line in lines if line)


def _gates(report: Report) -> str:
    """Every condition of the release, with the room that is left."""
    if not report.gates:
        return ""
    rows = [
        (
            {"passed": "passed", "failed": "**failed**", "unknown": "**unknown**"}[gate.verdict],
            code(gate.name),
            code(gate.target) if gate.target else "",
            gates.shown(gate.value, gate.unit) if gate.value is not None else escaped(gate.reason),
            f"{gate.sense} {gates.shown(gate.limit, gate.unit)}",
            gates.shown(gate.margin, gate.unit) if gate.margin is not None else "",
            escaped(gate.where),
        )
        for gate in report.gates
    ]
    head = ("verdict", "gate", "of", "value", "limit", "margin", "where")
    note = "\n\nGates only warn in this run." if report.gate_mode == "warn" else ""
    return "## Gates\n\n" + table(head, rows) + note


def _benchmarks(report: Report) -> str:
    """How fast each file is here."""
    if not report.benchmarks:
        return ""
    rows = [
        (
            code(one.file),
            one.batch,
            *(_estimate(getattr(one, f"latency_{name}_ms"), "{:.3f}") for name in ("p50", "p90", "p95", "p99")),
            _estimate(one.throughput_samples_per_second, "{:.0f}"),
            _split(one),
            one.where,
        )
        for one in report.benchmarks
    ]
    head = ("file", "batch", "p50, ms", "p90", "p95", "p99", "samples/s", "in, compute, out, ms", "where")
    said = "\n".join(f"- {code(one.file)}: {one.includes}." for one in report.benchmarks)
    return "\n\n".join(["## Benchmark", table(head, rows), said])


def _estimate(found: Estimate, form: str) -> str:
    """A value with its interval."""
    value = form.format(found.value)
    if found.low is None or found.high is None:
        return value
    return f"{value} ({form.format(found.low)} to {form.format(found.high)})"


def _split(one: BenchmarkReport) -> str:
    parts = (one.host_to_device_ms, one.compute_ms, one.device_to_host_ms)
    return ", ".join(f"{part:.3f}" for part in parts if part is not None)


def _warnings(report: Report) -> str:
    return "\n".join(f"- Warning: {escaped(warning)}" for warning in report.warnings)


def _engines(report: Report) -> str:
    if not report.engines:
        return ""
    rows = [
        (
            e.target,
            code(e.file),
            e.status + (f" ({e.note})" if e.note else ""),
            format_bytes(e.size_bytes),
            e.library_version,
        )
        for e in report.engines
    ]
    return "## Engines\n\n" + table(("target", "file", "state", "size", "library"), rows)


def _proofs(report: Report) -> str:
    """What the engines that were run are made of, and how near they come."""
    parts = [_proof(engine.target, engine.proof) for engine in report.engines if engine.proof is not None]
    return "\n\n".join(parts)


def _proof(target: str, proof: Mapping[str, Any]) -> str:
    found = proof["coverage"]
    rows = [
        (name, count, f"{found['layer_share'][name]:.1%}", _number((found["time_share"] or {}).get(name), "{:.1%}"))
        for name, count in sorted(found["layers"].items(), key=lambda item: -item[1])
    ]
    between = f"{found['reformats']} layers change a layout, {found['quantizations']} Q or DQ were not fused"
    if found["overhead_time_share"] is not None:
        between += f"; {found['overhead_time_share']:.1%} of the time"
    formats = ", ".join(f"{code(name)} {text}" for name, text in proof["io_formats"].items())
    worst = min((row["sqnr_db"] for row in proof["outputs"] if row["sqnr_db"] is not None), default=None)
    lines = [
        f"- Run on {proof['gpu']} at {len({row['corner'] for row in proof['outputs']})} shape corners: "
        f"lowest SQNR {_number(worst, '{:.1f}') or 'exact'} dB against {proof['reference']}; equal inputs give "
        f"{'equal' if proof['repeats_equal'] else 'different'} bytes.",
        _invariance(proof["file"], proof["batch_invariance"]),
        f"- Between the computing layers: {between}.",
        f"- Inputs and outputs: {formats}.",
        *(f"- {escaped(failure)}" for failure in proof["failures"]),
    ]
    head = ("computes in", "layers", "share of layers", "share of time")
    return "\n\n".join([f"## The engine for {target} as built", table(head, rows), "\n".join(lines)])


def _race(report: Report) -> str:
    """The candidates' speed, and which one ships."""
    race = report.race
    if race is None:
        return ""
    rows = [
        (
            f"**{row['name']}**" if row["name"] == race["chosen"] else row["name"],
            _number(row["milliseconds"], "{:.3f}"),
            f"{row['lowest']:.3f} to {row['highest']:.3f}" if row["lowest"] is not None else "",
            _number(row["lowest_sqnr_db"], "{:.1f}"),
            escaped(row["reason"]) or (f"back in FP16: {_some(row['back_in_fp16'])}" if row["back_in_fp16"] else ""),
        )
        for row in race["candidates"]
    ]
    shapes = ", ".join(f"{code(name)} {shape}" for name, shape in race["shapes"].items())
    said = f"Timed in turn for {race['target']} at {shapes}: {race['includes']}."
    head = ("candidate", "ms, median", "rounds", "lowest SQNR, dB", "note")
    return "\n\n".join(["## Speed", table(head, rows), said])


def _format_race(report: Report) -> str:
    """The formats of inputs and outputs that were tried, and which is kept."""
    race = report.format_race
    if race is None:
        return ""
    rows = [
        (
            f"**{row['name']}**" if row["name"] == race["chosen"] else row["name"],
            _number(row["milliseconds"], "{:.3f}"),
            f"{row['lowest']:.3f} to {row['highest']:.3f}" if row["lowest"] is not None else "",
            ", ".join(f"{code(name)} {text}" for name, text in (row["as_built"] or row["formats"]).items()),
            escaped(row["reason"]),
        )
        for row in race["candidates"]
    ]
    shapes = ", ".join(f"{code(name)} {shape}" for name, shape in race["shapes"].items())
    timed = f"Timed in turn for {race['target']} at {shapes}: {race['includes']}. " if race["includes"] else ""
    head = ("format", "ms, median", "rounds", "inputs and outputs", "note")
    parts = [table(head, rows)] if rows else []
    return "\n\n".join(["## Formats of inputs and outputs", *parts, f"{timed}{sentence(race['verdict'])}"])


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def _interface(report: Report) -> str:
    facts = report.interface()
    if "inputs" not in facts:
        return ""
    rows = [
        (code(entry["name"]), entry["dtype"], profile["min"], profile["opt"], profile["max"])
        for entry in facts["inputs"]
        for profile in entry["profiles"]
    ]
    outputs = [
        f"- output {code(entry['name'])}: {entry['dtype']}, {escaped(str(entry['shape']))}"
        for entry in facts["outputs"]
    ]
    head = ("input", "dtype", "smallest", "tuned for", "largest")
    lines = [*outputs, *(f"- {escaped(line)}" for line in layout_lines(report))]
    return "\n\n".join(["## Inputs and outputs", table(head, rows), "\n".join(lines)])


def _precision(report: Report) -> str:
    quantized, cast, calibrated = report.facts("quantize"), report.facts("cast"), report.facts("calibrate")
    lines = []
    if quantized:
        lines.append(
            f"{quantized['quantized_nodes']} of {quantized['candidate_nodes']} candidate nodes are quantized to INT8 "
            f"({quantized['format']}, {quantized['qdq_pairs']} Q/DQ pairs), "
            f"{quantized['int8_macs_share']:.1%} of multiply-accumulates."
        )
        left: dict[str, list[str]] = {}
        for entry in quantized["kept_in_floating_point"]:
            left.setdefault(entry["reason"], []).append(entry["node"])
        rows = [(len(nodes), escaped(reason), _some(nodes)) for reason, nodes in left.items()]
        if rows:
            lines.append(table(("left in floating point", "why", "nodes"), sorted(rows, reverse=True)))
    if calibrated.get("quantized_before"):
        lines.append("Calibration: none, the model holds Q/DQ of its own.")
        lines += [f"Repaired: {escaped(line)}." for line in quantized.get("repaired", [])]
    elif calibrated:
        lines.append(
            f"Calibration: {_method(report)}, {calibrated['tensors']} tensors; {escaped(str(calibrated['data']))}."
        )
    lines += channel_changes(report)
    if cast:
        kept = f"; {len(cast['kept_in_fp32'])} nodes kept in FP32" if cast["kept_in_fp32"] else ""
        lines.append(f"FP16: {cast['fp16_weights']} weights in FP16, {cast['fp32_weights']} in FP32{kept}.")
    return "## Precision of the graph\n\n" + "\n\n".join(lines) if lines else ""


def _method(report: Report) -> str:
    """The calibration method, and what it won against where it was chosen by measurement."""
    chosen = report.facts("choose")
    if not chosen:
        return str(report.facts("calibrate")["method"])
    figures = ", ".join(f"{m} {'-' if db is None else f'{db:.1f}'}" for m, db in chosen["sqnr_db"].items())
    return f"{chosen['method']} (auto; SQNR in dB on {chosen['samples']} samples: {figures})"


def layout_lines(report: Report) -> list[str]:
    """What the deployed form cost the graph, a line each; empty where it is the original's."""
    facts = report.facts("layout")
    if not facts:
        return []
    moved = facts["transposes"]
    lines = []
    if moved["inserted"]:
        own = f"{moved['own']} of the model's own, " if moved["own"] else ""
        why = f" ({moved['reason']})" if moved["reason"] else ""
        lines.append(
            f"Transposes: {own}{moved['inserted']} inserted, {moved['cancelled']} cancelled, {moved['left']} left{why}"
        )
    for name, where in facts["normalization"].items():
        places = [
            f"scale / std {_place(where['factor'])}" if where["factor"] else "",
            f"mean / scale {_place(where['center'])}" if where["center"] else "",
        ]
        told = ", ".join(place for place in places if place) or "nothing to do"
        lines.append(f"Bytes of {name}: {told}" + (f": {where['reason']}" if where["reason"] else ""))
    worst = facts["largest_difference"]
    same = "bit for bit" if worst == 0 else f"up to {worst:.1e} of an output's largest value"
    lines.append(f"The graph in this form computes what the original graph does, {same}")
    return lines


def _place(where: str) -> str:
    """What `graph_layout.Normalized` says, in words."""
    places = {"weights": "in the first Conv's weights", "bias": "in the first Conv's bias",
              "Sub, bias": "128 in a Sub, the rest in the first Conv's bias"}  # fmt: skip
    return places.get(where, f"in a {where}")


def channel_changes(report: Report) -> list[str]:
    """What equalisation and bias correction did, or why they did nothing."""
    equalized, corrected = report.facts("equalize"), report.facts("correct")
    lines = []
    if equalized.get("applied"):
        alpha = "" if equalized["alpha"] is None else f", alpha {equalized['alpha']:g}"
        lines.append(
            f"Equalisation: {equalized['method']}{alpha}, {len(equalized['changed_nodes'])} nodes scaled; "
            + _gain(equalized, "sqnr_db_after")
        )
    elif equalized:
        lines.append(f"Equalisation: none, {equalized['reason']}.")
    if corrected.get("corrected_nodes"):
        lines.append(f"Bias correction: {corrected['corrected_nodes']} nodes; {_gain(corrected, 'sqnr_db_corrected')}")
    elif corrected:
        lines.append(f"Bias correction: none, {corrected['reason']}.")
    return lines


def _gain(facts: dict[str, Any], after: str) -> str:
    before, reached = facts.get("sqnr_db_before"), facts.get(after)
    if before is None or reached is None:
        return "its effect was not measured."
    return f"SQNR {before:.1f} to {reached:.1f} dB on {facts['held_out']} held-out samples."


def _fallback(report: Report) -> str:
    found = report.facts("fallback")
    if not found:
        return ""
    built = report.facts("confirm").get("value", found["final"])
    figures = (
        f"{found['metric']} over {found['samples']} samples ({found['data']}): {found['fp32']:.6g} in FP32, "
        f"{found['int8']:.6g} all in INT8, {built:.6g} as built; a drop of {found['max_drop']:g} is allowed."
    )
    if not found["fell_back"]:
        return f"## Accuracy budget\n\n{figures} Nothing had to fall back."
    share = (
        f"INT8 has {found['int8_macs_share']:.1%} of the multiply-accumulates, "
        f"{found['int8_macs_share_before']:.1%} before."
    )
    nodes = "\n".join(f"{place}. {code(node)}" for place, node in enumerate(found["fell_back"], 1))
    steps = table(("step", "nodes in FP16", found["metric"], "change", "budget"), _steps(found))
    return "\n\n".join(["## Fallen back to FP16", f"{figures} {share}", f"In order of cost:\n\n{nodes}", steps])


def _steps(found: dict[str, Any]) -> Iterable[Sequence[Any]]:
    """Every evaluation of the search: what it changed, and what that bought."""
    value, fallen = found["int8"], list[str]()
    for step in found["steps"]:
        down = [node for node in step["in_fp16"] if node not in fallen]
        back = [node for node in fallen if node not in step["in_fp16"]]
        moves = [f"{_some(nodes)} to {where}" for nodes, where in ((down, "FP16"), (back, "INT8")) if nodes]
        change = step["metric"] - value
        value, fallen = step["metric"], step["in_fp16"]
        verdict = "holds" if step["held"] else "too low"
        yield "; ".join(moves), len(fallen), f"{value:.6g}", f"{change:+.3g}", verdict


def _accuracy(report: Report) -> str:
    result = report.verification
    if result is None:
        return ""
    rows = [
        (
            code(row["graph"]),
            row["corner"],
            escaped(row["output"]),
            "x".join(map(str, row["shape"])) or "scalar",
            _number(row["cosine"], "{:.6f}"),
            _number(row["sqnr_db"], "{:.1f}"),
            _number(row["max_abs_error"], "{:.2e}"),
            _number(row["agreement"], "{:.2%}"),
        )
        for row in result["outputs"]
    ]
    head = ("graph", "corner", "output", "shape", "cosine", "SQNR, dB", "max abs error", "equal values")
    batch = "\n".join(_invariance(graph, found) for graph, found in result["batch_invariance"].items())
    failures = "\n".join(f"- {escaped(failure)}" for failure in result["failures"])
    title = f"## Accuracy in ONNX Runtime against {result['reference']}"
    limits = result["limits"]
    limit = f"Limits: cosine at least {limits['min_cosine']}, SQNR at least {limits['min_sqnr_db']:g} dB."
    kernels = "\n".join(f"- {escaped(line)}" for line in kernel_lines(result))
    parts = [title, table(head, rows), batch, kernels, limit, failures]
    return "\n\n".join(part for part in parts if part)


def kernel_lines(result: Mapping[str, Any]) -> list[str]:
    """Which nodes ONNX Runtime runs in a layout of its own, a line for each graph; empty where it was not looked at."""
    return [
        f"{graph} is {found['nodes']} nodes in ONNX Runtime on this CPU: {found['nchwc']} work on blocks of channels "
        f"(NCHWc), {found['nhwc']} have the channels last (NHWC), {found['reorders']} change the layout."
        for graph, found in result.get("layout_kernels", {}).items()
    ]


def _invariance(graph: str, found: dict[str, Any]) -> str:
    if not found["checked"]:
        return f"- Batch invariance of {code(graph)} was not checked: {found['reason']}."
    return (
        f"- Batch invariance of {code(graph)}: a row alone and in a batch of {found['batch']} differ by at most "
        f"{found['worst_relative_error']:.1e} (relative{allowed(found)}){agreeing(found)}."
    )


def allowed(invariance: Mapping[str, Any]) -> str:
    """What batch invariance allowed, where the report has it."""
    tolerance = invariance.get("tolerance")
    return "" if tolerance is None else f"; {tolerance:.1e} allowed"


def agreeing(invariance: Mapping[str, Any]) -> str:
    """What batch invariance found of outputs that are not floating point; empty if there are none."""
    share = invariance.get("lowest_agreement")
    return "" if share is None else f"; of outputs of other types at least {share:.2%} of the values agree"


def _export(report: Report) -> str:
    facts = report.facts("export")
    if not facts:
        return ""
    lost = [f"- {code(a['exporter'])} lost: {escaped(a['reason'])}" for a in facts["attempts"] if a["reason"]]
    line = f"{facts['model_kind']}, exporter: {facts['exporter']}; opset {facts['opset']}, IR {facts['ir_version']}."
    return "\n\n".join(["## Export", line, *(["\n".join(lost)] if lost else [])])


def _stages(report: Report) -> str:
    rows = [
        (f"{s.name} {s.target or ''}".strip(), "cached" if s.cached else f"{s.seconds:.1f} s", s.reason)
        for s in report.stages
    ]
    return "## Stages\n\n" + table(("stage", "time", "why it ran"), rows) if rows else ""


def _provenance(report: Report) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in report.environment["packages"].items())
    gpus = ", ".join(f"{g['name']} (compute capability {g['compute_capability']})" for g in report.environment["gpus"])
    lines = [
        f"- gpuopt {report.gpuopt_version}, Python {report.environment['python']}, {report.environment['platform']}, "
        f"GPU: {gpus or 'none'}",
        f"- {packages}",
        f"- model SHA-256: {code(report.model.sha256 or 'from a factory')}",
        f"- command: {code(' '.join(report.command))}",
        f"- {report.created}, {report.seconds:.1f} s",
    ]
    return "## Provenance\n\n" + "\n".join(lines)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; bars in cells are escaped, and rows beyond a limit are counted, not shown."""
    shown = list(rows)
    lines = [_row(head), _row(["---"] * len(head)), *(_row(row) for row in shown[:_MOST_ROWS])]
    if len(shown) > _MOST_ROWS:
        lines.append(f"\n{len(shown) - _MOST_ROWS} more rows are in `report.json`.")
    return "\n".join(lines)


def code(name: str) -> str:
    """A name as a code span, in which nothing is Markdown, HTML, a link or a mention."""
    return "`" + " ".join(str(name).replace("`", "'").split()) + "`"


def escaped(text: str) -> str:
    """Text in which nothing is Markdown or HTML, and nobody is mentioned; bars are escaped with the cells."""
    for character in "\\`*[]<>":
        text = text.replace(character, f"\\{character}")
    # Within a word it is only itself (CommonMark 0.31, section 6.2).
    text = _UNDERSCORE.sub(r"\_", text)
    return text.replace("@", "@\N{WORD JOINER}")


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(code(name) for name in names[:_MOST_NAMES])
    return shown + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
