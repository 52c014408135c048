"""The drawings of `report.html`: SVG without styles, scripts or colours of its own.

Colours are names of the page's style sheet, so that a drawing is dark on light and light on dark as the page is.
matplotlib is imported when there is something to draw; `available` says whether it is there.
"""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from gpuopt.environment import has_module
from gpuopt.report.blocks import Figure, printable
from gpuopt.report.model import BenchmarkReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _LINE = "#010203", "#010204"
_SERIES = ("#010205", "#010206", "#010207")
_PAGE_COLOURS = {
    _INK: "currentColor",
    _LINE: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, 1)},
}
"""What stands for a colour while it is drawn, and what the page calls it."""

_INCHES = (5.2, 3.0)
_BINS = 60
_LONGEST = 24
_PERCENTILES = ("p50", "p90", "p95", "p99")
_DASHES = ("-", "--", "-.", ":")
_PARTS = (
    ("host_to_device_ms", "copy in"),
    ("compute_ms", "compute"),
    ("device_to_host_ms", "copy out"),
)
_SENSITIVITY = (
    ("own_sqnr_db", "its own output, quantized alone", "o"),
    ("output_sqnr_db", "the model's output, quantized alone", "s"),
    ("accumulated_sqnr_db", "its own output, whole model quantized", "^"),
)
_LABEL_PLACES = (((0, 8), "center"), ((0, -18), "center"), ((10, -4), "left"), ((-10, -4), "right"))
_SETTINGS = ("axes.", "figure.", "font.", "grid.", "legend.", "lines.", "patch.", "path.", "savefig.",
             "svg.", "text.", "xtick.", "ytick.")  # fmt: skip
_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"
_LINK = re.compile(r"(#|url\(#)([^)]+)(\)?)")
_DROPPED = ("font", "font-family", "font-weight", "font-style")


def available() -> bool:
    """Whether plots can be drawn."""
    return has_module("matplotlib")


def latency(found: BenchmarkReport, anchor: str) -> Figure | None:
    """How the single inferences are spread, the percentiles marked; None without timings."""
    timings = [value for value in found.timings_ms if math.isfinite(value)]
    marks = [getattr(found, f"latency_{name}_ms").value for name in _PERCENTILES]
    if len(timings) < 2 or not all(map(math.isfinite, marks)):
        return None
    low = min(timings)
    # A few inferences that took many times as long would press all others into one bar.
    high = min(max(timings), marks[-1] + 0.6 * max(marks[-1] - low, 0.02 * low))
    beyond = sum(value > high for value in timings)
    span = max(high - low, 1e-6)
    counts = [0] * _BINS
    for value in timings:
        if value <= high:
            counts[min(int((value - low) / span * _BINS), _BINS - 1)] += 1
    edges = [low + span * index / _BINS for index in range(_BINS + 1)]

    def draw(axes: Axes) -> None:
        axes.stairs(counts, edges, fill=True, color=_SERIES[0])
        top = max(1, *counts)
        axes.set_ylim(0, top * 1.5)
        axes.set_xlim(low - 0.03 * span, low + 1.03 * span)
        for place, (name, value) in enumerate(zip(_PERCENTILES, marks, strict=True)):
            height = top * (1.42 - 0.11 * place)
            axes.plot([value, value], [0, height], _DASHES[place], color=_INK, linewidth=1)
            right = value > low + 0.7 * span
            axes.annotate(
                f"{name} {value:.3f}", (value, height), (-4 if right else 4, -6), textcoords="offset points",
                ha="right" if right else "left", parse_math=False,
            )  # fmt: skip
        axes.set_xlabel("milliseconds, one inference")
        axes.set_ylabel("inferences")

    told = ", ".join(f"{name} {value:.3f}" for name, value in zip(_PERCENTILES, marks, strict=True))
    rest = f" {beyond} slower ones, up to {max(timings):.3f} ms, lie beyond the right edge." if beyond else ""
    return Figure(
        _drawn(draw, anchor),
        f"Histogram of {len(timings)} latencies from {low:.3f} to {max(timings):.3f} ms: {told} ms.",
        f"{found.target}: {len(timings)} single inferences, each waited for.{rest}",
    )


def parts(found: Sequence[BenchmarkReport], anchor: str) -> Figure | None:
    """How long the copies and the compute take; None where nothing was copied."""
    copied = [one for one in found if one.host_to_device_ms is not None and one.compute_ms is not None]
    if not copied:
        return None

    def draw(axes: Axes) -> None:
        names: list[str] = []
        for one in copied:
            start = 0.0
            for (key, label), colour in zip(_PARTS, _SERIES, strict=True):
                taken = getattr(one, key) or 0.0
                axes.barh(len(names), taken, 0.7, start, color=colour)
                axes.annotate(f"{taken:.3f}", (start + taken, len(names)), (4, 0), textcoords="offset points",
                              va="center", parse_math=False)  # fmt: skip
                start += taken
                names.append(f"{_short(one.target)}: {label}" if len(copied) > 1 else label)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.margins(x=0.15)
        axes.set_xlabel("milliseconds, each part alone")

    told = "; ".join(
        f"{one.target}: " + ", ".join(f"{label} {getattr(one, key) or 0.0:.3f} ms" for key, label in _PARTS)
        for one in copied
    )
    height = 1.0 + 1.1 * len(copied)
    return Figure(
        _drawn(draw, anchor, height),
        f"Bars. {told}.",
        f"{', '.join(one.target for one in copied)}: copies and compute, one after the other.",
    )


def candidates(race: Mapping[str, Any], anchor: str) -> Figure | None:
    """Accuracy against latency; None if no candidate has both."""
    rows = [row for row in race["candidates"] if row["milliseconds"] is not None and row["lowest_sqnr_db"] is not None]
    if not rows:
        return None
    left_out = [row["name"] for row in race["candidates"] if row not in rows]

    def draw(axes: Axes) -> None:
        axes.grid(visible=True, color=_LINE, linewidth=0.8)
        axes.margins(x=0.25, y=0.25)
        for row in rows:
            time, ships = row["milliseconds"], row["name"] == race["chosen"]
            spread = [[time - row["lowest"]], [row["highest"] - time]] if row["lowest"] is not None else None
            axes.errorbar([time], [row["lowest_sqnr_db"]], xerr=spread, fmt="D" if ships else "o", capsize=3,
                          color=_SERIES[1 if ships else 0], markersize=8)  # fmt: skip
            label = _short(row["name"]) + (" (ships)" if ships else "")
            offset, side = _LABEL_PLACES[_crowd(row, rows) % len(_LABEL_PLACES)]
            axes.annotate(label, (time, row["lowest_sqnr_db"]), offset, textcoords="offset points", ha=side,
                          parse_math=False)  # fmt: skip
        axes.set_xlabel("milliseconds, median of the rounds (less is better)")
        axes.set_ylabel("lowest SQNR, dB")

    told = "; ".join(f"{row['name']}: {row['milliseconds']:.3f} ms, {row['lowest_sqnr_db']:.1f} dB" for row in rows)
    rest = f" Without both figures: {', '.join(left_out)}." if left_out else ""
    caption = f"Up and to the left is better. Bars: fastest and slowest round. The diamond ships.{rest}"
    return Figure(_drawn(draw, anchor), f"Accuracy against latency. {told}.", caption)


def _short(name: str) -> str:
    """A name that leaves room for the drawing."""
    return printable(name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}")


def _crowd(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> int:
    """How many candidates lie near this one and above it: their labels take the first places."""
    keys = ("milliseconds", "lowest_sqnr_db")
    spans = {key: max(one[key] for one in rows) - min(one[key] for one in rows) or 1.0 for key in keys}
    near = [one for one in rows if all(abs(one[key] - row[key]) < 0.2 * spans[key] for key in keys)]
    near.sort(key=lambda one: -float(one["lowest_sqnr_db"]))
    return near.index(row)


def sensitivity(layers: Sequence[Mapping[str, Any]], anchor: str) -> Figure:
    """The SQNR of every layer in the graph's order."""

    def draw(axes: Axes) -> None:
        axes.grid(visible=True, axis="y", color=_LINE, linewidth=0.8)
        for (key, label, marker), colour in zip(_SENSITIVITY, _SERIES, strict=True):
            points = [(layer["position"] + 1, layer[key]) for layer in layers if layer[key] is not None]
            axes.plot([x for x, _ in points], [y for _, y in points], marker, color=colour, label=label, markersize=4)
        axes.set_xlabel("layer, in the graph's order")
        axes.set_ylabel("SQNR, dB (more is better)")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=1, frameon=False, borderpad=0.1)

    known = [layer for layer in layers if layer["output_sqnr_db"] is not None]
    worst = min(known, key=lambda layer: float(layer["output_sqnr_db"]), default=None)
    told = f"; worst: {worst['node']} with {worst['output_sqnr_db']:.1f} dB" if worst else ""
    return Figure(
        _drawn(draw, anchor, 3.6),
        f"SQNR of {len(layers)} layers in the graph's order{told}. The table has every figure.",
        "Signal to quantization noise of every INT8 layer against FP32.",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """What matplotlib says about fonts and folders is nothing that a reader of the report can use."""
    logger = logging.getLogger("matplotlib")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _drawn(draw: Callable[[Axes], None], anchor: str, height: float = _INCHES[1]) -> str:
    with _quiet():
        import matplotlib
        from matplotlib.figure import Figure as Canvas

        standard = {
            key: matplotlib.rcParamsDefault[key] for key in matplotlib.rcParamsDefault if key.startswith(_SETTINGS)
        }
        chosen = {
            "svg.fonttype": "none",
            "svg.hashsalt": anchor,
            "font.size": 10,
            "legend.fontsize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            **dict.fromkeys(
                ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
            ),
        }  # fmt: skip
        # Not what the user's matplotlibrc says: equal reports are equal files.
        with matplotlib.rc_context({**standard, **chosen}):
            figure = Canvas(figsize=(_INCHES[0], height), layout="tight", facecolor="none")
            axes = figure.subplots()
            axes.set_facecolor("none")
            draw(axes)
            stream = io.BytesIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(stream, format="svg", metadata=nothing, transparent=True)
    return _for_the_page(stream.getvalue(), anchor)


def _for_the_page(svg: bytes, anchor: str) -> str:
    """The drawing with presentation attributes for styles, which the page's security policy forbids."""
    root = ElementTree.fromstring(svg)  # noqa: S314 - drawn a line before
    names: dict[str, str] = {}
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        for key, value in _presentation(element.attrib.pop("style", "")):
            element.set(key, _PAGE_COLOURS.get(value, value))
        if _XLINK + "href" in element.attrib:
            element.set("href", element.attrib.pop(_XLINK + "href"))
        if "id" in element.attrib:
            if element.tag in ("g", "text"):
                del element.attrib["id"]
            else:
                names[element.attrib["id"]] = f"{anchor}-{len(names)}"
        element.text, element.tail = (part if part and part.strip() else None for part in (element.text, element.tail))
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id" and value in names:
                element.set(key, names[value])
            elif (link := _LINK.fullmatch(value)) and link[2] in names:
                element.set(key, f"{link[1]}{names[link[2]]}{link[3]}")
            elif key == "d":
                element.set(key, " ".join(value.split()))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    root.attrib = {"viewBox": root.attrib["viewBox"]}
    return ElementTree.tostring(root, encoding="unicode")


def _presentation(style: str) -> Iterator[tuple[str, str]]:
    for entry in style.split(";"):
        key, _, value = (part.strip() for part in entry.partition(":"))
        if key == "font":
            size = next((word for word in value.split() if word.endswith("px")), "10px")
            yield "font-size", size
        elif key and key not in _DROPPED:
            yield key, value
