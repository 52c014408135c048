"""Two reports to a comparison: rows with their verdicts, and the error that follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gpuopt
from gpuopt.bench.statistics import Ratio, fewest_timings, percentile_ratios
from gpuopt.comparing import figures
from gpuopt.comparing.differences import ALL, between
from gpuopt.comparing.figures import Figure, Key
from gpuopt.comparing.limits import Limits
from gpuopt.comparing.model import Comparison, Difference, Row, Side, Verdict
from gpuopt.comparing.words import NOT_JUDGED, change_text, clean, limit_text, subject
from gpuopt.errors import ComparisonError, GpuoptError, RegressionError
from gpuopt.report.model import Estimate, Failure, GateReport, Report

_ROUNDING = 1e-9


@dataclass(frozen=True)
class _Rule:
    """How a kind of figure is judged: by a share of the old value, or by the difference itself."""

    flag: str
    unit: str
    more_is_better: bool
    relative: bool = True


_RULES: Mapping[str, _Rule] = {
    "sqnr_db": _Rule("--max-sqnr-drop", "dB", True, relative=False),
    "cosine": _Rule("", "", True),
    "agreement": _Rule("--max-accuracy-drop", "share", True, relative=False),
    "accuracy": _Rule("--max-accuracy-drop", "", True, relative=False),
    "precision_time_share": _Rule("", "share", True, relative=False),
    **{f"latency_p{p}_ms": _Rule(f"--max-p{p}-regress", "ms", False) for p in figures.LATENCIES},
    "throughput_samples_per_second": _Rule("--max-throughput-regress", "samples/s", True),
    "device_memory_bytes": _Rule("--max-memory-regress", "bytes", False),
    "scratch_memory_bytes": _Rule("--max-memory-regress", "bytes", False),
    "engine_size_bytes": _Rule("--max-size-regress", "bytes", False),
    "build_seconds": _Rule("", "s", False),
    "warnings": _Rule("", "", False),
}


@dataclass(frozen=True)
class Answer:
    """What a comparison ends in; `error` is None if nothing is worse."""

    comparison: Comparison
    error: GpuoptError | None


def compare(
    old: tuple[Path, Report],
    new: tuple[Path, Report],
    limits: Limits,
    allowed: Sequence[str] = (),
    command: Sequence[str] = (),
) -> Answer:
    """Put two reports side by side; no file is read, and equal reports give equal answers.

    Args:
        old, new: each with the path that it came from.
        allowed: aspects in which they may differ: `differences.ASPECTS`, or `all`.
        command: the command line, for the answer.

    Raises:
        StorageError: a report's facts are not what gpuopt writes.
    """
    differences = between(old[1], new[1], allowed)
    error: GpuoptError | None = _refusal(differences)
    rows = [] if error is not None else rows_of(old[1], new[1], limits)
    error = error or _unchecked(rows, limits) or _regression(rows)
    failure = None
    if error is not None:
        failure = Failure(
            kind=error.kind, exit_code=error.exit_code, message=error.message, hint=error.hint, stage=None
        )
    status = "passed" if error is None else "regressed" if isinstance(error, RegressionError) else "refused"
    comparison = Comparison(
        command=list(command),
        gpuopt_version=gpuopt.__version__,
        status=status,
        error=failure,
        old=_side(*old),
        new=_side(*new),
        differences=differences,
        rows=rows,
    )
    return Answer(comparison, error)


def rows_of(old: Report, new: Report, limits: Limits) -> list[Row]:
    """A row for every figure that either report has, by file; those of the whole run at the end."""
    before, after = figures.of_report(old, "OLD"), figures.of_report(new, "NEW")
    spreads = _spreads(old, new)
    order, files = list(_RULES), [key.file for key in (*after, *before)]
    keys = sorted({**after, **before}, key=lambda key: (not key.file, files.index(key.file), order.index(key.name)))
    rows = []
    for key in keys:
        one = before.get(key) or Figure(None, _why_absent(key, before))
        other = after.get(key) or Figure(None, _why_absent(key, after))
        rows.append(_row(key, one, other, limits, spreads.get((key.target, key.name))))
    return [*rows, *_gates(old, new), *_outcome(old, new)]


def _why_absent(key: Key, found: Iterable[Key]) -> str:
    if key.file and all(other.file != key.file for other in found):
        return f"no {key.file}"
    return "no such figure"


def _spreads(old: Report, new: Report) -> dict[tuple[str, str], Ratio | str]:
    """How many times as long or as much as before, with the interval, by target and name; or why it is not known."""
    found: dict[tuple[str, str], Ratio | str] = {}
    for benchmark in new.benchmarks:
        earlier = figures.benchmark_of(old, benchmark.target)
        if earlier is None:
            continue
        ratios = percentile_ratios(benchmark.timings_ms, earlier.timings_ms, figures.LATENCIES)
        fewest = min(len(benchmark.timings_ms), len(earlier.timings_ms))
        for percent in figures.LATENCIES:
            few = f"{fewest} timings are too few to tell its spread: {fewest_timings(percent)} are needed"
            found[benchmark.target, f"latency_p{percent}_ms"] = ratios.get(percent, few)
        rates = earlier.throughput_samples_per_second, benchmark.throughput_samples_per_second
        found[benchmark.target, "throughput_samples_per_second"] = _ratio_of_rounds(*rates)
    return found


def _ratio_of_rounds(old: Estimate, new: Estimate) -> Ratio | str:
    """The ratio, from the lowest round over the highest to the highest over the lowest."""
    if old.low is None or old.high is None or new.low is None or new.high is None:
        return "its spread was not measured"
    return Ratio(new.value / old.value, new.low / old.high, new.high / old.low)


def _row(key: Key, old: Figure, new: Figure, limits: Limits, spread: Ratio | str | None) -> Row:
    rule = _RULES[key.name]
    limit = limits.values[rule.flag] if rule.flag else None
    change = share = None
    if old.value is not None and new.value is not None:
        change = new.value.value - old.value.value
        if rule.unit != "dB" and old.value.value:
            share = change / old.value.value
    ratio = spread if isinstance(spread, Ratio) else None
    verdict: Verdict
    if change is None or old.value is None or new.value is None:
        verdict, reason = _without_values(old, new)
    elif limit is None:
        verdict, reason = ("same", "") if change == 0 else ("not comparable", NOT_JUDGED)
    elif isinstance(spread, str):
        verdict, reason = "not comparable", spread
    elif rule.relative and not old.value.value:
        verdict, reason = ("same", "") if change == 0 else ("not comparable", "the old value is zero")
    else:
        point = (share or 0.0) if rule.relative else change
        interval = (ratio.low - 1, ratio.high - 1) if ratio is not None else (point, point)
        verdict, reason = _judged(point, interval, limit, rule.more_is_better)
    return Row(
        target=key.target,
        file=key.file,
        name=key.name,
        where=key.where,
        unit=rule.unit,
        old=old.value,
        new=new.value,
        change=change,
        change_share=share,
        change_share_low=ratio.low - 1 if ratio is not None else None,
        change_share_high=ratio.high - 1 if ratio is not None else None,
        flag=rule.flag,
        limit=limit,
        verdict=verdict,
        reason=reason,
    )


def _without_values(old: Figure, new: Figure) -> tuple[Verdict, str]:
    if new.is_broken and old.value is not None:
        return "worse", f"NEW: {new.reason}"
    if old.is_broken and new.value is not None:
        return "better", f"OLD: {old.reason}"
    sides = [f"{name}: {figure.reason}" for name, figure in (("OLD", old), ("NEW", new)) if figure.value is None]
    if len(sides) == 2 and old.reason == new.reason:
        return "not comparable", f"both: {old.reason}"
    return "not comparable", "; ".join(sides)


def _judged(point: float, interval: tuple[float, float], limit: float, more_is_better: bool) -> tuple[Verdict, str]:
    """A verdict on a change and its interval: beyond the limit as a whole, or within it."""
    loss = -point if more_is_better else point
    least, most = (-interval[1], -interval[0]) if more_is_better else interval
    if least > limit + _ROUNDING:
        return "worse", ""
    if most < -limit - _ROUNDING:
        return "better", ""
    return "same", "beyond the limit, but not by more than its spread" if loss > limit + _ROUNDING else ""


def _gates(old: Report, new: Report) -> list[Row]:
    """How many gates do not pass, and which of them did before."""
    if not old.gates and not new.gates:
        return []
    before, after = _open_gates(old), _open_gates(new)
    newly = [gate for key, gate in after.items() if key not in before]
    judged = {(gate.name, gate.target) for gate in new.gates}
    gone = [gate for key, gate in before.items() if key not in after and key in judged]
    verdict: Verdict = "worse" if newly else "better" if gone else "same"
    told = [f"newly {'fails' if gate.verdict == 'failed' else 'unknown'}: {_gate(gate)}" for gate in newly]
    told = told or [f"no longer fails: {_gate(gate)}" for gate in gone]
    row = _plain_row("gates_not_passed", verdict, "; ".join(told))
    return [
        row.model_copy(
            update={
                "old": Estimate(value=len(before), low=None, high=None),
                "new": Estimate(value=len(after), low=None, high=None),
                "change": float(len(after) - len(before)),
            }
        )
    ]


def _open_gates(report: Report) -> dict[tuple[str, str], GateReport]:
    return {(gate.name, gate.target): gate for gate in report.gates if gate.verdict != "passed"}


def _gate(gate: GateReport) -> str:
    of = f" of {gate.target}" if gate.target else ""
    value = "nothing" if gate.value is None else f"{gate.value:g}"
    why = f" ({gate.reason})" if gate.reason else ""
    return f"{gate.name}{of}: {value} found, {gate.sense} {gate.limit:g} {gate.unit}".rstrip() + why


def _outcome(old: Report, new: Report) -> list[Row]:
    """Whether a run failed, where one did."""
    if old.status == new.status == "passed":
        return []
    if new.status == "passed":
        return [_plain_row("status", "better", "OLD failed, NEW passed")]
    why = f": {new.error.message}" if new.error is not None else ""
    if old.status == "passed":
        return [_plain_row("status", "worse", f"OLD passed, NEW failed{why}")]
    return [_plain_row("status", "same", f"both failed; NEW{why}")]


def _plain_row(name: str, verdict: Verdict, reason: str) -> Row:
    return Row(
        target="",
        file="",
        name=name,
        where="",
        unit="",
        old=None,
        new=None,
        change=None,
        change_share=None,
        change_share_low=None,
        change_share_high=None,
        flag="",
        limit=None,
        verdict=verdict,
        reason=reason,
    )


def _side(path: Path, report: Report) -> Side:
    return Side(
        path=str(path),
        created=report.created,
        gpuopt_version=report.gpuopt_version,
        status=report.status,
        model=(Path(report.model.path).name if report.model.path else report.model.factory) or "",
        precision=report.precision,
    )


def _refusal(differences: Sequence[Difference]) -> ComparisonError | None:
    """The error of what differs and may not."""
    found = [difference for difference in differences if not difference.allowed]
    if not found:
        return None
    first = found[0]
    of = f" of {first.target}" if first.target else ""
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    aspects = " ".join(f"--allow-different {name}" for name in dict.fromkeys(d.aspect for d in found))
    kind = "speed" if first.target else "the models" if first.aspect == "model" else "the bundles"
    return ComparisonError(
        clean(f"{kind} cannot be compared: {first.what}{of}: OLD {first.old}, NEW {first.new}{more}"),
        f"Compile both in the same way on the same machine, or compare all the same: {aspects}\n"
        f"(or --allow-different {ALL}).",
    )


def _unchecked(rows: Sequence[Row], limits: Limits) -> ComparisonError | None:
    """The error of a limit that was given and cannot be checked; None where something is worse already."""
    if any(row.verdict == "worse" for row in rows):
        return None
    for flag in sorted(limits.demanded):
        mine = [row for row in rows if row.flag == flag]
        # Files that neither side has a figure for are no gap, so long as there is another.
        gaps = [row for row in mine if row.verdict == "not comparable" and (row.old or row.new)]
        if gaps or all(row.verdict == "not comparable" for row in mine):
            row = next(iter(gaps or mine), None)
            why = f"{subject(row)}: {row.reason}" if row is not None else "neither report has such a figure"
            return ComparisonError(
                clean(f"{flag} cannot be checked: {why}"),
                "A limit that cannot be checked is not passed: measure both sides, or leave the flag out.",
            )
    return None


def _regression(rows: Sequence[Row]) -> RegressionError | None:
    """The error of what is worse: the first, and how many."""
    found = [row for row in rows if row.verdict == "worse"]
    if not found:
        return None
    first = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    told = change_text(first)
    allowed = f", {limit_text(first)} allowed" if first.flag else ""
    parts = [part for part in (f"{told}{allowed}" if told else "", first.reason) if part]
    return RegressionError(
        clean(f"{subject(first)} is worse: {'; '.join(parts)}{more}"),
        f"The answer shows every figure. To allow more: {first.flag}." if first.flag else "The answer shows the rest.",
    )
