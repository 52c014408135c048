"""Pools of device memory and of page-locked host memory: what is freed is kept for the next of its size."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuopt.cuda.device import Device
from gpuopt.errors import RequirementError, one_line

Array = npt.NDArray[Any]


class DeviceBuffer:
    """A block of device memory; `free` gives it back to its pool.

    Attributes:
        address: on the device.
        nbytes: as asked for; the block may be larger.
    """

    def __init__(self, allocation: Any, nbytes: int) -> None:
        self._allocation = allocation
        self.address = int(allocation)
        self.nbytes = nbytes

    def free(self) -> None:
        """Give the block back; a second call does nothing."""
        allocation, self._allocation = self._allocation, None
        if allocation is not None:
            allocation.free()


class DevicePool:
    """Device memory in blocks of near powers of two, kept after use."""

    def __init__(self, device: Device) -> None:
        import pycuda.tools

        self._pool: Any = pycuda.tools.DeviceMemoryPool()
        self._device = device
        self.peak_bytes = 0
        device.own(self)

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """A block of at least `nbytes` (and at least one) bytes.

        Raises:
            RequirementError: the GPU has no memory left.
        """
        import pycuda.driver

        try:
            buffer = DeviceBuffer(self._pool.allocate(max(1, nbytes)), nbytes)
        except pycuda.driver.MemoryError as error:
            raise RequirementError(
                f"GPU {self._device.index} has no {nbytes / 2**20:.0f} MiB left: {one_line(error)}",
                "Use a smaller batch or fewer streams, or stop what else runs on this GPU (nvidia-smi lists it).",
            ) from error
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return buffer

    @property
    def held_bytes(self) -> int:
        """What the pool has taken from the GPU, in use or not."""
        return int(self._pool.managed_bytes)

    @property
    def active_bytes(self) -> int:
        """What is in use."""
        return int(self._pool.active_bytes)

    def trim(self) -> None:
        """Give blocks that are not in use back to the GPU."""
        self._pool.free_held()

    def close(self) -> None:
        """Keep nothing any more."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop_holding()


class PinnedPool:
    """Page-locked host memory: copies from it run beside the GPU's work."""

    def __init__(self, device: Device) -> None:
        import pycuda.tools

        self._pool: Any = pycuda.tools.PageLockedMemoryPool()
        device.own(self)

    def allocate(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """An uninitialised array in page-locked memory; it goes back to the pool when nothing refers to it."""
        count = int(np.prod(shape, dtype=np.int64))
        if count == 0:
            return np.empty(shape, dtype)
        array: Array = self._pool.allocate((count,), np.dtype(dtype))
        return array.reshape(shape)

    @property
    def held_bytes(self) -> int:
        """What the pool has page-locked, in use or not."""
        return int(self._pool.managed_bytes)

    @property
    def active_bytes(self) -> int:
        """What is in use."""
        return int(self._pool.active_bytes)

    def trim(self) -> None:
        """Give memory that is not in use back to the system."""
        self._pool.free_held()

    def close(self) -> None:
        """Keep nothing any more; arrays still in use stay valid."""
        pool, self._pool = self._pool, None
        if pool is not None:
            with contextlib.suppress(AttributeError):
                pool.stop_holding()
