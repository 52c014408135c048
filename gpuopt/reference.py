"""Reference inputs and outputs at every profile corner, so that later stages need no torch.

    reference/reference.json      inputs, outputs, profiles, corners
    reference/<corner>.npz        keys `input:NAME`, `output:NAME`

The inputs are calibration samples where there are some, cut or repeated to the corner's shape,
else seeded random values.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuopt.errors import DataError, StorageError, UsageError, one_line
from gpuopt.shapes import Corner, Profile, Shape, ShapeRange, TensorSpec, corners, format_shape, parse_shape
from gpuopt.storage import read_bytes, write_json

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]
Forward = Callable[[Feed], Sequence[Array]]
_CORNER_NAME = re.compile(r"[\w-]{1,100}", re.ASCII)
_MOST_BYTES = 4 << 30
"""Of all inputs at one corner: a graph can declare any size."""
_MOST_DIFFERING = 0.01
"""Share of an integer output's values: a label between two equal scores may fall either way."""

ValueRanges = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Reference:
    """What the original model computes at the corners.

    Attributes:
        folder: where the arrays lie.
        origin: `PyTorch` or `ONNX`, whoever computed the outputs.
        inputs, outputs: the model's tensors; a dynamic dimension is a string.
        profiles: the shape profiles.
        corners: the shapes at which outputs are stored.
        batched_outputs: outputs whose rows the original model was found to compute independently of each other.
    """

    folder: Path
    origin: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    corners: tuple[Corner, ...]
    batched_outputs: tuple[str, ...]

    def feed(self, corner: Corner) -> dict[str, Array]:
        """The inputs stored for a corner."""
        return self._arrays(corner, "input:")

    def expected(self, corner: Corner) -> dict[str, Array]:
        """The original model's outputs for a corner."""
        return self._arrays(corner, "output:")

    def _arrays(self, corner: Corner, prefix: str) -> dict[str, Array]:
        from gpuopt.calibration.readers import npy

        path = self.folder / f"{corner.name}.npz"
        arrays = {}
        try:
            with npy.open_archive(path, str(path)) as archive:
                for key, info in npy.members(archive, str(path)).items():
                    # `save_arrays` compresses nothing: what unpacks to more than it is was not written by it.
                    if info.compress_type != zipfile.ZIP_STORED:
                        raise DataError(f"array '{key}' is compressed")
                    if key.startswith(prefix):
                        with npy.open_member(archive, info, f"array '{key}' of {path}") as stream:
                            array = npy.read_whole(stream, info.file_size, None, f"array '{key}' of {path}")
                        arrays[key.removeprefix(prefix)] = array
        except (OSError, DataError) as error:
            raise StorageError(
                f"the reference {path} cannot be read: {one_line(error)}", "The bundle is damaged: compile again."
            ) from error
        return arrays


def make_feed(
    corner: Corner, inputs: Iterable[TensorSpec], samples: Sequence[Feed], ranges: ValueRanges, seed: int
) -> dict[str, Array]:
    """Inputs of a corner's shapes.

    Args:
        corner: a concrete shape for every input.
        inputs: names and dtypes.
        samples: calibration samples, each with its batch axis; may be empty.
        ranges: value range of generated inputs: floats uniform in [low, high], integers in [low, high).
        seed: of the generated values (floats without a range: standard normal; integers: 0 or 1).

    Raises:
        DataError: a sample has another number of dimensions than its input, or no values.
        UsageError: the shapes are too large to be verified.
    """
    generator = np.random.default_rng(seed)
    feed = {}
    inputs = list(inputs)
    size = sum(math.prod(corner.shapes[spec.name]) * np.dtype(spec.dtype).itemsize for spec in inputs)
    if size > _MOST_BYTES:
        shown = ", ".join(f"{spec.name} {format_shape(corner.shapes[spec.name])}" for spec in inputs[:3])
        raise UsageError(
            f"the inputs of one inference would take {size / (1 << 30):.1f} GiB: {shown}",
            f"At most {_MOST_BYTES >> 30} GiB can be verified: give smaller shapes with --input or --max-shapes.",
        )
    for spec in inputs:
        shape = corner.shapes[spec.name]
        found = [sample[spec.name] for sample in samples if spec.name in sample]
        if found:
            _check_ranks(spec.name, found, shape)
            feed[spec.name] = _fit(found, shape).astype(spec.dtype)
        else:
            feed[spec.name] = _generate(generator, shape, np.dtype(spec.dtype), ranges.get(spec.name))
    return feed


def _check_ranks(name: str, samples: Sequence[Array], shape: Shape) -> None:
    for sample in samples:
        spare = sample.ndim == len(shape) + 1 and sample.shape[0] == 1
        if not sample.size or (sample.ndim != len(shape) and not spare):
            raise DataError(
                f"a calibration sample of '{name}' has the shape {format_shape(sample.shape)}, "
                f"the input {format_shape(shape)}",
                "Give samples with as many dimensions as the input, and at least one value.",
            )


def _fit(samples: Sequence[Array], shape: Shape) -> Array:
    """One sample a row, in turn; every other axis cut or repeated to `shape`."""
    rows = [row for sample in samples for row in _rows(sample, len(shape))]
    if not shape:
        return rows[0].reshape(())
    fitted = []
    for index in range(shape[0]):
        row = rows[index % len(rows)]
        for axis, size in enumerate(shape[1:]):
            if row.shape[axis] != size:
                row = np.take(row, np.arange(size) % row.shape[axis], axis=axis)
        fitted.append(row)
    return np.stack(fitted)


def _rows(sample: Array, rank: int) -> list[Array]:
    """A sample of the input's rank is cut along its first axis; one with a leading 1 to spare loses it first."""
    if sample.ndim == rank + 1 and sample.shape[0] == 1:
        sample = sample[0]
    return [sample] if rank == 0 else list(sample)


def _generate(
    generator: np.random.Generator, shape: Shape, dtype: np.dtype[Any], bounds: tuple[float, float] | None
) -> Array:
    if dtype.kind == "b":
        return generator.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        low, high = bounds or (0, 2)
        return generator.integers(int(low), max(int(high), int(low) + 1), shape).astype(dtype)
    if bounds:
        return generator.uniform(*bounds, shape).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


@dataclass(frozen=True)
class Interface:
    """A model's tensors and the shapes it is compiled for."""

    inputs: tuple[TensorSpec, ...]
    output_names: tuple[str, ...]
    profiles: tuple[Profile, ...]


def record(folder: Path, interface: Interface, run: Forward, feeds: Mapping[str, Feed], origin: str) -> Reference:
    """Run the original model at every corner and store what it gives.

    Args:
        folder: an existing empty folder.
        run: feed -> outputs, in the order of `interface.output_names`.
        feeds: inputs by corner name.
        origin: `PyTorch` or `ONNX`.
    """
    points = corners(interface.profiles)
    shapes: dict[str, list[Shape]] = {}
    dtypes: dict[str, str] = {}
    batched: set[str] = set()
    for corner in points:
        feed = feeds[corner.name]
        outputs = dict(zip(interface.output_names, run(feed), strict=True))
        arrays = {f"input:{name}": value for name, value in feed.items()}
        arrays.update({f"output:{name}": value for name, value in outputs.items()})
        save_arrays(folder / f"{corner.name}.npz", arrays)
        for name, value in outputs.items():
            shapes.setdefault(name, []).append(value.shape)
            dtypes[name] = str(value.dtype)
        if corner.name == largest_batch(points, interface.profiles):
            batched = _independent_rows(run, feed, outputs)
    specs = tuple(TensorSpec(name, dtypes[name], _merge(shapes[name])) for name in interface.output_names)
    return _write(
        Reference(folder, origin, interface.inputs, specs, interface.profiles, tuple(points), tuple(sorted(batched)))
    )


@dataclass(frozen=True)
class Restatement:
    """The same inputs and outputs in another form: layout, dtype.

    Attributes:
        inputs, outputs: the tensors, with the names that they had.
        profiles: the shape profiles.
        input_value, output_value: an array in its new form, by name.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    input_value: Callable[[str, Array], Array]
    output_value: Callable[[str, Array], Array]


def restated(folder: Path, stored: Reference, form: Restatement) -> Reference:
    """Store a reference in another form; nothing is computed.

    Args:
        folder: an existing empty folder.
    """
    points = corners(form.profiles)
    for before, after in zip(stored.corners, points, strict=True):
        feed, expected = stored.feed(before), stored.expected(before)
        arrays = {f"input:{name}": form.input_value(name, value) for name, value in feed.items()}
        arrays.update({f"output:{name}": form.output_value(name, value) for name, value in expected.items()})
        save_arrays(folder / f"{after.name}.npz", arrays)
    return _write(
        Reference(
            folder, stored.origin, form.inputs, form.outputs, form.profiles, tuple(points), stored.batched_outputs
        )
    )


def _write(stored: Reference) -> Reference:
    write_json(
        stored.folder / "reference.json",
        {
            "origin": stored.origin,
            "inputs": [spec.to_json() for spec in stored.inputs],
            "outputs": [spec.to_json() for spec in stored.outputs],
            "profiles": [
                {
                    name: {"min": format_shape(r.min), "opt": format_shape(r.opt), "max": format_shape(r.max)}
                    for name, r in profile.items()
                }
                for profile in stored.profiles
            ],
            "corners": [
                {"name": c.name, "shapes": {n: format_shape(s) for n, s in c.shapes.items()}} for c in stored.corners
            ],
            "batched_outputs": list(stored.batched_outputs),
        },
    )
    return load(stored.folder)


def save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write an `.npz` file; keys may be any text, and equal arrays give equal bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(value), allow_pickle=False)


def largest_batch(points: Sequence[Corner], profiles: Sequence[Profile]) -> str | None:
    """The corner with the largest batch above 1 of which a profile also takes one row alone, if every input has a
    dynamic batch down to 1."""
    ranges = profiles[0].values()
    if not all(r.min and r.min[0] == 1 and 0 in r.dynamic_axes for r in ranges):
        return None
    fitting = [c for c in points if all(s[0] > 1 for s in c.shapes.values()) and _takes_one_row(c, profiles)]
    return max(fitting, key=lambda c: next(iter(c.shapes.values()))[0]).name if fitting else None


def _takes_one_row(corner: Corner, profiles: Sequence[Profile]) -> bool:
    rows = {name: (1, *shape[1:]) for name, shape in corner.shapes.items()}
    return any(all(profile[name].admits(shape) for name, shape in rows.items()) for profile in profiles)


def rows_to_check(batch: int) -> list[int]:
    """Rows of a batch that are also run alone: the first and the last."""
    return sorted({0, batch - 1})


def row_of(feed: Feed, row: int) -> dict[str, Array]:
    """One sample of a batch, its batch axis kept."""
    return {name: value[row : row + 1] for name, value in feed.items()}


def with_distinct_rows(feed: Feed) -> Feed | None:
    """A feed whose rows can be told apart, for a model that mixes equal rows gives what it gives for one alone.

    Args:
        feed: every input with the batch along axis 0.

    Returns:
        The feed itself where its rows differ. Else one made of its only row: its values in another order, and
        floating-point ones smaller from row to row, down to about half. None where that makes no difference.
    """
    if not _rows_are_equal(feed):
        return feed
    varied = {name: _varied(value) for name, value in feed.items()}
    return None if _rows_are_equal(varied) else varied


def _rows_are_equal(feed: Feed) -> bool:
    return all(np.array_equal(v, np.broadcast_to(v[:1], v.shape), equal_nan=v.dtype.kind == "f") for v in feed.values())


def _varied(value: Array) -> Array:
    varied = value.copy()
    for index in range(1, len(value)):
        # What is in range stays in range: ids, bytes and masks are only moved.
        row = np.roll(value[index], index)
        varied[index] = row * (1 - index / (2 * len(value))) if value.dtype.kind == "f" else row
    return varied


def _independent_rows(run: Forward, feed: Feed, outputs: Mapping[str, Array]) -> set[str]:
    """Outputs of a batch's rows that are those of the rows alone; none where all rows are the same one."""
    distinct = with_distinct_rows(feed)
    if distinct is None:
        return set()
    if distinct is not feed:
        try:
            outputs = dict(zip(outputs, run(distinct), strict=True))
        except Exception:  # a model may refuse values in another order, and nothing else shows independence
            return set()
    batch = next(iter(feed.values())).shape[0]
    names = {name for name, value in outputs.items() if value.ndim and value.shape[0] == batch}
    for row in rows_to_check(batch):
        alone = dict(zip(outputs, run(row_of(distinct, row)), strict=True))
        names = {name for name in names if _is_row(alone[name], outputs[name], row)}
    return names


def _is_row(alone: Array, together: Array, row: int) -> bool:
    in_batch = together[row : row + 1]
    if alone.shape != in_batch.shape:
        return False
    if together.dtype.kind != "f":
        return bool(np.count_nonzero(alone != in_batch) <= _MOST_DIFFERING * alone.size)
    largest = float(np.max(np.abs(together[np.isfinite(together)]), initial=0.0))
    return np.allclose(in_batch, alone, rtol=1e-3, atol=1e-3 * largest, equal_nan=True)


def _merge(shapes: Sequence[Shape]) -> tuple[int | str, ...]:
    if len({len(shape) for shape in shapes}) != 1:
        return ("*",)
    return tuple(
        sizes[0] if len(set(sizes)) == 1 else ("batch" if axis == 0 else f"dim{axis}")
        for axis, sizes in enumerate(zip(*shapes, strict=True))
    )


def load(folder: Path) -> Reference:
    """Open a stored reference.

    Raises:
        StorageError: `reference.json` is missing or damaged.
    """
    try:
        record = json.loads(read_bytes(folder / "reference.json"))
        return Reference(
            folder=folder,
            origin=record["origin"],
            inputs=tuple(_spec(entry) for entry in record["inputs"]),
            outputs=tuple(_spec(entry) for entry in record["outputs"]),
            profiles=tuple(
                {
                    name: ShapeRange(parse_shape(r["min"]), parse_shape(r["opt"]), parse_shape(r["max"]))
                    for name, r in profile.items()
                }
                for profile in record["profiles"]
            ),
            corners=tuple(
                Corner(_corner_name(entry["name"]), {n: parse_shape(s) for n, s in entry["shapes"].items()})
                for entry in record["corners"]
            ),
            batched_outputs=tuple(record["batched_outputs"]),
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        UsageError,
        StorageError,
    ) as error:
        raise StorageError(
            f"the reference in {folder} cannot be read: {one_line(error)}", "The bundle is damaged: compile again."
        ) from error


def _corner_name(name: Any) -> str:
    """It is the name of a file, too, and stays in its folder."""
    if not isinstance(name, str) or not _CORNER_NAME.fullmatch(name):
        raise ValueError(f"a corner called {str(name)[:40]!r}")
    return name


def _spec(entry: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(entry["name"], entry["dtype"], tuple(entry["shape"]))
