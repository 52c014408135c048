"""`gpuopt compare` without its command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from gpuopt.comparing import judge, limits, load, page, render
from gpuopt.comparing.judge import Answer
from gpuopt.comparing.model import Comparison
from gpuopt.errors import StorageError, one_line
from gpuopt.storage import write_text


def compare(
    old: Path, new: Path, given: Mapping[str, str | float | None], allowed: Sequence[str], command: Sequence[str]
) -> Answer:
    """Read two bundles or reports, and compare them.

    Args:
        given: limits by flag, None for those that were not given.
        allowed: aspects that may differ.

    Raises:
        UsageError: a limit is no number.
        StorageError: a report is damaged or of another schema.
    """
    asked = limits.read(given)
    reports = (old, load.load(old)), (new, load.load(new))
    try:
        return judge.compare(*reports, asked, allowed, command)
    except ValidationError as error:
        # What stages say has no types in a report's schema, and a row of the comparison has.
        first = error.errors()[0]
        raise StorageError(
            f"{old} or {new} is damaged: {first['loc'][-1]} {one_line(repr(first['input']))}: {first['msg']}", load.HINT
        ) from error


def document(found: Comparison) -> str:
    """The comparison as JSON."""
    return found.model_dump_json(indent=2)


def write(found: Comparison, output: Path | None, markdown: Path | None, html: Path | None) -> None:
    """Write the files that were asked for.

    Raises:
        StorageError: one cannot be written.
    """
    if output is not None:
        write_text(output, document(found) + "\n")
    if markdown is not None:
        write_text(markdown, render.markdown(found))
    if html is not None:
        write_text(html, page.page(found))
