"""The ranges file: readable, diffable, reusable."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpuopt.calibration.collectors import TensorRange
from gpuopt.errors import DataError
from gpuopt.storage import write_json

RANGES_FILE = "ranges.json"
_VERSION = 1


def save(path: Path, ranges: Mapping[str, TensorRange], about: Mapping[str, Any]) -> None:
    """Write ranges by tensor name, in the graph's order, with what they came from."""
    tensors = {name: {"low": r.low, "high": r.high, "method": r.method} for name, r in ranges.items()}
    write_json(path, {"version": _VERSION, **about, "tensors": tensors})


def load(path: Path) -> dict[str, TensorRange]:
    """Read a ranges file.

    Raises:
        DataError: it is not one, or a range is empty, reversed or not finite.
    """
    try:
        document = json.loads(path.read_text())
        if document["version"] != _VERSION:
            raise ValueError(f"version {document['version']}")
        ranges = {
            name: TensorRange(float(r["low"]), float(r["high"]), str(r["method"]))
            for name, r in document["tensors"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} is not a ranges file: {error}", "Calibrate again to write it anew.") from error
    for name, r in ranges.items():
        if not (math.isfinite(r.low) and math.isfinite(r.high) and r.low <= r.high):
            raise DataError(
                f"{path}: the range of '{name}' is {r.low} to {r.high}", "Write finite numbers, low <= high."
            )
    return ranges
