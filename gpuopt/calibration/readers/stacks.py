"""One file with all samples, stacked along axis 0: .npz with a stack for each input, or .npy for one input."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpuopt.calibration.readers import npy
from gpuopt.calibration.readers.base import (
    KINDS_HINT,
    Inputs,
    RawSample,
    SampleReader,
    label,
    only_input,
    reading,
)
from gpuopt.calibration.readers.checks import check_names, full_shape
from gpuopt.errors import DataError
from gpuopt.shapes import Shape, TensorSpec, format_shape


@dataclass(frozen=True)
class _Stack:
    """How a stack of shape `shape` is cut: `step` rows a sample, 0 for one row without its axis."""

    shape: Shape
    step: int

    @property
    def samples(self) -> int:
        return self.shape[0] // max(1, self.step)

    @property
    def rest(self) -> int:
        return self.shape[0] % max(1, self.step)

    @property
    def sample_shape(self) -> Shape:
        return (self.step, *self.shape[1:]) if self.step else self.shape[1:]


def _cut(name: str, shape: Shape, spec: TensorSpec | None, where: str) -> _Stack:
    """Decide by the ranks how an array is cut into samples, and check their shape.

    Raises:
        DataError: the array is no stack of what the input takes.
    """
    rank = len(shape) if spec is None else len(spec.shape)
    if not shape or len(shape) not in (rank, rank + 1):
        expected = "a stack" if spec is None else f"N stacked samples of {format_shape(spec.shape)}"
        raise DataError(
            f"array '{name}' of {where} has shape {format_shape(shape)}, expected {expected}",
            "Stack the samples along axis 0, with all axes that the model's input has.",
        )
    step = 1
    if len(shape) == rank + 1:
        step = 0
    elif spec is not None and isinstance(spec.shape[0], int):
        step = spec.shape[0]
    stack = _Stack(shape, step)
    if shape[0]:
        full_shape(name, stack.sample_shape, spec, where)
    return stack


class _StackFile(SampleReader):
    def __init__(self, kind: str, path: Path, stacks: dict[str, _Stack], inputs: Inputs, limit: int | None) -> None:
        counts = {name: stack.samples for name, stack in stacks.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"'{name}' has {count}" for name, count in list(counts.items())[:5])
            raise DataError(
                f"the arrays of {path} have different numbers of samples: {listed}",
                "Stack as many samples for every input.",
            )
        super().__init__(f"{kind} {label(path)}", inputs, next(iter(counts.values())), limit)
        self._leave(max(stack.rest for stack in stacks.values()))
        self._path, self._stacks = path, stacks

    def files(self) -> list[Path]:
        return [self._path]

    def _check_unchanged(self, name: str, shape: Shape) -> None:
        if shape != self._stacks[name].shape:
            raise DataError(f"{self._path} changed while it was read", "Start again.")


class NpzFile(_StackFile):
    """An archive of stacks, decompressed sample by sample; the arrays in `beside` are none of its inputs."""

    def __init__(self, path: Path, inputs: Inputs, limit: int | None, beside: Collection[str] = ()) -> None:
        self._beside, self._where = beside, str(path)
        with npy.open_archive(path, str(path)) as archive:
            members = self._members(archive)
            if inputs:
                check_names(members, inputs, str(path))
            elif not members:
                raise DataError(f"{path} holds no array", KINDS_HINT)
            stacks = {name: _plan(archive, path, name, members[name], inputs.get(name)) for name in members}
        super().__init__("npz", path, stacks, inputs, limit)

    def _samples(self) -> Iterator[RawSample]:
        path = self._path
        with contextlib.ExitStack() as opened:
            with reading(path):
                archive = opened.enter_context(npy.open_archive(path, str(path)))
            members = self._members(archive)
            check_names(members, self._stacks, str(path))
            streams = {}
            for name, info in members.items():
                stream = opened.enter_context(npy.open_member(archive, info, _words(name, path)))
                header = npy.read_header(stream, _words(name, path))
                self._check_unchanged(name, header.shape)
                streams[name] = (stream, header.dtype)
            behind = 0
            for position in self._positions:
                feed = {}
                for name, (stream, dtype) in streams.items():
                    shape, where = self._stacks[name].sample_shape, _words(name, path)
                    npy.skip(stream, (position - behind) * math.prod(shape) * dtype.itemsize, where)
                    feed[name] = npy.read_array(stream, shape, dtype, where)
                behind = position + 1
                yield feed, path.name

    def _members(self, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
        found = npy.members(archive, self._where)
        return {name: info for name, info in found.items() if name not in self._beside}


def _words(name: str, path: Path) -> str:
    return f"array '{name}' of {path}"


def _plan(archive: zipfile.ZipFile, path: Path, name: str, info: zipfile.ZipInfo, spec: TensorSpec | None) -> _Stack:
    """How a member of the archive is cut.

    Raises:
        DataError: it is no stack that fits the input, cannot be streamed, or is damaged.
    """
    where = _words(name, path)
    with npy.open_member(archive, info, where) as stream:
        header = npy.read_header(stream, where)
    stack = _cut(name, header.shape, spec, str(path))
    if header.fortran and len(header.shape) > 1:
        raise DataError(
            f"{where} is in Fortran order, whose rows cannot be streamed",
            "Save np.ascontiguousarray(array) instead.",
        )
    size = info.file_size - header.length
    if header.nbytes != size:
        raise DataError(
            f"{where} is truncated or damaged: it declares {header.nbytes} bytes and has {size}", npy.DAMAGED_HINT
        )
    return stack


class NpyFile(_StackFile):
    """One stack, mapped."""

    def __init__(self, path: Path, inputs: Inputs, limit: int | None) -> None:
        self._name = only_input(inputs, str(path), "Give a .npz keyed by input name.")
        stack = _cut(self._name, npy.map_file(path).shape, inputs.get(self._name), str(path))
        super().__init__("npy", path, {self._name: stack}, inputs, limit)

    def _samples(self) -> Iterator[RawSample]:
        with reading(self._path):
            array = npy.map_file(self._path)
        self._check_unchanged(self._name, array.shape)
        step = self._stacks[self._name].step
        for position in self._positions:
            rows = array[position * step : (position + 1) * step] if step else array[position, ...]
            yield {self._name: rows}, self._path.name
