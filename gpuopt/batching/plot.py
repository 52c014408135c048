"""A plan as a plot: latency, throughput and utilisation over the load."""

from __future__ import annotations

from pathlib import Path

from gpuopt import drawing
from gpuopt.batching.report import PlanReport
from gpuopt.storage import write_bytes

SUFFIXES = (".svg", ".png")
_SERIES = (("p50_ms", "p50", "-"), ("p95_ms", "p95", "--"), ("p99_ms", "p99", ":"))
_HEADROOM = 3.0


def save(plan: PlanReport, path: Path) -> None:
    """Draw the load range.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    rates = [point.rate for point in plan.load_range]
    with drawing.style():
        figure = Figure(figsize=(8, 7), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        for key, label, style in _SERIES:
            upper.plot(rates, [getattr(point, key) for point in plan.load_range], style, label=label)
        upper.axhline(plan.target.milliseconds, color="tab:red", linewidth=1, label="target")
        upper.set_ylim(0, _HEADROOM * plan.target.milliseconds)
        upper.set_ylabel("latency, ms")
        lower.plot(rates, [point.utilisation for point in plan.load_range], label="utilisation")
        lower.plot(rates, [point.drop_rate for point in plan.load_range], "--", label="refused")
        lower.plot(
            rates, [p.mean_batch / plan.settings.max_batch_size for p in plan.load_range], ":", label="filled batch"
        )
        lower.set_ylim(0, 1.05)
        lower.set_ylabel("share")
        lower.set_xlabel("requests a second")
        for axes in (upper, lower):
            axes.axvline(plan.load.rate, color="tab:gray", linewidth=1)
            axes.axvline(plan.knee, color="tab:green", linewidth=1, linestyle="--")
            axes.axvline(plan.capacity, color="tab:red", linewidth=1, linestyle="--")
            axes.grid(visible=True, alpha=0.3)
            axes.legend(loc="upper left", fontsize=8)
        upper.set_title("gray: this load, green: the knee, red: the most that holds the target", fontsize=9)
        drawn = drawing.content(figure, path.suffix.lower().removeprefix("."))
    write_bytes(path, drawn)
