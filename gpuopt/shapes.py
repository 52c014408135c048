"""Tensor shapes, dtypes and shape profiles, as trtexec's users write them.

--input image:1x3x224x224          one shape, static
--input ids:1x128:int64            with a dtype
--min-shapes ids:1x8 --opt-shapes ids:8x64 --max-shapes ids:32x128
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gpuopt.errors import UsageError

Shape = tuple[int, ...]

_SIZE = re.compile(r"[0-9]{1,18}")

DTYPES = (
    "float32",
    "float16",
    "float64",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, numpy dtype name and shape; a symbolic dimension is a string."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_json(self) -> dict[str, object]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True)
class ShapeRange:
    """Smallest, most frequent and largest shape of one input, as an optimisation profile has them.

    Raises:
        UsageError: the ranks differ, or min <= opt <= max does not hold for a dimension.
    """

    min: Shape
    opt: Shape
    max: Shape

    def __post_init__(self) -> None:
        written = " / ".join(format_shape(s) for s in (self.min, self.opt, self.max))
        if not len(self.min) == len(self.opt) == len(self.max):
            raise UsageError(
                f"min / opt / max shapes have different ranks: {written}",
                "Give the three shapes the same number of dimensions.",
            )
        if any(not low <= mid <= high for low, mid, high in zip(self.min, self.opt, self.max, strict=True)):
            raise UsageError(
                f"min <= opt <= max does not hold for {written}",
                "Order every dimension as min <= opt <= max.",
            )

    @property
    def dynamic_axes(self) -> tuple[int, ...]:
        """Axes whose size differs between min and max."""
        return tuple(i for i, (low, high) in enumerate(zip(self.min, self.max, strict=True)) if low != high)

    def admits(self, shape: Shape) -> bool:
        """Whether `shape` lies inside the range."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


Profile = Mapping[str, ShapeRange]


def tuned_shapes(profiles: Sequence[Profile]) -> dict[str, Shape]:
    """The shapes by input at which an engine of several profiles is timed: the first one's optimum."""
    return {name: bounds.opt for name, bounds in profiles[0].items()}


@dataclass(frozen=True)
class Corner:
    """One point of a profile: a concrete shape for every input."""

    name: str
    shapes: Mapping[str, Shape]


def batch_size(shapes: Mapping[str, Shape]) -> int:
    """The first axis of the first input that is not a scalar; 1 if all are."""
    return next((shape[0] for shape in shapes.values() if shape), 1)


def parse_shape(text: str) -> Shape:
    """Parse `1x3x224x224`; `scalar` is the shape of a 0-d tensor.

    Raises:
        UsageError: a dimension is not a positive whole number.
    """
    if text == "scalar":
        return ()
    parts = text.replace(",", "x").split("x")
    # int() alone would take `1_0`, ` 3` and digits of other scripts, and refuse numbers of thousands of digits.
    shape = tuple(int(part) if _SIZE.fullmatch(part) else 0 for part in parts)
    if any(size < 1 for size in shape):
        raise UsageError(f"'{text}' is not a shape", "Write the sizes with an x between them: 1x3x224x224.")
    return shape


def format_shape(shape: Iterable[int | str]) -> str:
    """The inverse of `parse_shape`."""
    return "x".join(str(size) for size in shape) or "scalar"


def parse_input(text: str) -> tuple[str, Shape, str | None]:
    """Parse `NAME:SHAPE` or `NAME:SHAPE:DTYPE`; the name may hold colons.

    Returns:
        Name, shape and dtype name; the name is empty where only a shape was given.
    """
    head, _, tail = text.rpartition(":")
    dtype = None
    if tail in DTYPES:
        dtype = tail
        head, _, tail = head.rpartition(":")
    elif tail and not tail[0].isdigit() and tail != "scalar":
        raise UsageError(
            f"'{text}' is not an input: '{tail}' is neither a shape nor a dtype",
            f"Write NAME:1x3x224x224 or NAME:1x128:int64; dtypes: {', '.join(DTYPES)}.",
        )
    return head, parse_shape(tail), dtype


def parse_named_shapes(texts: Iterable[str]) -> dict[str, Shape]:
    """Parse `a:1x3,b:1x8` as trtexec writes several shapes; a flag given twice adds to it.

    A shape without a name stands under the empty name, for the only input.

    Raises:
        UsageError: an entry has no valid shape, or names an input twice.
    """
    shapes: dict[str, Shape] = {}
    for entry in itertools.chain.from_iterable(text.split(",") for text in texts):
        name, _, shape = entry.rpartition(":")
        if name in shapes:
            raise UsageError(f"input '{name}' has two shapes", "Name each input once.")
        shapes[name] = parse_shape(shape)
    return shapes


def corners(profiles: Iterable[Profile]) -> list[Corner]:
    """The points at which a model is verified: min, opt and max of every profile, without repeats.

    Where the dynamic dimensions of a profile are more than the batch (axis 0), the two mixed
    corners are added as well: smallest batch with the largest rest, and the reverse.
    """
    found: dict[tuple[tuple[str, Shape], ...], Corner] = {}
    for index, profile in enumerate(profiles):
        points = {
            "min": {name: r.min for name, r in profile.items()},
            "opt": {name: r.opt for name, r in profile.items()},
            "max": {name: r.max for name, r in profile.items()},
        }
        axes = {axis for r in profile.values() for axis in r.dynamic_axes}
        if 0 in axes and len(axes) > 1:
            points["min-batch"] = {n: r.min[:1] + r.max[1:] for n, r in profile.items()}
            points["max-batch"] = {n: r.max[:1] + r.min[1:] for n, r in profile.items()}
        for point, shapes in points.items():
            key = tuple(sorted(shapes.items()))
            found.setdefault(key, Corner(f"profile{index}-{point}", shapes))
    return list(found.values())
