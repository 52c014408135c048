"""What a run says while it works: rich bars on a terminal, plain lines elsewhere, always stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol, TextIO

_SECONDS_BETWEEN_PLAIN_LINES = 5.0


class Progress(Protocol):
    """The listener that stages and the runner talk to."""

    def stage(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A stage is at work for as long as the context is open."""

    def advance(self, done: int, total: int | None) -> None:
        """The stage at work has finished `done` of `total` steps."""

    def line(self, text: str) -> None:
        """A finished stage or another fact, one line."""

    def warn(self, text: str) -> None:
        """A warning, one line."""


class Silent:
    """Says nothing (`--quiet`, and the default for callers from Python)."""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        yield

    def advance(self, done: int, total: int | None) -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass


class PlainLines(Silent):
    """One line an event, at most one progress line in five seconds."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._stage = ""
        self._last = 0.0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._stage, self._last = name, time.monotonic()
        yield

    def advance(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_PLAIN_LINES:
            self._last = now
            self.line(f"{self._stage}: {done}/{total}" if total else f"{self._stage}: {done}")

    def line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def warn(self, text: str) -> None:
        self.line(f"warning: {text}")


class RichBars:
    """A spinner and a bar with the time left for the stage at work."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[steps]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task: int | None = None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with self._bars:
            task = self._bars.add_task(name, total=None, steps="")
            self._task = int(task)
            try:
                yield
            finally:
                self._bars.remove_task(task)
                self._task = None

    def advance(self, done: int, total: int | None) -> None:
        from rich.progress import TaskID

        if self._task is not None:
            steps = f"{done}/{total}" if total else f"{done}"
            self._bars.update(TaskID(self._task), completed=done, total=total, steps=steps)

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self._console.print("warning:", style="yellow", end=" ")
        self._console.print(text, markup=False, soft_wrap=True)


def choose(quiet: bool) -> Progress:
    """Bars where stderr is a terminal, plain lines where it is not, nothing under `--quiet`."""
    if quiet:
        return Silent()
    return RichBars() if sys.stderr.isatty() else PlainLines()
