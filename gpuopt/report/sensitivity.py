"""The analysis of a model as a table: pure functions of what `sensitivity.json` holds."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

HEAD = ("rank", "node", "operator", "own", "output", "accumulated", "MACs")
_LEGEND = (
    "SQNR against FP32, dB. own, output: the node's and the model's output with this node alone in INT8; "
    "accumulated: the node's\noutput with all nodes in INT8; empty: exact or none. "
    "MACs: share of the multiply-accumulates."
)
_NAMED = 3
_ENOUGH_DB = 30.0
"""What FP16 itself has to reach: with an SQNR above it no node has to stay out of INT8."""
_PLAIN = re.compile(r"[A-Za-z_][\w./-]*")


def rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row a node, costliest first, as text."""
    return [
        (
            str(layer["rank"]),
            layer["node"],
            layer["op_type"],
            _decibels(layer["own_sqnr_db"]),
            "NaN" if layer["cost"] is None else _decibels(layer["output_sqnr_db"]),
            _decibels(layer["accumulated_sqnr_db"]),
            f"{layer['macs_share']:.1%}",
        )
        for layer in found["layers"]
    ]


def conclusion(found: Mapping[str, Any]) -> str:
    """The whole model, the costliest nodes, and what keeps those in FP16."""
    names = [layer["node"] for layer in found["layers"][:_NAMED]]
    share = sum(layer["macs_share"] for layer in found["layers"][:_NAMED])
    lines = [
        f"all {len(found['layers'])} nodes in INT8: {_outcome(found['whole'])}, "
        f"{found['int8_macs_share']:.1%} of multiply-accumulates; {found['samples']} samples of {found['data']}",
        f"costliest: {', '.join(names)} ({share:.1%} of multiply-accumulates)",
    ]
    # Without any node in INT8 there would be nothing to quantize.
    kept = names[: len(found["layers"]) - 1]
    if kept and _costs(found["whole"]):
        setting = f"quantize.nodes_to_exclude=[{','.join(map(_as_yaml, kept))}]"
        who = "them" if kept == names else ", ".join(kept)
        lines.append(f"to keep {who} in FP16: --set {shlex.quote(setting)}")
    return "\n".join(lines)


def render(found: Mapping[str, Any]) -> str:
    """Aligned lines for a file or a pipe."""
    table = [HEAD, *rows(found)]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEAD))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in table]
    return "\n".join([*lines, "", _LEGEND, "", conclusion(found)])


def show(found: Mapping[str, Any]) -> None:
    """The same on a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, caption=_LEGEND.replace("\n", " "), caption_justify="left")
    for column, name in enumerate(HEAD):
        table.add_column(name, justify="left" if column in (1, 2) else "right", overflow="fold")
    for row in rows(found):
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(conclusion(found), soft_wrap=True)


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    return [
        text.ljust(width) if column in (1, 2) else text.rjust(width)
        for column, (text, width) in enumerate(zip(row, widths, strict=True))
    ]


def _costs(whole: Mapping[str, Any]) -> bool:
    """Whether INT8 costs so much that nodes may have to stay out of it."""
    if whole["cost"] is not None and whole["output_sqnr_db"] is not None:
        return bool(whole["output_sqnr_db"] < _ENOUGH_DB)
    return whole["cost"] is None or whole["cost"] > 0


def _outcome(whole: Mapping[str, Any]) -> str:
    if whole["cost"] is None:
        return "output SQNR NaN"
    if whole["output_sqnr_db"] is not None:
        return f"output SQNR {_decibels(whole['output_sqnr_db'])} dB"
    return f"{1 - whole['cost']:.1%} of the output's values agree" if whole["cost"] else "output exact"


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _as_yaml(name: str) -> str:
    """A name that YAML and the shell patterns of the setting read as it is."""
    literal = "".join(f"[{c}]" if c in "*?[" else c for c in name)
    plain = _PLAIN.fullmatch(literal) and yaml.safe_load(literal) == literal
    return literal if plain else json.dumps(literal)
