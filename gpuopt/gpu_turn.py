"""Turns on a GPU: builders and measurements at the same time spoil each other's timings, and all take longer."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from typing import IO

from gpuopt import environment
from gpuopt.cache import default_folder, users_folder
from gpuopt.errors import UsageError
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
        file = _file(f"gpu-{address.replace(':', '-')}.lock") if address else None
        yield _lock(stack.enter_context(file), progress) if file is not None else 0.0


def _file(name: str) -> IO[bytes] | None:
    """In the user's cache folder, in gpuopt's own where that cannot be, as without a home; None where neither can."""
    for place in (users_folder, default_folder):
        with contextlib.suppress(OSError, UsageError):
            folder = place()
            folder.mkdir(parents=True, exist_ok=True)
            return (folder / name).open("ab")
    return None


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
        except OSError:
            # A file system without locks.
            return 0.0
