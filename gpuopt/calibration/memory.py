"""Resident memory of this process, as Linux accounts for it."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path

MIB = 1 << 20

_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1
_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Memory this process holds now; its highest where the system does not tell."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most it has held since `reset_peak`, or since it began where the mark cannot be reset."""
    return _status("VmHWM")


def release_freed() -> None:
    """Give freed memory back to the system, now and from now on for blocks from 1 MiB (glibc: `man 3 mallopt`).

    By default large blocks that are freed move the bounds up to 32 and 64 MiB, and later ones stay in the heap.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, MIB)
        library.mallopt(_M_TRIM_THRESHOLD, MIB)
        library.malloc_trim(0)


def reset_peak() -> None:
    """Start a new high-water mark (`man 5 proc`, clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = _STATUS.read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
