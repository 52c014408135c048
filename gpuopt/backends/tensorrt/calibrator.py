"""TensorRT's own INT8 calibrators (8.5 to 10): batches to the GPU, and the calibration cache as a file.

The cache is the text that `gpuopt.calibration.ranges` reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuopt.backends.tensorrt.options import Feed, NativeCalibration
from gpuopt.errors import DataError, GpuoptError, RequirementError, defect
from gpuopt.shapes import Profile, ShapeRange, format_shape
from gpuopt.storage import storage_errors, write_bytes

_CLASSES = {"entropy": "IInt8EntropyCalibrator2", "minmax": "IInt8MinMaxCalibrator"}


class Batches:
    """The feeds of a calibration, checked one by one.

    Args:
        calibration: gives the feeds.
        dtypes: numpy dtype of every input of the network, by name.
    """

    def __init__(self, calibration: NativeCalibration, dtypes: Mapping[str, np.dtype[Any]]) -> None:
        self._batch = calibration.batch
        self._dtypes = dtypes
        self._feeds: Iterator[Feed] = iter(calibration.feeds())
        self._first: Feed | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.count = 0

    def peek(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the first feed, by input.

        Raises:
            DataError: there is no feed, or it is not what the network takes.
        """
        if self._first is None:
            self._first = next(self._feeds, None)
            if self._first is None:
                raise DataError("the calibration data holds no batch", "Give at least one; a few hundred samples do.")
            self._checked(self._first)
        return self._shapes

    def next(self) -> dict[str, npt.NDArray[Any]] | None:
        """The next feed, contiguous and in the network's dtypes; None at the end.

        Raises:
            DataError: an input is missing, of another shape than in the first feed, or holds NaN or infinity.
        """
        feed, self._first = (self._first, None) if self._first is not None else (next(self._feeds, None), None)
        if feed is None:
            return None
        checked = self._checked(feed)
        self.count += 1
        return checked

    def _checked(self, feed: Feed) -> dict[str, npt.NDArray[Any]]:
        where = f"calibration batch {self.count + 1}"
        result = {}
        for name, dtype in self._dtypes.items():
            if name not in feed:
                raise DataError(
                    f"{where} has no input '{name}'; it has {', '.join(feed)}", "Name the arrays as the inputs."
                )
            array = np.ascontiguousarray(feed[name])
            expected = self._shapes.setdefault(name, array.shape)
            if array.shape[:1] != (self._batch,) or array.shape != expected:
                wanted = expected if expected[:1] == (self._batch,) else (self._batch, *expected[1:])
                raise DataError(
                    f"{where}: '{name}' is {format_shape(array.shape)}, not {format_shape(wanted)}",
                    "TensorRT's calibrator takes batches of one shape: leave out a smaller last one.",
                )
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise DataError(f"{where}: '{name}' holds NaN or infinity", "Look at the data and its preprocessing.")
            result[name] = array.astype(dtype, copy=False)
        return result


def calibration_profile(profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> Profile:
    """The profile for the calibration: the feeds' shapes, or the optimum of an engine's where they are not known."""
    fixed = {name: tuple(shapes.get(name, sizes.opt)) for name, sizes in profile.items()}
    return {name: ShapeRange(shape, shape, shape) for name, shape in fixed.items()}


def make_calibrator(trt: ModuleType, calibration: NativeCalibration, batches: Batches | None) -> Any:
    """A calibrator of TensorRT's: its `failure` is an error that a callback could not raise, `content` the cache.

    Args:
        trt: TensorRT 8.5 to 10.
        calibration: method, batch and cache.
        batches: the feeds; None if the cache is read.

    Raises:
        RequirementError: pycuda is missing.
        StorageError: the cache cannot be read.
    """
    known = b""
    if calibration.cache_file is not None and calibration.cache_file.is_file():
        with storage_errors("read", calibration.cache_file):
            known = calibration.cache_file.read_bytes()
    base = getattr(trt, _CLASSES[calibration.method])
    inputs = _DeviceInputs() if batches is not None else None

    class Calibrator(base):  # type: ignore[misc, valid-type]
        """Exceptions are kept: one that passed through TensorRT would end the process."""

        def __init__(self) -> None:
            base.__init__(self)
            self.failure: GpuoptError | None = None
            self.content: bytes = known

        def get_batch_size(self) -> int:
            return calibration.batch

        def get_batch(self, names: list[str], *_: object) -> list[int] | None:
            try:
                feed = batches.next() if batches is not None and self.failure is None else None
                return [inputs.copy(name, feed[name]) for name in names] if feed and inputs is not None else None
            except GpuoptError as error:
                self.failure = error
            except Exception as error:  # pycuda's errors, and those of the user's data
                self.failure = defect(error, "calibration: ")
            return None

        def read_calibration_cache(self, *_: object) -> bytes | None:
            return known or None

        def write_calibration_cache(self, cache: Any, *_: object) -> None:
            try:
                self.content = bytes(cache)
                if calibration.cache_file is not None and self.failure is None:
                    write_bytes(calibration.cache_file, self.content)
            except GpuoptError as error:
                self.failure = error

        def close(self) -> None:
            if inputs is not None:
                inputs.close()

    return Calibrator()


class _DeviceInputs:
    """One device buffer an input, in the primary context, which TensorRT uses as well."""

    def __init__(self) -> None:
        try:
            import pycuda.driver as cuda
        except ImportError as error:
            raise RequirementError(
                f"TensorRT's calibrator needs the Python package 'pycuda': {error}", "Install it: pip install pycuda."
            ) from error
        cuda.init()
        self._cuda = cuda
        self._context = cuda.Device(0).retain_primary_context()
        self._buffers: dict[str, Any] = {}

    def copy(self, name: str, array: npt.NDArray[Any]) -> int:
        """Copy an array to its buffer; its address."""
        self._context.push()
        try:
            if name not in self._buffers:
                self._buffers[name] = self._cuda.mem_alloc(array.nbytes)
            self._cuda.memcpy_htod(self._buffers[name], array)
            return int(self._buffers[name])
        finally:
            self._context.pop()

    def close(self) -> None:
        """Free the buffers before the context goes."""
        self._context.push()
        try:
            for buffer in self._buffers.values():
                buffer.free()
            self._buffers.clear()
        finally:
            self._context.pop()
            self._context.detach()
