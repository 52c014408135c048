"""A row in words: the same in every rendering and in errors."""

from __future__ import annotations

from gpuopt.comparing.model import Difference, Row
from gpuopt.report.markdown import format_bytes
from gpuopt.report.model import Estimate

NOT_JUDGED = "for information: no limit is set for it"
"""The reason of a row that nothing is asked of."""

_NAMES = {
    "sqnr_db": "worst SQNR",
    "cosine": "worst cosine",
    "agreement": "equal values",
    "accuracy": "accuracy",
    "precision_time_share": "time in",
    "latency_p50_ms": "latency p50",
    "latency_p90_ms": "latency p90",
    "latency_p95_ms": "latency p95",
    "latency_p99_ms": "latency p99",
    "throughput_samples_per_second": "throughput",
    "device_memory_bytes": "device memory",
    "scratch_memory_bytes": "scratch memory",
    "engine_size_bytes": "size",
    "build_seconds": "build",
    "warnings": "warnings",
    "gates_not_passed": "gates not passed",
    "status": "run",
}


def name_of(row: Row) -> str:
    """What a row is about, without its file."""
    where = row.where.upper() if row.name == "precision_time_share" else row.where
    return " ".join(part for part in (_NAMES[row.name], f"({where})" if row.name == "accuracy" else where) if part)


def subject(row: Row) -> str:
    """What a row is about, with its file."""
    return f"{row.file}, {name_of(row)}" if row.file else name_of(row)


def amount(value: Estimate | None, unit: str) -> str:
    """A value with its unit; `-` for none."""
    return "-" if value is None else _quantity(value.value, unit)


def _quantity(value: float, unit: str) -> str:
    if unit == "bytes":
        return format_bytes(value)
    if unit == "share":
        return f"{value:.2%}"
    if unit == "dB":
        return f"{value:.1f} dB"
    return f"{value:.6g} {unit}".rstrip() if unit == "" else f"{value:.4g} {unit}"


def change_text(row: Row) -> str:
    """The change: a share with its interval where there is one, else a difference; empty for none."""
    if row.change is None:
        return ""
    if row.change_share is None or row.unit in ("", "share", "dB"):
        if row.unit == "share":
            return f"{row.change * 100:+.2f} points"
        return f"{row.change:+.3g} {row.unit}".rstrip()
    interval = ""
    if row.change_share_low is not None and row.change_share_high is not None:
        interval = f" ({row.change_share_low:+.1%} to {row.change_share_high:+.1%})"
    return f"{row.change_share:+.1%}{interval}"


def limit_text(row: Row) -> str:
    """What is allowed; empty where there is no limit."""
    if row.limit is None:
        return ""
    if row.flag == "--max-sqnr-drop":
        return f"{row.limit:g} dB"
    if row.flag == "--max-accuracy-drop":
        return f"{row.limit:g}"
    return f"{row.limit * 100:g}%"


def verdict_text(row: Row) -> str:
    """The verdict and its reason; of what is not judged the reason alone."""
    if row.reason == NOT_JUDGED:
        return row.reason
    return f"{row.verdict}: {row.reason}" if row.reason else row.verdict


def difference_text(difference: Difference) -> str:
    """What differs, and what follows."""
    of = f" of {difference.target}" if difference.target else ""
    state = "compared all the same" if difference.allowed else "not allowed to differ"
    return f"{difference.what}{of}: OLD {difference.old}, NEW {difference.new}; {state}"


def conclusion(rows: list[Row]) -> str:
    """How many rows have which verdict."""
    counts = [(sum(row.verdict == verdict for row in rows), verdict) for verdict in ("worse", "better", "same")]
    rest = sum(row.verdict == "not comparable" for row in rows)
    return ", ".join(f"{count} {verdict}" for count, verdict in counts) + f", {rest} not judged"


def clean(text: str) -> str:
    """Without control characters: names come from files of others."""
    return "".join(character if character.isprintable() else "?" for character in text)
