"""The formats .npy and .npz, read piece by piece; declared sizes are not believed, nothing is unpickled."""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format

from gpuopt.calibration.readers.checks import Array, check_dtype, full_shape
from gpuopt.errors import DataError, described
from gpuopt.shapes import Shape, TensorSpec, format_shape

NPY_START, NPZ_START = npy_format.MAGIC_PREFIX, b"PK"
DAMAGED_HINT = "Write the file again; np.load of it with allow_pickle=False has to succeed."

_LARGEST_SAMPLE = 2 << 30
_LARGEST_HEADER = 1 << 16
_BLOCK = 1 << 18
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Header:
    """What a .npy says of itself; `length` is the number of bytes before the data."""

    shape: Shape
    fortran: bool
    dtype: np.dtype[Any]
    length: int

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: IO[bytes], where: str) -> Header:
    """The header of a .npy, format as numpy.lib.format documents it.

    Raises:
        DataError: it is no .npy, is cut short, holds Python objects, or a dtype that no input takes.
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
        if any(type(size) is not int or size < 0 for size in shape):
            raise ValueError(f"a size that is none in shape {shape}")
    except Exception as error:
        # numpy evaluates the header as a literal, and damaged text fails in many ways.
        raise DataError(f"{where} is not a readable .npy array: {described(error)}", DAMAGED_HINT) from error
    if dtype.hasobject:
        raise DataError(
            f"{where} holds Python objects, which only unpickling could read",
            "Save plain numeric arrays of equal shapes.",
        )
    check_dtype(dtype, where)
    return Header(shape, fortran, dtype, npy_format.MAGIC_LEN + len(prefix) + length)


def read_array(stream: IO[bytes], shape: Shape, dtype: np.dtype[Any], where: str) -> Array:
    """The next C-ordered array of a stream, straight into its memory.

    Raises:
        DataError: it is above 2 GiB, the stream ends before it does, or the archive is damaged.
    """
    if math.prod(shape) * dtype.itemsize > _LARGEST_SAMPLE:
        raise DataError(
            f"{where} declares a sample of shape {format_shape(shape)}, above 2 GiB",
            "Check how the file was written; stack the samples along axis 0.",
        )
    array = np.empty(shape, dtype)
    room = array.reshape(-1).view(np.uint8).data
    done = 0
    for block in _blocks(stream, len(room), where):
        room[done : done + len(block)] = block
        done += len(block)
    return array


def skip(stream: IO[bytes], size: int, where: str) -> None:
    """Pass over bytes of a stream.

    Raises:
        DataError: the stream ends before, or the archive is damaged.
    """
    # Not by seek(): Python 3.12 and 3.13.0 then mix up the members of an archive (cpython #127847).
    for _ in _blocks(stream, size, where):
        pass


def read_whole(stream: IO[bytes], size: int, spec: TensorSpec | None, where: str) -> Array:
    """One sample, a whole .npy of `size` bytes, as it is written: of any dtype, C or Fortran order.

    Raises:
        DataError: it does not fit the input `spec`, which is found before its data are read, or is damaged.
    """
    header = read_header(stream, where)
    if spec is not None:
        full_shape(spec.name, header.shape, spec, where)
    _check_size(header, size, where)
    shape = header.shape[::-1] if header.fortran else header.shape
    array = read_array(stream, shape, header.dtype, where)
    return array.T if header.fortran else array


def map_file(path: Path) -> Array:
    """A .npy file, mapped: only what is used is read, and Fortran order costs nothing.

    Raises:
        DataError: it is damaged or holds Python objects.
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        header = read_header(stream, str(path))
    _check_size(header, path.stat().st_size, str(path))
    try:
        if not header.nbytes:
            return np.empty(header.shape, header.dtype)
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{path} is damaged: {described(error)}", DAMAGED_HINT) from error
    return array


def open_archive(source: Path | IO[bytes], where: str) -> zipfile.ZipFile:
    """A .npz for reading.

    Raises:
        DataError: it is no archive, or cut short.
        OSError: the file is missing or not to be read.
    """
    try:
        return zipfile.ZipFile(source)
    except (FileNotFoundError, PermissionError):
        raise  # The file cannot be opened, which says nothing of its content.
    except _ZIP_ERRORS as error:
        raise DataError(f"{where} is truncated or no .npz archive: {error}", DAMAGED_HINT) from error


def members(archive: zipfile.ZipFile, where: str) -> dict[str, zipfile.ZipInfo]:
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


def open_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> IO[bytes]:
    """The bytes of one .npy in an archive.

    Raises:
        DataError: the archive is damaged there.
    """
    with _damage_of(where):
        return archive.open(info)


def _check_size(header: Header, size: int, where: str) -> None:
    """`size` counts the whole file or member."""
    left = size - header.length
    if header.nbytes > left:
        raise DataError(f"{where} is truncated: it declares {header.nbytes} bytes and has {left}", DAMAGED_HINT)


def _blocks(stream: IO[bytes], size: int, where: str) -> Iterator[bytes]:
    """The next `size` bytes in blocks that are small beside a sample."""
    with _damage_of(where):
        while size > 0:
            block = stream.read(min(_BLOCK, size))
            if not block:
                raise EOFError(f"it ends {size} bytes too early")
            size -= len(block)
            yield block


@contextlib.contextmanager
def _damage_of(where: str) -> Iterator[None]:
    try:
        yield
    except _ZIP_ERRORS as error:
        raise DataError(f"{where} is truncated or damaged: {error}", DAMAGED_HINT) from error
