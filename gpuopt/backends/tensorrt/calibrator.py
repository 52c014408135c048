"""TensorRT's own INT8 calibration (8.5 to 10), over the samples of gpuopt's readers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuopt.backends.tensorrt.library import version
from gpuopt.backends.tensorrt.options import NativeCalibration
from gpuopt.errors import DataError, GpuoptError, UsageError

Array = npt.NDArray[Any]
_FIRST_WITHOUT = 11
_BASES = {"entropy": "IInt8EntropyCalibrator2", "minmax": "IInt8MinMaxCalibrator"}


def refuse_without_calibrators(target: str, trt: Any) -> None:
    """Refuse where TensorRT has no calibrators any more.

    Raises:
        UsageError: with the reason.
    """
    if target != "tensorrt" or version(trt)[0] >= _FIRST_WITHOUT:
        raise UsageError(
            f"{target} {trt.__version__} has no calibrators: its networks take INT8 from Q/DQ in the graph alone",
            "Leave out quantize.quantizer, so that gpuopt calibrates and places Q/DQ.",
        )


def make_calibrator(trt: Any, target: str, calibration: NativeCalibration) -> Any:
    """A calibrator object for `config.int8_calibrator`; keep it until the build is done.

    Its `problem` is what a sample was refused for, its `written` the calibration cache.

    Raises:
        UsageError: this TensorRT has none.
    """
    refuse_without_calibrators(target, trt)
    import pycuda.driver as driver

    from gpuopt.cuda.device import Device

    base = getattr(trt, _BASES[calibration.method])

    class Calibrator(base):  # type: ignore[misc, valid-type]
        """Hands one batch after another over on the device."""

        def __init__(self) -> None:
            base.__init__(self)
            self.problem: GpuoptError | None = None
            self.written = b""
            self._batches = calibration.batches()
            self._first: Mapping[str, Array] | None = next(self._batches, None)
            self._shapes = {name: value.shape for name, value in (self._first or {}).items()}
            self._pending = self._first
            # The primary context is the one that TensorRT works in.
            self._device = Device()
            with self._device.activate():
                self._buffers = {name: driver.mem_alloc(value.nbytes) for name, value in (self._first or {}).items()}

        def get_batch_size(self) -> int:
            return max((shape[0] for shape in self._shapes.values() if shape), default=1)

        def get_batch(self, names: list[str]) -> list[int] | None:
            # An exception here would pass through C++.
            try:
                batch = self._pending if self._pending is not None else next(self._batches, None)
                self._pending = None
                if batch is None:
                    return None
                _check(batch, self._shapes)
                with self._device.activate():
                    for name in names:
                        driver.memcpy_htod(self._buffers[name], np.ascontiguousarray(batch[name]))
                return [int(self._buffers[name]) for name in names]
            except GpuoptError as error:
                self.problem = error
            except Exception as error:
                self.problem = DataError(f"a calibration batch cannot be used: {error}", "Check the calibration data.")
            return None

        def read_calibration_cache(self) -> bytes | None:
            return calibration.cache or None

        def write_calibration_cache(self, cache: Any) -> None:
            self.written = bytes(cache)

    return Calibrator()


def _check(batch: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, value in batch.items():
        if value.shape != shapes[name]:
            raise DataError(
                f"TensorRT's calibrator takes batches of one shape: '{name}' has {value.shape} after {shapes[name]}",
                "Give samples of one shape, or use gpuopt's own calibration.",
            )
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise DataError(f"a calibration batch of '{name}' holds NaN or infinity", "Clean the calibration data.")
