"""A GPU and its primary context, which torch and other libraries of the process share."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

from gpuopt.environment import install_hint
from gpuopt.errors import RequirementError, one_line


class _Closable(Protocol):
    def close(self) -> None: ...


_open_devices: weakref.WeakSet[Device] = weakref.WeakSet()
_entered_devices: set[Device] = set()


class Device:
    """One GPU. `with Device() as device:` makes its context current for the block and closes everything at the end.

    What is made on a device (pools, streams, engines) is closed with it, last first: memory that outlives its context
    would end the process. Objects of one device may be used from one thread at a time, inside `activate()`.

    Attributes:
        name: as `NVIDIA H100 80GB HBM3`.
        compute_capability: as `9.0`.
        driver_version: the newest CUDA version that the driver supports, as `13.0`.
        total_bytes: of its memory.

    Raises:
        RequirementError: pycuda, the driver or the GPU is missing.
    """

    def __init__(self, index: int = 0) -> None:
        driver = _driver()
        if index >= driver.Device.count():
            raise RequirementError(
                f"there is no GPU {index}: the driver reports {driver.Device.count()}", "'gpuopt doctor' lists them."
            )
        device = driver.Device(index)
        self.index = index
        self.name: str = device.name()
        self.compute_capability = "{}.{}".format(*device.compute_capability())
        version = driver.get_driver_version()
        self.driver_version = f"{version // 1000}.{version % 1000 // 10}"
        self.total_bytes: int = device.total_memory()
        self._context: Any = device.retain_primary_context()
        self._owned: list[weakref.ref[_Closable]] = []
        self._entered = 0
        _open_devices.add(self)

    def __enter__(self) -> Device:
        self._context.push()
        self._entered += 1
        _entered_devices.add(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self._entered -= 1
        try:
            if not self._entered:
                self._close_owned()
        finally:
            _driver().Context.pop()
            if not self._entered:
                _entered_devices.discard(self)
                self._release()

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Make the context current in this thread for a block; about a microsecond."""
        if self._context is None:
            raise RequirementError("the GPU was closed already", "Open the engine again.")
        self._context.push()
        try:
            yield
        finally:
            _driver().Context.pop()

    def own(self, thing: _Closable) -> None:
        """Close `thing` before the context goes."""
        self._owned = [reference for reference in self._owned if reference() is not None]
        self._owned.append(weakref.ref(thing))

    def free_bytes(self) -> int:
        """Free memory, seen from all processes; the context has to be current."""
        return int(_driver().mem_get_info()[0])

    def synchronize(self) -> None:
        """Wait for all work on the GPU of this process."""
        _driver().Context.synchronize()

    def close(self) -> None:
        """Close what was made here, then let the context go; a second call does nothing."""
        if self._context is None:
            return
        with self.activate():
            self._close_owned()
        self._release()

    def _close_owned(self) -> None:
        with contextlib.ExitStack() as stack:
            for reference in self._owned:
                if (thing := reference()) is not None:
                    stack.callback(thing.close)
            self._owned.clear()

    def _release(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            before = _current_context()
            context.detach()
            # pycuda makes a context current to let it go, and leaves it so where it is a primary one.
            if _current_context() != before:
                ctypes.CDLL("libcuda.so.1").cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def pci_bus_id(index: int = 0) -> str:
    """Of a GPU, as NVML takes it; makes no context.

    Raises:
        RequirementError: pycuda, the driver or the GPU is missing.
    """
    driver = _driver()
    if index >= driver.Device.count():
        raise RequirementError(
            f"there is no GPU {index}: the driver reports {driver.Device.count()}", "'gpuopt doctor' lists them."
        )
    return str(driver.Device(index).pci_bus_id())


def _current_context() -> int | None:
    """Address of the driver's current context in this thread."""
    found = ctypes.c_void_p()
    ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(found))
    return found.value


def _driver() -> Any:
    try:
        import pycuda.driver as driver
    except ImportError as error:
        raise RequirementError(
            f"running engines needs pycuda: {one_line(error)}", f"Install it: {install_hint('pycuda')}."
        ) from error
    try:
        driver.init()
    except driver.Error as error:
        raise RequirementError(
            f"no NVIDIA GPU answers: {one_line(error)}", "Check the driver with nvidia-smi; 'gpuopt doctor' shows more."
        ) from error
    return driver


@atexit.register
def _close_all() -> None:
    """Before the interpreter goes: pycuda ends the process with an abort if it finds a current context then."""
    for device in [*_entered_devices, *_open_devices]:
        with contextlib.suppress(Exception):
            while device._entered:
                device.__exit__()
            device.close()
