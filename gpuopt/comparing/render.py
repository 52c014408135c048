"""A comparison for people: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from gpuopt.comparing.model import Comparison, Row, Side
from gpuopt.comparing.words import (
    amount,
    change_text,
    clean,
    conclusion,
    difference_text,
    limit_text,
    name_of,
    verdict_text,
)
from gpuopt.report.markdown import escaped

HEAD = ("figure", "old", "new", "change", "allowed", "verdict")
_TITLES = {
    "passed": "nothing is worse",
    "regressed": "the new release is worse",
    "refused": "not compared",
}


def title(found: Comparison) -> str:
    """The outcome in a few words."""
    if found.status == "refused" and found.rows:
        return "a limit cannot be checked"
    return _TITLES[found.status]


def sides(found: Comparison) -> list[tuple[str, str]]:
    """The two reports, each in a line."""
    return [("OLD", _side(found.old)), ("NEW", _side(found.new))]


def _side(side: Side) -> str:
    made = f"{side.created}, gpuopt {side.gpuopt_version}"
    return f"{side.path}: {side.model}, {side.precision.upper()}, {side.status}, {made}"


def groups(found: Comparison) -> list[tuple[str, list[Row]]]:
    """The rows by file, each group with its heading."""
    return [
        (f"{file} ({target})" if target else file or "the whole run", list(rows))
        for (file, target), rows in groupby(found.rows, key=lambda row: (row.file, row.target))
    ]


def cells(row: Row) -> tuple[str, ...]:
    """One row as text, by `HEAD`."""
    return (
        name_of(row),
        amount(row.old, row.unit),
        amount(row.new, row.unit),
        change_text(row),
        limit_text(row),
        verdict_text(row),
    )


def terminal(found: Comparison) -> str:
    """Aligned lines of plain text."""
    lines = [f"{name}  {text}" for name, text in sides(found)]
    lines += [f"differs: {difference_text(difference)}" for difference in found.differences]
    table = [HEAD, *(cells(row) for row in found.rows)]
    widths = [max(len(clean(line[column])) for line in table) for column in range(len(HEAD))]
    for heading, rows in groups(found):
        lines += ["", heading, *("  " + _aligned(line, widths) for line in (HEAD, *map(cells, rows)))]
    if found.rows:
        lines += ["", f"{title(found)}: {conclusion(found.rows)}"]
    return "\n".join(map(clean, lines))


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    sizes = list(zip(map(clean, line), widths, strict=True))
    texts = [text.ljust(w) if place in (0, 5) else text.rjust(w) for place, (text, w) in enumerate(sizes)]
    return "  ".join(texts).rstrip()


def markdown(found: Comparison) -> str:
    """For a pull request's comment."""
    parts = [f"# gpuopt compare: {title(found)}"]
    parts.append("\n".join(f"- {name}: {_escaped(text)}" for name, text in sides(found)))
    if found.error is not None:
        parts.append(f"**{found.error.kind}** (exit code {found.error.exit_code}): {_escaped(found.error.message)}")
    if found.differences:
        parts.append("\n".join(f"- differs: {_escaped(difference_text(one))}" for one in found.differences))
    for heading, rows in groups(found):
        lines = [HEAD, ["---"] * len(HEAD), *map(_marked, rows)]
        parts += [f"## {_escaped(heading)}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    if found.rows:
        parts.append(f"{conclusion(found.rows).capitalize()}. {NOTE}")
    return "\n\n".join(parts) + "\n"


NOTE = (
    "In brackets: 90 % interval of a change, of the throughput from the lowest to the highest rounds. "
    "Worse is what is beyond the allowed with its whole interval."
)


def _marked(row: Row) -> list[str]:
    texts = [_escaped(text) for text in cells(row)]
    if row.verdict in ("worse", "better"):
        texts[-1] = texts[-1].replace(row.verdict, f"**{row.verdict}**", 1)
    return texts


def _escaped(text: str) -> str:
    return escaped(clean(text)).replace("|", "\\|")
