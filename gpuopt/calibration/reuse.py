"""Ranges from a file instead of a pass over data: which of them fit the graph."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gpuopt.calibration.collectors import TensorRange
from gpuopt.calibration.ranges import UNNAMED, RangesFile
from gpuopt.calibration.readers.checks import listed
from gpuopt.errors import DataError

_MOST_SUGGESTIONS = 3


@dataclass(frozen=True)
class Reused:
    """The ranges that fit.

    Attributes:
        ranges: by tensor, in the graph's order.
        missing: activations of the graph without a range.
        unknown: names in the file that the graph does not have, without those that TensorRT made up.
        warnings: one line each.
    """

    ranges: dict[str, TensorRange]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    warnings: tuple[str, ...]


def match(file: RangesFile, wanted: Sequence[str], tensors: Collection[str]) -> Reused:
    """Take from a file the ranges of the activations that quantization may need.

    Args:
        file: what the user gave.
        wanted: activations that feed candidate nodes, in the graph's order.
        tensors: all tensors of the graph.

    Raises:
        DataError: the file belongs to another model: it has none of the wanted tensors, or most of its names
            are not in the graph and most of the wanted ones not in it.
    """
    ranges = {name: file.ranges[name] for name in wanted if name in file.ranges}
    missing = tuple(name for name in wanted if name not in ranges)
    made_up = [name for name in file.ranges if name.startswith(UNNAMED)]
    unknown = tuple(name for name in file.ranges if name not in tensors and name not in set(made_up))
    named = len(file.ranges) - len(made_up)
    if wanted and (not ranges or (2 * len(missing) > len(wanted) and 2 * len(unknown) > named)):
        raise DataError(
            f"{file.origin} is for another model: it has {len(ranges)} of {len(wanted)} activations that need a range, "
            f"and {len(unknown)} of its {named} names are not in the graph ({listed(unknown[:2]) or 'none'})",
            "Tensor names can change with the exporter, its version or the model's code: calibrate again with "
            "--calibration-data.",
        )
    warnings = []
    if missing:
        warnings.append(
            f"{file.origin}: {len(missing)} of {len(wanted)} activations have no range there, and the nodes that read "
            f"them stay in floating point: {listed(missing)}"
        )
    if unknown:
        warnings.append(
            f"{file.origin}: {len(unknown)} of its names are not in the graph: {_suggested(unknown, missing)}"
        )
    if made_up:
        warnings.append(
            f"{file.origin}: {len(made_up)} of its names were made up by TensorRT for tensors without one, such as "
            f"'{made_up[0]}', and cannot be found in the graph"
        )
    return Reused(ranges, missing, unknown, tuple(warnings))


def _suggested(unknown: Sequence[str], missing: Sequence[str]) -> str:
    """The unknown names, each with the nearest that has no range."""
    shown = []
    for name in unknown[:_MOST_SUGGESTIONS]:
        near = difflib.get_close_matches(name, missing, 1)
        shown.append(f"'{name}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
    more = len(unknown) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
