"""Turns on a GPU: builders and measurements at the same time spoil each other's timings, and all take longer."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from typing import IO

from gpuopt import environment
from gpuopt.cache import users_folder
from gpuopt.progress import Progress

_SECONDS_BETWEEN_TRIES = 0.05


@contextlib.contextmanager
def gpu_turn(progress: Progress, index: int = 0) -> Iterator[float]:
    """For a block, be the only gpuopt of this user at work on a GPU; waits for the one before.

    It is a lock on a file in the user's cache folder, wherever gpuopt's cache is: jobs with a cache each share the GPU.
    The file is named by the GPU's PCI bus address; the system lets the lock go with the process, however that ends.
    Without a GPU, or where no file can be locked, there is no waiting.

    Args:
        index: of the GPU, among those that the process sees.

    Yields:
        Seconds waited.
    """
    address = environment.pci_bus_address(index)
    with contextlib.ExitStack() as stack:
        waited = 0.0
        if address:
            with contextlib.suppress(OSError):
                folder = users_folder()
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((folder / f"gpu-{address.replace(':', '-')}.lock").open("ab"))
                waited = _lock(file, progress)
        yield waited


def _lock(file: IO[bytes], progress: Progress) -> float:
    started = time.monotonic()
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return time.monotonic() - started
        except BlockingIOError:
            if not told:
                progress.line("another gpuopt is at work on this GPU: waiting for it")
                told = True
            time.sleep(_SECONDS_BETWEEN_TRIES)
