"""The analysis of a model as a plot, for people who look for the layer where error builds up."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpuopt import drawing
from gpuopt.storage import write_bytes, write_text

SUFFIXES = (".svg", ".png", ".html")
_SERIES = (
    ("own_sqnr_db", "its own output, quantized alone", "o"),
    ("output_sqnr_db", "the model's output, quantized alone", "s"),
    ("accumulated_sqnr_db", "its own output, whole model quantized", "^"),
)
_INCHES_A_NODE = 0.2


def save(found: Mapping[str, Any], path: Path) -> None:
    """Draw the nodes in the graph's order; `.html` is a page that holds the SVG.

    Raises:
        StorageError: the file cannot be written.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind == "png":
        write_bytes(path, _drawn(found, "png"))
        return
    image = _drawn(found, "svg").decode()
    if kind == "svg":
        write_text(path, image)
        return
    title = html.escape(f"gpuopt analyze: {found['data']}")
    drawing = image[image.index("<svg") :]
    write_text(
        path,
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>\n'
        f"<body>\n{drawing}</body></html>\n",
    )


def _drawn(found: Mapping[str, Any], kind: str) -> bytes:
    from matplotlib.figure import Figure

    layers = sorted(found["layers"], key=lambda layer: layer["position"])
    places = range(len(layers))
    with drawing.style():
        figure = Figure(figsize=(9, 2 + _INCHES_A_NODE * len(layers)), layout="constrained")
        axes = figure.subplots()
        for key, label, marker in _SERIES:
            points = [
                (layer[key], place) for place, layer in zip(places, layers, strict=True) if layer[key] is not None
            ]
            axes.plot([x for x, _ in points], [y for _, y in points], marker, label=label, markersize=4)
        axes.set_yticks(list(places), [layer["node"] for layer in layers], fontsize=7, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel("SQNR against FP32, dB (more is better)")
        axes.grid(visible=True, alpha=0.3)
        figure.legend(loc="outside upper center", ncols=1, fontsize=8)
        return drawing.content(figure, kind)
