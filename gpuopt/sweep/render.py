"""A sweep's document as a table, for the terminal and as Markdown: pure functions."""

from __future__ import annotations

from gpuopt.report.markdown import format_bytes
from gpuopt.sweep.results import Row, SweepReport

_HEAD = ("combination", "state", "size", "SQNR, dB", "cosine", "p50, ms", "ms/sample", "front", "s")


def terminal(report: SweepReport) -> str:
    """The table in columns, then what failed, and where everything lies."""
    table = [_HEAD, *(_cells(row) for row in report.rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(_HEAD))]
    lines = ["  ".join(map(_aligned, line, widths, range(len(_HEAD)))) for line in table]
    lines += [f"{row.name}: {row.error.kind} error: {row.error.message}" for row in report.rows if row.error]
    return "\n".join([*(line.rstrip() for line in lines), f"report  {report.output}/sweep.md"])


def markdown(report: SweepReport, has_plot: bool) -> str:
    """The table as Markdown, with the plot if there is one."""
    passed = sum(row.status == "passed" for row in report.rows)
    lines = [
        f"# Sweep: {passed} of {len(report.rows)} combinations passed",
        "",
        f"gpuopt {report.gpuopt_version}, {report.created}, {report.ran_on}, {report.seconds:.0f} s.",
        "",
        *(["![Accuracy against cost](sweep.svg)", ""] if has_plot else []),
        "SQNR and cosine are the lowest of all outputs at all shapes, against the original model. *front*: no other "
        "combination of the model is at least as good in both accuracy and latency a sample (size, where not all were "
        "timed on one machine).",
        "",
        "| " + " | ".join(_HEAD) + " |",
        "| " + " | ".join("---" for _ in _HEAD) + " |",
        *("| " + " | ".join(_escaped(cell) for cell in _cells(row)) + " |" for row in report.rows),
    ]
    failed = [row for row in report.rows if row.error is not None]
    if failed:
        lines += ["", "## What failed", ""]
        lines += [
            f"- `{row.name}`: {row.error.kind} ({row.error.exit_code}): {_escaped(row.error.message)}"
            for row in failed
            if row.error is not None
        ]
    if report.warnings:
        lines += ["", "## Warnings", "", *(f"- {_escaped(warning)}" for warning in report.warnings)]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    state = (row.engine_status or row.status) if row.status == "passed" else row.status
    return (
        row.name,
        state + (", reused" if row.reused else ""),
        format_bytes(row.size_bytes) if row.size_bytes is not None else "",
        "exact" if row.lowest_sqnr_db is None and row.lowest_cosine == 1 else _number(row.lowest_sqnr_db, ".1f"),
        _number(row.lowest_cosine, ".5f"),
        _number(row.latency_p50_ms, ".3f"),
        _number(row.milliseconds_per_sample, ".3f"),
        "yes" if row.on_front else "",
        f"{row.seconds:.1f}",
    )


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
