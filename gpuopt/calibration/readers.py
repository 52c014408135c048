"""Calibration data of every kind that users have, as a stream of checked feeds.

    calibration.npz            stacks of samples, keyed by input name
    calibration.npy            one stack, for a model with one input
    folder of .npz or .npy     a sample a file; or a subfolder of .npy files for each input
    folder of images           for a model with one image input
    inputs.json                what `polygraphy run --save-inputs` writes; or a folder of such files
    package.module:callable    called without arguments, yields samples

A sample is read when it is asked for and forgotten afterwards. Nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import importlib
import io
import json
import math
import re
import sys
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format

from gpuopt.errors import DataError, RequirementError, UsageError
from gpuopt.shapes import DTYPES, TensorSpec, format_shape

Array = npt.NDArray[Any]
Feed = dict[str, Array]
"""One sample: every input by name, with its full rank."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_LARGEST_JSON = 2 << 30
_LARGEST_SAMPLE = 2 << 30
_LARGEST_HEADER = 1 << 16
_BLOCK = 1 << 18

_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_KINDS_HINT = (
    "Give a .npz with one stack of samples for each input, a folder of .npy, .npz or image files,\n"
    "a .json of 'polygraphy run --save-inputs', or package.module:callable."
)
_DAMAGED_HINT = "Write the file again; np.load of it with allow_pickle=False has to succeed."
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)


class SampleReader(Protocol):
    """A source of calibration samples."""

    @property
    def description(self) -> str:
        """One line for the report, such as `npz calibration.npz, 512 samples`."""

    @property
    def total(self) -> int | None:
        """The number of samples, where it is known without reading them all."""

    def files(self) -> list[Path]:
        """The files whose bytes decide the feeds, in reading order; none for a callable."""

    def __iter__(self) -> Iterator[Feed]:
        """All samples from the first on, checked.

        Raises:
            DataError: a sample does not fit the model's inputs or holds NaN or an infinity, a file
                is damaged, or there is no sample at all.
        """


@dataclass(frozen=True)
class ImageOptions:
    """How an image file becomes an input: resize, crop, (pixels * scale - mean) / std, layout.

    Args:
        resize: length of the shorter side in pixels, bilinear. None: 256/224 of the crop where no
            crop was given either and the model states its height and width, else no resizing.
        crop: side of the square cut from the centre. None: the height and width that the model
            states, else no cropping.
        mean: one number, or one for each channel in the order of `color`. The default is
            ImageNet's and follows `color`: reversed for bgr, averaged for gray.
        std: as `mean`.
        scale: factor of the 8-bit pixels.
        layout: `nchw` or `nhwc`.
        color: `rgb`, `bgr` or `gray`.

    Raises:
        UsageError: a value is out of range or unknown.
    """

    resize: int | None = None
    crop: int | None = None
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    scale: float = 1 / 255
    layout: str = "nchw"
    color: str = "rgb"

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("layout", self.layout, ("nchw", "nhwc")),
            ("color", self.color, ("rgb", "bgr", "gray")),
        ):
            if value not in choices:
                raise UsageError(f"image {name} '{value}' is unknown", f"Choose {' or '.join(choices)}.")
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            if size is not None and size < 1:
                raise UsageError(f"image {name} {size} is not a size", "Give a number of pixels.")
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) not in (1, self.channels) and tuple(numbers) not in (_MEAN, _STD):
                raise UsageError(
                    f"image {name} has {len(numbers)} numbers for {self.channels} channel(s)",
                    "Give one number, or one for each channel.",
                )
        if not all(value > 0 for value in self.std):
            raise UsageError("image std is not positive", "Give numbers above zero.")

    @property
    def channels(self) -> int:
        """1 for gray, else 3."""
        return 1 if self.color == "gray" else 3

    def statistics(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Mean and std as float32 arrays of 1 or `channels` elements, in the order of `color`."""
        found = []
        for values, default in ((tuple(self.mean), _MEAN), (tuple(self.std), _STD)):
            if values == default and self.color == "bgr":
                values = values[::-1]
            elif values == default and self.color == "gray":
                values = (math.fsum(values) / len(values),)
            found.append(np.array(values, np.float32))
        return found[0], found[1]


def open_reader(data: str, inputs: Sequence[TensorSpec], image: ImageOptions | None = None) -> SampleReader:
    """Recognise what `data` names by its content and open it; see the module's table of kinds.

    Samples whose rank is one less than the input's get a leading batch axis, except in a stack,
    where every element (or slice, as the input's rank says) is a sample. Where the first axis of an
    input is a fixed number n above 1, slices of a stack hold n elements and a rest is left over.

    Args:
        data: a path or `package.module:callable`; a path that exists wins.
        inputs: the model's inputs; empty where they are unknown. Then names are the data's own, and
            `input` (or `input0`, `input1`, ...) where the data have none.
        image: how images are prepared; by default as ImageNet models want them.

    Raises:
        DataError: nothing is there, it is of no known kind, or it does not fit the inputs.
        UsageError: images are to be read whose size neither the model nor `image` states.
        RequirementError: images are to be read and Pillow is not installed.
    """
    path = Path(data).expanduser()
    with _reading(path):
        if path.is_dir():
            return _open_folder(path, inputs, image)
        if path.exists():
            return _open_file(path, inputs)
    if _CALLABLE.fullmatch(data):
        return _CallableReader(data, inputs)
    raise DataError(f"calibration data '{data}' does not exist", _KINDS_HINT)


def find_beside(model: Path) -> Path | None:
    """Calibration data in the model's folder: calibration.npz, calibration.json, calibration/."""
    folder = model.parent
    for name in ("calibration.npz", "calibration.json"):
        if (folder / name).is_file():
            return folder / name
    return folder / "calibration" if (folder / "calibration").is_dir() else None


def sample_specs(reader: SampleReader) -> list[TensorSpec]:
    """Names, dtypes and concrete shapes of the first sample, for a model that does not state them.

    Raises:
        DataError: as iterating over the reader does.
    """
    feed = next(iter(reader))
    return [TensorSpec(name, array.dtype.name, array.shape) for name, array in feed.items()]


def random_reader(
    inputs: Sequence[TensorSpec],
    count: int,
    seed: int,
    value_ranges: Mapping[str, tuple[float, float]],
) -> SampleReader:
    """Samples of random numbers; sample i depends on `inputs`, `seed` and i only.

    Args:
        inputs: with concrete shapes. Floats are drawn from the standard normal distribution,
            integers from {0, 1}, bools are true or false.
        count: number of samples.
        seed: not negative.
        value_ranges: by input name, (low, high): floats and integers are uniform in [low, high).

    Raises:
        UsageError: a shape is symbolic, a range is empty or names no input, or a number is negative.
    """
    return _RandomReader(inputs, count, seed, value_ranges)


# Checks that all kinds share.


def _counted(count: int) -> str:
    return f"{count} sample" if count == 1 else f"{count} samples"


def _label(path: Path) -> str:
    return path.resolve().name or str(path)


def _listed(names: Iterable[str]) -> str:
    shown = [f"'{name}'" for name in names]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def _one_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0].rstrip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}", "Check that the file is there and readable."
        ) from error


def _check_names(found: Iterable[str], wanted: Iterable[str], where: str) -> None:
    found, wanted = list(found), list(wanted)
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    if not missing and not unexpected:
        return
    parts = [f"{word} {_listed(names)}" for word, names in (("missing", missing), ("unexpected", unexpected)) if names]
    hint = f"The inputs are {_listed(wanted)}."
    for name in missing:
        close = difflib.get_close_matches(name, unexpected, n=1) or (
            unexpected if len(missing) == len(unexpected) == 1 else []
        )
        if close:
            hint += f"\nRename '{close[0]}' to '{name}'?"
            break
    raise DataError(f"{where} does not name the model's inputs: {', '.join(parts)}", hint)


def _check_shape(name: str, shape: tuple[int, ...], spec: TensorSpec | None, where: str) -> None:
    if spec is None:
        fits = True
        expected = "at least one element"
    else:
        fits = len(shape) == len(spec.shape) and all(
            isinstance(want, str) or want == size for want, size in zip(spec.shape, shape, strict=True)
        )
        expected = format_shape(spec.shape)
    if not fits or 0 in shape:
        raise DataError(
            f"input '{name}' of {where} has shape {format_shape(shape)}, expected {expected}",
            "Give every sample the shape that the model's input has.",
        )


def _kind(dtype: np.dtype[Any]) -> str:
    return {"f": "float", "i": "integer", "u": "integer", "b": "bool"}.get(dtype.kind, "other")


def _check_kind(dtype: np.dtype[Any], where: str) -> None:
    if _kind(dtype) == "other":
        raise DataError(f"{where} has dtype {dtype}, which no input takes", "Save float, integer or bool arrays.")


def _cast(name: str, array: Array, spec: TensorSpec | None, where: str) -> Array:
    """In the dtype that the input wants, in native byte order and C order."""
    given = array.dtype
    wanted = given.newbyteorder("=")
    if spec is not None:
        # A dtype that numpy lacks, such as bfloat16, is left to whoever runs the model.
        with contextlib.suppress(TypeError):
            wanted = np.dtype(spec.dtype)
    if _kind(given) != _kind(wanted):
        hint = f"Save it as {wanted}: array.astype('{wanted}')."
        if given == np.uint8 and _kind(wanted) == "float":
            hint = (
                f"Scale and normalise the values as in training, such as array.astype('{wanted}') / 255,\n"
                "and save the result: raw bytes would give ranges far too large."
            )
        raise DataError(f"input '{name}' of {where} has dtype {given}, expected {wanted}", hint)
    if _kind(wanted) == "integer" and not np.can_cast(given, wanted):
        limits = np.iinfo(wanted)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise DataError(
                f"input '{name}' of {where} holds integers that {wanted} cannot",
                f"Keep the values in [{limits.min}, {limits.max}].",
            )
    # Mapped data are copied, for a feed may outlive the file.
    mapped = isinstance(array, np.memmap)
    with np.errstate(over="ignore"):  # What overflows is found as an infinity right after.
        return array.astype(wanted, order="C", copy=mapped, subok=False)


def _check_finite(name: str, array: Array, where: str) -> None:
    if array.dtype.kind != "f":
        return
    finite = np.isfinite(array)
    if finite.all():
        return
    bad = array.size - int(np.count_nonzero(finite))
    raise DataError(
        f"input '{name}' of {where} holds {bad} NaN or infinite of {array.size} values",
        "Remove the sample, or repair the preprocessing that made it.",
    )


class _Reader(ABC):
    """Turns raw samples into checked feeds."""

    def __init__(self, inputs: Sequence[TensorSpec]) -> None:
        self._inputs = {spec.name: spec for spec in inputs}

    @property
    @abstractmethod
    def description(self) -> str: ...

    @property
    def total(self) -> int | None:
        return None

    def files(self) -> list[Path]:
        return []

    @abstractmethod
    def _samples(self) -> Iterator[tuple[Mapping[str, Array], str]]:
        """Raw samples, each with the words that say where it is from."""

    def __iter__(self) -> Iterator[Feed]:
        names: list[str] = list(self._inputs)
        index = -1
        for index, (raw, source) in enumerate(self._samples()):
            where = f"sample {index} ({source})"
            if index or self._inputs:
                _check_names(raw, names, where)
            else:
                names = list(raw)
                if not names:
                    raise DataError(f"{where} holds no array", "Give a sample an array for each input.")
            yield {name: self._checked(name, raw[name], where) for name in names}
        if index < 0:
            raise DataError(
                f"calibration data hold no sample: {self.description}",
                "Give at least one; a few hundred representative samples are usual.",
            )

    def _checked(self, name: str, array: Array, where: str) -> Array:
        _check_kind(array.dtype, f"input '{name}' of {where}")
        spec = self._inputs.get(name)
        if spec is not None and array.ndim == len(spec.shape) - 1:
            array = array[np.newaxis]
        _check_shape(name, array.shape, spec, where)
        array = _cast(name, array, spec, where)
        _check_finite(name, array, where)
        return array

    def _only_input(self, what: str, hint: str) -> str:
        """The name of the model's one input, for data without names."""
        if len(self._inputs) > 1:
            raise DataError(
                f"{what} cannot feed a model with {len(self._inputs)} inputs: {_listed(self._inputs)}", hint
            )
        return next(iter(self._inputs), "input")


# The .npy format, read without mapping, so that it works inside an archive.


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    length: int
    """Bytes before the data."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _read_header(stream: IO[bytes], where: str) -> _Header:
    """The header of a .npy file, format as numpy.lib.format documents it; never trusts its lengths.

    Raises:
        DataError: it is no .npy file, is cut short, or holds Python objects.
    """
    try:
        version = npy_format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"format version {version[0]}.{version[1]} is not supported")
        prefix = stream.read(2 if version == (1, 0) else 4)
        length = int.from_bytes(prefix, "little")
        if length > _LARGEST_HEADER:
            raise ValueError(f"a header of {length} bytes")
        text = io.BytesIO(prefix + stream.read(length))
        parse = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, fortran, dtype = parse(text)
        if any(size < 0 for size in shape):
            raise ValueError(f"a negative size in shape {shape}")
    except Exception as error:
        # numpy evaluates the header as a literal, and damaged text fails in many ways.
        raise DataError(f"{where} is not a readable .npy array: {_one_line(error)}", _DAMAGED_HINT) from error
    if dtype.hasobject:
        raise DataError(
            f"{where} holds Python objects, which only unpickling could read",
            "Save plain numeric arrays of equal shapes.",
        )
    _check_kind(dtype, where)
    return _Header(shape, fortran, dtype, npy_format.MAGIC_LEN + len(prefix) + length)


def _read_array(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> Array:
    """The next C-ordered array of a stream, straight into its memory.

    Raises:
        DataError: the stream ends before, or the archive is damaged.
    """
    if math.prod(shape) * dtype.itemsize > _LARGEST_SAMPLE:
        raise DataError(
            f"{where} declares a sample of shape {format_shape(shape)}, above 2 GiB",
            "Check how the file was written; stack the samples along axis 0.",
        )
    array = np.empty(shape, dtype)
    room = array.reshape(-1).view(np.uint8).data
    done = 0
    try:
        while done < len(room):
            block = stream.read(min(_BLOCK, len(room) - done))
            if not block:
                raise EOFError(f"it ends {len(room) - done} bytes too early")
            room[done : done + len(block)] = block
            done += len(block)
    except _ZIP_ERRORS as error:
        raise DataError(f"{where} is truncated or damaged: {error}", _DAMAGED_HINT) from error
    return array


def _read_whole(stream: IO[bytes], size: int, spec: TensorSpec | None, where: str) -> Array:
    """A whole .npy of `size` bytes, refused before its data are read if it does not fit the input."""
    header = _read_header(stream, where)
    if spec is not None:
        shape = header.shape
        batched = (1, *shape) if len(shape) == len(spec.shape) - 1 else shape
        _check_shape(spec.name, batched, spec, where)
    if header.nbytes > size - header.length:
        raise DataError(
            f"{where} is truncated: it declares {header.nbytes} bytes and has {size - header.length}",
            _DAMAGED_HINT,
        )
    shape = header.shape[::-1] if header.fortran else header.shape
    array = _read_array(stream, shape, header.dtype, where)
    return array.T if header.fortran else array


def _open_npy(path: Path) -> Array:
    """A .npy file, mapped: only what is used is read, and Fortran order costs nothing.

    Raises:
        DataError: it is damaged or holds Python objects.
    """
    with path.open("rb") as stream:
        header = _read_header(stream, str(path))
    size = path.stat().st_size - header.length
    if header.nbytes > size:
        raise DataError(f"{path} is truncated: it declares {header.nbytes} bytes and has {size}", _DAMAGED_HINT)
    try:
        if not header.nbytes:
            return np.empty(header.shape, header.dtype)
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path} is damaged: {_one_line(error)}", _DAMAGED_HINT) from error
    return array


def _open_archive(source: Path | IO[bytes], where: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(source)
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(
            f"cannot read {where}: {error.strerror}", "Check that the file is there and readable."
        ) from error
    except _ZIP_ERRORS as error:
        raise DataError(f"{where} is truncated or no .npz archive: {error}", _DAMAGED_HINT) from error


def _members(archive: zipfile.ZipFile, where: str) -> dict[str, zipfile.ZipInfo]:
    """The archive's arrays by key.

    Raises:
        DataError: a member is encrypted, packed in a way numpy does not use, or there twice.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        key = info.filename.removesuffix(".npy")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"array '{key}' of {where} is encrypted or packed in an unusual way",
                "Write the archive with np.savez or np.savez_compressed.",
            )
        if key in found:
            raise DataError(f"array '{key}' is twice in {where}", "Write the archive with np.savez.")
        found[key] = info
    return found


def _open_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> IO[bytes]:
    try:
        return archive.open(info)
    except _ZIP_ERRORS as error:
        raise DataError(f"{where} is truncated or damaged: {error}", _DAMAGED_HINT) from error


# Kinds.


@dataclass(frozen=True)
class _Stack:
    """How a stack of shape `shape` is cut: `step` rows a sample, 0 for one row without its axis."""

    shape: tuple[int, ...]
    step: int

    @property
    def samples(self) -> int:
        return self.shape[0] // max(1, self.step)

    @property
    def rest(self) -> int:
        return self.shape[0] % max(1, self.step)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (self.step, *self.shape[1:]) if self.step else self.shape[1:]


def _cut(name: str, shape: tuple[int, ...], spec: TensorSpec | None, where: str) -> _Stack:
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
        _check_shape(name, stack.sample_shape, spec, where)
    return stack


def _stack_description(kind: str, path: Path, total: int, rest: int) -> str:
    left = f" ({rest} left over)" if rest else ""
    return f"{kind} {_label(path)}, {_counted(total)}{left}"


class _NpzReader(_Reader):
    """An archive of stacks, decompressed row by row."""

    def __init__(self, path: Path, inputs: Sequence[TensorSpec]) -> None:
        super().__init__(inputs)
        self._path = path
        self._stacks: dict[str, _Stack] = {}
        with _open_archive(path, str(path)) as archive:
            members = _members(archive, str(path))
            if self._inputs:
                _check_names(members, self._inputs, str(path))
            elif not members:
                raise DataError(f"{path} holds no array", _KINDS_HINT)
            for name, info in members.items():
                self._stacks[name] = self._plan(archive, name, info)
        counts = {name: stack.samples for name, stack in self._stacks.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"'{name}' has {count}" for name, count in list(counts.items())[:5])
            raise DataError(
                f"the arrays of {path} have different numbers of samples: {listed}",
                "Stack as many samples for every input.",
            )
        self._count = next(iter(counts.values()))

    def _plan(self, archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> _Stack:
        where = self._words(name)
        with _open_member(archive, info, where) as stream:
            header = _read_header(stream, where)
        stack = _cut(name, header.shape, self._inputs.get(name), str(self._path))
        if header.fortran and len(header.shape) > 1:
            raise DataError(
                f"{where} is in Fortran order, whose rows cannot be streamed",
                "Save np.ascontiguousarray(array) instead.",
            )
        if header.nbytes != info.file_size - header.length:
            raise DataError(
                f"{where} is truncated or damaged: it declares {header.nbytes} bytes"
                f" and has {info.file_size - header.length}",
                _DAMAGED_HINT,
            )
        return stack

    def _words(self, name: str) -> str:
        return f"array '{name}' of {self._path}"

    @property
    def description(self) -> str:
        rest = max(stack.rest for stack in self._stacks.values())
        return _stack_description("npz", self._path, self._count, rest)

    @property
    def total(self) -> int:
        return self._count

    def files(self) -> list[Path]:
        return [self._path]

    def _samples(self) -> Iterator[tuple[Mapping[str, Array], str]]:
        with contextlib.ExitStack() as stack:
            archive = stack.enter_context(_open_archive(self._path, str(self._path)))
            streams = {}
            members = _members(archive, str(self._path))
            _check_names(members, self._stacks, str(self._path))
            for name, info in members.items():
                stream = stack.enter_context(_open_member(archive, info, self._words(name)))
                header = _read_header(stream, self._words(name))
                if header.shape != self._stacks[name].shape:
                    raise DataError(f"{self._path} changed while it was read", "Start again.")
                streams[name] = (stream, header.dtype)
            for _ in range(self._count):
                yield (
                    {
                        name: _read_array(stream, self._stacks[name].sample_shape, dtype, self._words(name))
                        for name, (stream, dtype) in streams.items()
                    },
                    self._path.name,
                )


class _NpyReader(_Reader):
    """One mapped stack."""

    def __init__(self, path: Path, inputs: Sequence[TensorSpec]) -> None:
        super().__init__(inputs)
        self._path = path
        self._name = self._only_input(str(path), "Give a .npz keyed by input name.")
        self._stack = _cut(self._name, _open_npy(path).shape, self._inputs.get(self._name), str(path))

    @property
    def description(self) -> str:
        return _stack_description("npy", self._path, self.total, self._stack.rest)

    @property
    def total(self) -> int:
        return self._stack.samples

    def files(self) -> list[Path]:
        return [self._path]

    def _samples(self) -> Iterator[tuple[Mapping[str, Array], str]]:
        with _reading(self._path):
            array, step = _open_npy(self._path), self._stack.step
        if array.shape != self._stack.shape:
            raise DataError(f"{self._path} changed while it was read", "Start again.")
        for index in range(self.total):
            rows = (
                array[index * step : (index + 1) * step] if step else array[index : index + 1].reshape(array.shape[1:])
            )
            yield {self._name: rows}, self._path.name


class _NpzFolder(_Reader):
    """A sample a file, keyed by input name."""

    def __init__(self, folder: Path, paths: list[Path], inputs: Sequence[TensorSpec]) -> None:
        super().__init__(inputs)
        self._folder, self._paths = folder, paths

    @property
    def description(self) -> str:
        return f"npz folder {_label(self._folder)}, {_counted(self.total)}"

    @property
    def total(self) -> int:
        return len(self._paths)

    def files(self) -> list[Path]:
        return list(self._paths)

    def _samples(self) -> Iterator[tuple[Mapping[str, Array], str]]:
        for path in self._paths:
            feed = {}
            with _reading(path), _open_archive(path, str(path)) as archive:
                for name, info in _members(archive, str(path)).items():
                    where = f"array '{name}' of {path}"
                    with _open_member(archive, info, where) as stream:
                        feed[name] = _read_whole(stream, info.file_size, self._inputs.get(name), where)
            yield feed, path.name


class _NpyFolder(_Reader):
    """A sample a file for each input: `columns` are the files of each, in the same order."""

    def __init__(
        self, folder: Path, columns: Mapping[str, list[Path]] | list[Path], inputs: Sequence[TensorSpec]
    ) -> None:
        super().__init__(inputs)
        self._folder = folder
        if isinstance(columns, list):
            name = self._only_input(
                f"a folder of .npy files ({folder})",
                "Make a subfolder of .npy files for each input, or .npz files keyed by input name.",
            )
            columns = {name: columns}
        elif inputs:
            _check_names(columns, self._inputs, str(folder))
        self._columns = columns
        first, *others = columns
        expected = [path.name for path in columns[first]]
        for name in others:
            odd = sorted(set(expected) ^ {path.name for path in columns[name]})
            if odd:
                raise DataError(
                    f"the subfolders '{first}' and '{name}' of {folder} differ in {_listed(odd)}",
                    "Give a sample's files the same name in every input's subfolder.",
                )

    @property
    def description(self) -> str:
        return f"npy folder {_label(self._folder)}, {_counted(self.total)}"

    @property
    def total(self) -> int:
        return len(next(iter(self._columns.values())))

    def files(self) -> list[Path]:
        return [path for row in zip(*self._columns.values(), strict=True) for path in row]

    def _samples(self) -> Iterator[tuple[Mapping[str, Array], str]]:
        for row in zip(*self._columns.values(), strict=True):
            feed = {}
            for name, path in zip(self._columns, row, strict=True):
                with _reading(path):
                    feed[name] = _open_npy(path)
            yield feed, row[0].name


class _ImageFolder(_Reader):
    """Images of any size, prepared as classification networks want them."""

    def __init__(
        self,
        folder: Path,
        paths: list[Path],
        inputs: Sequence[TensorSpec],
        options: ImageOptions | None,
    ) -> None:
        super().__init__(inputs)
        self._folder, self._paths = folder, paths
        self._image = _import_pillow(folder)
        self._name = self._only_input(
            f"a folder of images ({folder})", "Give a .npz keyed by input name, or package.module:callable."
        )
        spec = self._inputs.get(self._name)
        if spec is not None and len(spec.shape) != 4:
            raise DataError(
                f"images of {folder} cannot feed input '{self._name}' of shape {format_shape(spec.shape)}",
                "Images need an input of four axes; give a .npz for this model.",
            )
        self._options = options or self._guess(spec)
        height_axis = 2 if self._options.layout == "nchw" else 1
        stated = spec.shape[height_axis : height_axis + 2] if spec is not None else ()
        self._crop: tuple[int, int] | None = None
        self._resize = self._options.resize
        if self._options.crop is not None:
            self._crop = (self._options.crop, self._options.crop)
        elif len(stated) == 2 and isinstance(stated[0], int) and isinstance(stated[1], int):
            self._crop = (stated[0], stated[1])
            if self._resize is None:
                self._resize = round(max(self._crop) * 256 / 224)
        elif options is None:
            raise UsageError(
                f"the model does not state the height and width to which images of {folder} are cropped",
                "Give the image options resize and crop, for example resize 256 and crop 224.",
            )

    @staticmethod
    def _guess(spec: TensorSpec | None) -> ImageOptions:
        if spec is None:
            return ImageOptions()
        first, last = spec.shape[1], spec.shape[3]
        layout = "nhwc" if last in (1, 3) and first not in (1, 3) else "nchw"
        channels = last if layout == "nhwc" else first
        return ImageOptions(layout=layout, color="gray" if channels == 1 else "rgb")

    @property
    def description(self) -> str:
        return f"image folder {_label(self._folder)}, {_counted(self.total)}"

    @property
    def total(self) -> int:
        return len(self._paths)

    def files(self) -> list[Path]:
        return list(self._paths)

    def _samples(self) -> Iterator[tuple[Mapping[str, Array], str]]:
        for path in self._paths:
            yield {self._name: self._prepare(path)}, str(path.relative_to(self._folder))

    def _prepare(self, path: Path) -> npt.NDArray[np.float32]:
        """One image as float32, 1 x C x H x W or 1 x H x W x C."""
        options = self._options
        try:
            with self._image.open(path) as opened:
                picture = opened.convert("L" if options.color == "gray" else "RGB")
        except Exception as error:
            # Decoders fail on damaged bytes with whatever the format's parser happens to raise.
            raise DataError(
                f"image {path} cannot be read: {_one_line(error)}",
                "Remove the file or save it again.",
            ) from error
        if self._resize is not None:
            width, height = picture.size
            size = tuple(self._resize * side // min(width, height) for side in (width, height))
            picture = picture.resize(size, self._image.Resampling.BILINEAR)
        if self._crop is not None:
            (width, height), (crop_height, crop_width) = picture.size, self._crop
            if width < crop_width or height < crop_height:
                raise DataError(
                    f"image {path} is {height}x{width}, smaller than the crop {crop_height}x{crop_width}",
                    "Give the image option resize, the length of the shorter side, at least as long as the crop.",
                )
            left, top = round((width - crop_width) / 2), round((height - crop_height) / 2)
            picture = picture.crop((left, top, left + crop_width, top + crop_height))
        pixels = np.asarray(picture, np.float32)
        if options.color == "gray":
            pixels = pixels[..., np.newaxis]
        elif options.color == "bgr":
            pixels = pixels[..., ::-1]
        mean, std = options.statistics()
        pixels = (pixels * np.float32(options.scale) - mean) / std
        return (pixels.transpose(2, 0, 1) if options.layout == "nchw" else pixels)[np.newaxis]


def _import_pillow(folder: Path) -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise RequirementError(
            f"reading the images of {folder} needs Pillow, which is not installed", "pip install pillow"
        ) from error


class _PolygraphyReader(_Reader):
    """Feeds in the JSON of NVIDIA's Polygraphy (polygraphy/json/serde.py), old and new.

    An array is {"array": base64 of a .npy, "polygraphy_class": "ndarray"}. Older versions marked it
    with the key `__polygraphy_encoded_ndarray`, wrote the bytes as Latin-1, or a .npz of one array.
    `RunResults` (`--save-outputs`) hold feeds below lst / runner / iterations / outputs.
    """

    def __init__(self, path: Path, paths: list[Path], inputs: Sequence[TensorSpec]) -> None:
        super().__init__(inputs)
        self._path, self._paths = path, paths
        for one in paths:
            if one.stat().st_size > _LARGEST_JSON:
                raise DataError(
                    f"{one} is larger than 2 GiB, and JSON has to be read whole",
                    "Save the samples as a .npz keyed by input name, which is streamed.",
                )

    @property
    def description(self) -> str:
        if self._paths == [self._path]:
            return f"Polygraphy JSON {_label(self._path)}"
        return f"Polygraphy JSON folder {_label(self._path)}, {len(self._paths)} files"

    def files(self) -> list[Path]:
        return list(self._paths)

    def _samples(self) -> Iterator[tuple[Mapping[str, Array], str]]:
        for path in self._paths:
            with _reading(path):
                try:
                    document = json.loads(path.read_bytes())
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path} is not valid JSON: {error}", _KINDS_HINT) from error
            for index, feed in enumerate(_json_feeds(document)):
                yield (
                    {
                        name: self._decode(node, name, f"input '{name}', sample {index} of {path}")
                        for name, node in self._named(feed, path)
                    },
                    path.name,
                )

    @staticmethod
    def _named(feed: Any, path: Path) -> Iterable[tuple[str, Any]]:
        if isinstance(feed, dict) and "runner_name" in feed and "outputs" in feed:  # An IterationResult.
            feed = feed["outputs"]
        if not isinstance(feed, dict):
            raise DataError(
                f"{path} is not a list of feeds, each with arrays by input name",
                "Write it with 'polygraphy run --save-inputs', or save a .npz.",
            )
        return [(name, node) for name, node in feed.items() if not _is_marker(name)]

    def _decode(self, node: Any, name: str, where: str) -> Array:
        if isinstance(node, dict) and "values" in node:  # Polygraphy's LazyArray.
            node = node["values"]
        if isinstance(node, dict) and "tensor" in node:
            raise DataError(
                f"{where} is a pickled torch.Tensor",
                "Let the data loader yield numpy arrays (tensor.numpy()) and save again.",
            )
        text = node.get("array") if isinstance(node, dict) else None
        if not isinstance(text, str):
            raise DataError(f"{where} is not an array that Polygraphy wrote", _KINDS_HINT)
        try:
            data = base64.b64decode(text, validate=True)
        except ValueError:
            data = text.encode("latin-1", errors="replace")
        spec = self._inputs.get(name)
        if not data.startswith(b"PK"):
            return _read_whole(io.BytesIO(data), len(data), spec, where)
        with _open_archive(io.BytesIO(data), where) as archive:
            infos = list(_members(archive, where).values())
            if len(infos) != 1:
                raise DataError(f"{where} holds {len(infos)} arrays, expected one", _DAMAGED_HINT)
            with _open_member(archive, infos[0], where) as stream:
                return _read_whole(stream, infos[0].file_size, spec, where)


def _is_marker(name: str) -> bool:
    return name == "polygraphy_class" or name.startswith("__polygraphy_encoded_")


def _json_feeds(document: Any) -> list[Any]:
    """The feeds of a Polygraphy document: a list, one feed, or the first runner of `RunResults`."""
    if isinstance(document, dict) and isinstance(document.get("lst"), list):
        document = document["lst"]
        first = document[0] if document else None
        if isinstance(first, list) and len(first) == 2 and isinstance(first[1], list):
            document = first[1]
    return document if isinstance(document, list) else [document]


class _CallableReader(_Reader):
    """What a function of the user yields."""

    def __init__(self, data: str, inputs: Sequence[TensorSpec]) -> None:
        super().__init__(inputs)
        self._data = data
        module_name, _, name = data.partition(":")
        here = str(Path.cwd())
        if here not in sys.path:
            # It stays, for the function may import its neighbours only when it is called.
            sys.path.insert(0, here)
        try:
            module = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:
            raise DataError(
                f"calibration data '{data}': importing {module_name} failed: {_one_line(error)}",
                f"Run python -c 'import {module_name}' in {here}; if a path was meant, it does not exist.",
            ) from error
        function = getattr(module, name, None)
        if not callable(function):
            close = difflib.get_close_matches(name, [n for n in vars(module) if not n.startswith("_")], n=1)
            raise DataError(
                f"calibration data '{data}': {module_name} has no callable '{name}'",
                f"Did you mean '{close[0]}'?" if close else "Define a function that yields samples.",
            )
        self._function = cast(Callable[[], Iterable[Any]], function)

    @property
    def description(self) -> str:
        return f"callable {self._data}"

    def _samples(self) -> Iterator[tuple[Mapping[str, Array], str]]:
        index = 0
        try:
            for sample in self._function():
                yield self._arrays(sample, index), self._data
                index += 1
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"calibration data '{self._data}' failed at sample {index}: {_one_line(error)}",
                "Run the function by itself: it takes no argument and yields dicts of arrays.",
            ) from error

    def _arrays(self, sample: Any, index: int) -> dict[str, Array]:
        if isinstance(sample, Mapping):
            return {str(name): _copied(value) for name, value in sample.items()}
        values = list(sample) if isinstance(sample, (tuple, list)) else [sample]
        names = list(self._inputs)
        if not names:
            names = ["input"] if len(values) == 1 else [f"input{i}" for i in range(len(values))]
        if len(values) != len(names):
            raise DataError(
                f"sample {index} of '{self._data}' has {len(values)} value(s) for {len(names)} input(s)",
                f"Yield the inputs only, in this order: {_listed(names)}; or a dict by name.",
            )
        return {name: _copied(value) for name, value in zip(names, values, strict=True)}


def _copied(value: Any) -> Array:
    """An array of its own: generators like to fill one buffer again and again."""
    return np.asarray(value).copy()


class _RandomReader(_Reader):
    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        count: int,
        seed: int,
        value_ranges: Mapping[str, tuple[float, float]],
    ) -> None:
        super().__init__(inputs)
        if count < 1 or seed < 0:
            raise UsageError(
                f"{count} random samples with seed {seed} cannot be made",
                "Give one sample or more, and a seed of zero or more.",
            )
        self._count, self._seed, self._ranges = count, seed, dict(value_ranges)
        for spec in inputs:
            if spec.dtype not in DTYPES:
                raise UsageError(
                    f"no random samples can be made for input '{spec.name}' of dtype {spec.dtype}",
                    f"dtypes: {', '.join(DTYPES)}.",
                )
            if any(isinstance(size, str) for size in spec.shape):
                raise UsageError(
                    f"input '{spec.name}' has the symbolic shape {format_shape(spec.shape)}",
                    f"Give its sizes, such as {spec.name}:1x3x224x224.",
                )

        for name, (low, high) in self._ranges.items():
            self._check_range(name, low, high)

    def _check_range(self, name: str, low: float, high: float) -> None:
        if name not in self._inputs:
            close = difflib.get_close_matches(name, self._inputs, n=1)
            raise UsageError(
                f"a value range names '{name}', which is no input",
                f"Did you mean '{close[0]}'?" if close else f"The inputs are {_listed(self._inputs)}.",
            )
        dtype = np.dtype(self._inputs[name].dtype)
        fits = math.isfinite(low) and math.isfinite(high) and low < high
        if fits and dtype.kind in "iu":
            limits = np.iinfo(dtype)
            fits = limits.min <= math.ceil(low) < math.ceil(high) <= limits.max + 1
        elif fits and dtype.kind == "f":
            fits = bool(max(-low, high) <= np.finfo(dtype).max)
        if not fits:
            raise UsageError(
                f"value range [{low}, {high}) of input '{name}' is empty or beyond {dtype}",
                "Give a lower and a higher finite bound.",
            )

    @property
    def description(self) -> str:
        return f"{self._count} random sample{'' if self._count == 1 else 's'}, seed {self._seed}"

    @property
    def total(self) -> int:
        return self._count

    def _samples(self) -> Iterator[tuple[Mapping[str, Array], str]]:
        for index in range(self._count):
            generator = np.random.default_rng([self._seed, index])
            yield {name: self._draw(generator, spec) for name, spec in self._inputs.items()}, "random"

    def _draw(self, generator: np.random.Generator, spec: TensorSpec) -> Array:
        dtype = np.dtype(spec.dtype)
        shape = tuple(int(size) for size in spec.shape)
        limits = self._ranges.get(spec.name)
        drawn: Array
        if dtype.kind == "b":
            drawn = np.asarray(generator.integers(0, 2, shape))
        elif dtype.kind in "iu":
            low, high = limits or (0, 2)
            drawn = np.asarray(generator.integers(math.ceil(low), math.ceil(high), shape, dtype=dtype.type))
        elif limits:
            # In halves, for high - low itself may overflow.
            share = generator.random(shape)
            drawn = np.asarray(limits[0] * (1 - share) + limits[1] * share)
        else:
            drawn = np.asarray(generator.standard_normal(shape))
        return drawn.astype(dtype)


# Recognition.


def _open_file(path: Path, inputs: Sequence[TensorSpec]) -> SampleReader:
    with path.open("rb") as stream:
        head = stream.read(64)
    if head.startswith(b"PK"):
        return _NpzReader(path, inputs)
    if head.startswith(npy_format.MAGIC_PREFIX):
        return _NpyReader(path, inputs)
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{"):
        return _PolygraphyReader(path, [path], inputs)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise DataError(f"{path} is a single image", "Give the folder that holds the images.")
    problem = "is empty" if not head else "is neither .npz, .npy nor JSON"
    raise DataError(f"calibration data {path} {problem}", _KINDS_HINT)


def _visible(folder: Path, suffixes: tuple[str, ...], pattern: str = "*") -> list[Path]:
    """Files of the given kinds, sorted by their path below `folder`; hidden ones are left out."""
    found = [
        path
        for path in folder.glob(pattern)
        if path.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _open_folder(folder: Path, inputs: Sequence[TensorSpec], image: ImageOptions | None) -> SampleReader:
    archives, arrays = _visible(folder, (".npz",)), _visible(folder, (".npy",))
    if archives and arrays:
        raise DataError(f"{folder} holds both .npz and .npy files", "Keep one kind in the folder.")
    if archives:
        return _NpzFolder(folder, archives, inputs)
    if arrays:
        return _NpyFolder(folder, arrays, inputs)
    columns: dict[str, list[Path]] = {}
    for path in _visible(folder, (".npy",), "**/*"):
        columns.setdefault(path.parent.relative_to(folder).as_posix(), []).append(path)
    if columns:
        return _NpyFolder(folder, columns, inputs)
    if images := _visible(folder, IMAGE_SUFFIXES, "**/*"):
        return _ImageFolder(folder, images, inputs, image)
    if documents := _visible(folder, (".json",)):
        return _PolygraphyReader(folder, documents, inputs)
    raise DataError(f"folder {folder} holds no calibration data", _KINDS_HINT)
