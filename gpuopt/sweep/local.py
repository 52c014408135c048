"""A sweep on this machine: so many processes at a time, and no more than fit into its memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gpuopt.errors import GpuoptError
from gpuopt.sweep.results import Row
from gpuopt.sweep.task import Running, Task, failed_row, this_machine

_SECONDS_BETWEEN_LOOKS = 0.05


def run(tasks: Sequence[Task], processes: int, done: Callable[[Row], None]) -> None:
    """Make all of them; one that fails does not stop the others.

    Args:
        processes: how many at a time.
        done: told of each row, in the order in which they end.
    """
    waiting, at_work = list(tasks), dict[str, Running]()
    try:
        while waiting or at_work:
            while waiting and len(at_work) < processes:
                task = waiting.pop(0)
                try:
                    at_work[task.name] = Running(task, this_machine())
                except GpuoptError as error:
                    done(failed_row(task, error, 0.0, 1))
            for name, running in list(at_work.items()):
                row = running.finished()
                if row is not None:
                    del at_work[name]
                    done(row)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        for running in at_work.values():
            running.stop()


def processes_that_fit(asked: int, memory: int | None) -> int:
    """How many tasks of `memory` bytes each the memory that is available takes; at least one, at most `asked`."""
    available = available_bytes()
    if memory is None or available is None:
        return asked
    return max(1, min(asked, available // memory))


def available_bytes() -> int | None:
    """Memory that new processes can have without swapping; None where Linux does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
