"""What `gpuopt quantize` prints: the decision on every node, and the summary."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

HEAD = ("node", "operator", "runs in", "reason")


def rows(nodes: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """One row a node: name, operator, `INT8` or `float`, why."""
    return [
        (
            node["node"],
            node["op_type"],
            "INT8" if node["quantized"] else "float",
            node["note"] if node["quantized"] else node["reason"],
        )
        for node in nodes
    ]


def render(nodes: Sequence[Mapping[str, Any]]) -> str:
    """Aligned plain lines, one a node, the reason last."""
    found = rows(nodes)
    widths = [max((len(row[column]) for row in found), default=0) for column in range(3)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in found)


def summary(document: Mapping[str, Any], folder: str) -> str:
    """What was quantized and where it lies."""
    facts = document["quantization"]
    lines = [f"INT8         {facts['quantized_nodes']} of {facts['candidate_nodes']} candidate nodes"]
    if facts["quantized_before"]:
        lines.append("ranges       the model's own Q/DQ; nothing was calibrated")
        lines += [f"repaired     {line}" for line in facts["repaired"]]
    lines += [f"written      {folder}/{name}" for name in document["files"]]
    return "\n".join(lines)


def show(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Print the decisions on stdout: a table on a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        sys.stdout.write(render(nodes) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEAD, box=None, pad_edge=False)
    for row in rows(nodes):
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)
