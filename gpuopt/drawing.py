"""What all plots in files have in common; each plot's content is with its report."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpuopt import environment
from gpuopt.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse `--plot` at once where nothing could be plotted after minutes of work.

    Raises:
        UsageError: the file's kind is unknown.
        RequirementError: matplotlib is missing.
    """
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"--plot {path}: the kind of file is unknown", f"End it in {', '.join(suffixes)}.")
    environment.require("matplotlib", "a plot")


@contextlib.contextmanager
def style() -> Iterator[None]:
    """For a block, draw so that text in an SVG can be searched, and equal plots are equal files."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gpuopt"}):
        yield


def content(figure: Figure, kind: str) -> bytes:
    """A figure as a file's content.

    Args:
        kind: `svg` or `png`.
    """
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return stream.getvalue()
