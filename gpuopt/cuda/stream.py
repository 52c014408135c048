"""Streams, events, and copies on them."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from gpuopt.cuda.device import Device

Array = npt.NDArray[Any]


class Event:
    """A point in a stream."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def synchronize(self) -> None:
        """Wait until the stream has passed it."""
        self._event.synchronize()

    def milliseconds_since(self, earlier: Event) -> float:
        """Time on the GPU between two events that it has passed; resolution half a microsecond."""
        return float(self._event.time_since(earlier._event))


class Stream:
    """Work in order; `handle` is what other libraries take."""

    def __init__(self, device: Device) -> None:
        import pycuda.driver as driver

        self._driver = driver
        self._stream: Any = driver.Stream()
        self.handle = int(self._stream.handle)
        device.own(self)

    def synchronize(self) -> None:
        """Wait until everything enqueued is done."""
        self._stream.synchronize()

    def record(self) -> Event:
        """An event behind all that is enqueued."""
        event = self._driver.Event()
        event.record(self._stream)
        return Event(event)

    def wait(self, event: Event) -> None:
        """Let what is enqueued from now on wait for an event of another stream."""
        self._stream.wait_for_event(event._event)

    def copy_in(self, address: int, source: Array) -> None:
        """Enqueue a copy of a contiguous array to the device; it runs beside the host only if page-locked."""
        if source.nbytes:
            self._driver.memcpy_htod_async(address, source, self._stream)

    def copy_out(self, target: Array, address: int) -> None:
        """Enqueue a copy from the device into a contiguous array."""
        if target.nbytes:
            self._driver.memcpy_dtoh_async(target, address, self._stream)

    def fill(self, address: int, nbytes: int, value: int = 0) -> None:
        """Enqueue setting every byte of a block."""
        if nbytes:
            self._driver.memset_d8_async(address, value, nbytes, self._stream)

    def close(self) -> None:
        """Wait for the work and let the stream go."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.synchronize()
