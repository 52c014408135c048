"""What lies beside a graph that is tried: the shapes of its inputs, and for a difference values and limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpuopt.shapes import Profile, ShapeRange, format_shape, parse_shape
from gpuopt.storage import write_json

GRAPH_FILE = "reduced.onnx"
PROFILE_FILE = "profile.json"
VALUES_FILE = "values.npz"
OTHER_FILE = "other.onnx"
LIMITS_FILE = "limits.json"


def write_profile(profile: Profile, folder: Path) -> None:
    """Lay the shapes beside the graph."""
    write_json(folder / PROFILE_FILE, profile_to_json(profile))


def profile_to_json(profile: Profile) -> dict[str, dict[str, str]]:
    """Shapes as text, by input and `min`, `opt`, `max`."""
    return {
        name: {part: format_shape(getattr(sizes, part)) for part in ("min", "opt", "max")}
        for name, sizes in profile.items()
    }


def profile_from_json(document: Any) -> dict[str, ShapeRange]:
    """The inverse of `profile_to_json`.

    Raises:
        UsageError, KeyError, TypeError: it is none.
    """
    return {
        str(name): ShapeRange(*(parse_shape(str(sizes[part])) for part in ("min", "opt", "max")))
        for name, sizes in dict(document).items()
    }
