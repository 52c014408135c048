"""Accuracy against cost of every combination, a panel a model, with the front drawn as a line."""

from __future__ import annotations

from collections.abc import Sequence

from gpuopt import drawing
from gpuopt.sweep.results import EXACT_DB, Row, cost, has_latencies

_MARKERS = "osD^vP*X"


def draw(rows: Sequence[Row]) -> bytes | None:
    """The plot as SVG; None if there is nothing to draw, or matplotlib is not installed."""
    drawn = [row for row in rows if row.status == "passed" and row.size_bytes is not None]
    if not drawn:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    models = list(dict.fromkeys(row.model for row in drawn))
    labels = list(dict.fromkeys(f"{row.precision}, {row.target_label}" for row in drawn))
    with drawing.style():
        figure = Figure(figsize=(8, 1 + 3.2 * len(models)), layout="constrained")
        panels = figure.subplots(len(models), squeeze=False)[:, 0]
        for axes, model in zip(panels, models, strict=True):
            family = [row for row in drawn if row.model == model]
            by_latency = has_latencies(family)
            points = [(cost(row, by_latency) or 0.0, _accuracy(row), row) for row in family]
            for number, label in enumerate(labels):
                own = [(x, y) for x, y, row in points if f"{row.precision}, {row.target_label}" == label]
                if own:
                    xs, ys = zip(*own, strict=True)
                    axes.plot(xs, ys, _MARKERS[number % len(_MARKERS)], color=f"C{number % 10}", label=label)
            front = sorted((x, y) for x, y, row in points if row.on_front)
            axes.plot([x for x, _ in front], [y for _, y in front], "-", color="0.6", zorder=0, label="front")
            for x, y, row in points:
                if row.batch is not None:
                    axes.annotate(f"b{row.batch}", (x, y), textcoords="offset points", xytext=(5, 3), fontsize=7)
            axes.set_xscale("log")
            axes.set_title(model, fontsize=10, parse_math=False)
            axes.set_xlabel("milliseconds a sample, p50" if by_latency else "size of the deployed file, bytes")
            axes.set_ylabel("lowest SQNR, dB")
            axes.grid(visible=True, alpha=0.3)
            axes.legend(fontsize=7)
        return drawing.content(figure, "svg")


def _accuracy(row: Row) -> float:
    return row.lowest_sqnr_db if row.lowest_sqnr_db is not None else EXACT_DB
