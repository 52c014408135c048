"""The report as one HTML file for people who decide on a release: it fetches nothing and needs no server."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from gpuopt.report.blocks import Tile, Tone, printable
from gpuopt.report.markdown import format_bytes
from gpuopt.report.model import Report
from gpuopt.report.sections import SECTIONS, kind_of_error

REPORT_HTML_FILE = "report.html"


def render(report: Report) -> str:
    """A pure function of the report, and of whether matplotlib is there to draw the plots."""
    style, script = _page_file("page.css"), _page_file("page.js")
    parts = [make(report) for make in SECTIONS]
    content: str = _template().render(
        title=f"{_name(report)}, {report.precision.upper()}: {report.status}",
        name=_name(report),
        report=report,
        policy=_policy(style, script),
        style=_trusted(style),
        script=_trusted(script),
        verdict=_verdict(report),
        tiles=list(_tiles(report)),
        sections=[section for section in parts if section is not None and section.blocks],
    )
    return content


def _page_file(name: str) -> str:
    return (resources.files("gpuopt.report") / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Nothing but this style and this script, no host, images in the file alone."""
    return (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable
    )
    environment.filters["trusted"] = _trusted
    return environment.from_string(_page_file("page.html.j2"))


def _trusted(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)  # noqa: S704 - files of this package, and drawings, which are escaped


def _printable(value: Any) -> Any:
    """Text without what HTML does not admit."""
    return printable(value) if type(value) is str else value


def _name(report: Report) -> str:
    return Path(report.model.path).name if report.model.path else report.model.factory or "model"


def _verdict(report: Report) -> tuple[str, str, Tone]:
    """A word, what it means for the release, and its colour."""
    missed = [gate for gate in report.gates if gate.verdict != "passed"]
    if report.status == "failed":
        return "Failed", f"It may not ship. {kind_of_error(report)}", "bad"
    if missed:
        return "Passed", f"{len(missed)} of {len(report.gates)} gates did not pass; they only warn.", "warn"
    unchecked = [engine.target for engine in report.engines if engine.status == "built"]
    rest = f" Not run here: {', '.join(unchecked)}." if unchecked else ""
    if report.gates:
        return "Passed", f"It may ship: all {len(report.gates)} gates passed.{rest}", "warn" if rest else "good"
    checked = any(engine.status == "verified" for engine in report.engines)
    said = "It was made and checked; no gates were set." if checked else "It was made; nothing of it was checked."
    return "Passed", f"{said}{rest}", "warn" if rest or not checked else "good"


def _tiles(report: Report) -> Iterator[Tile]:
    """What is read first."""
    if report.gates:
        passed = sum(gate.verdict == "passed" for gate in report.gates)
        tone: Tone = "good" if passed == len(report.gates) else "bad" if report.gate_mode == "fail" else "warn"
        yield Tile("Gates passed", f"{passed} of {len(report.gates)}", "", tone)
    for found in report.benchmarks[:1]:
        yield Tile("Latency, p50", f"{found.latency_p50_ms.value:.3f} ms", f"p99 {found.latency_p99_ms.value:.3f} ms")
        rate = found.throughput_samples_per_second.value
        yield Tile("Throughput", f"{rate:,.0f} /s", f"samples, batch {found.batch}")
    proofs = [engine.proof for engine in report.engines if engine.proof is not None]
    rows = [row for found in (report.verification, *proofs) if found for row in found["outputs"]]
    if rows:
        sqnrs = [row["sqnr_db"] for row in rows if row["sqnr_db"] is not None]
        yield Tile("Lowest SQNR", f"{min(sqnrs):.1f} dB" if sqnrs else "exact", "of all outputs and shapes")
    quantized = report.facts("quantize")
    if proofs and proofs[0]["coverage"]["time_share"] is not None:
        spent = proofs[0]["coverage"]["time_share"].get(report.precision)
        if spent is not None:
            yield Tile(f"Time in {report.precision.upper()}", f"{spent:.1%}", "of the computing layers")
    elif quantized:
        yield Tile("Work in INT8", f"{quantized['int8_macs_share']:.1%}", "of multiply-accumulates")
    for engine in report.engines[:1]:
        yield Tile("Size", format_bytes(engine.size_bytes), f"for {engine.target}")
