"""The points at which a run can be cut off: before each change of the disk, and inside each write.

Python tells an audit hook of every file that it opens, makes, renames or deletes. Those below one folder are counted,
and at a chosen one the process is killed, interrupted, or has no more room on its disk. A file that is opened for
writing counts twice: before it is there, and as it is when its writer has come half of the way.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any, Literal

Action = Literal["count", "kill", "interrupt", "full disk"]

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
_EXCHANGE = "ctypes.dlsym"
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_HALF = b"half of"


class Points:
    """Counts the points of this process and acts at one; an audit hook stays for good, so that it is one a process."""

    def __init__(self, folder: Path, action: Action, at: int) -> None:
        """
        Args:
            folder: changes outside of it are no points.
            at: the number of the point at which something happens; of a full disk, from there on.
        """
        self._folder = os.path.realpath(folder) + os.sep
        self._action, self._at = action, at
        self._busy = False
        self.reached: list[str] = []
        """What each point is: the event and the path below the folder."""
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy or not (event == "open" or event in _CHANGES or event == _EXCHANGE):
            return
        self._busy = True
        try:
            self._at_event(event, arguments)
        finally:
            self._busy = False

    def _at_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == _EXCHANGE:
            if arguments[1] == "renameat2":
                self._point(event, "")
            return
        path = arguments[0]
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        # Not resolved: that would look at the disk, and at where a link leads.
        place = os.path.normpath(os.path.join(os.getcwd(), os.fsdecode(path)))  # noqa: PTH109, PTH118
        if not place.startswith(self._folder):
            return
        name = place.removeprefix(self._folder)
        if event != "open":
            self._point(event, name)
        elif isinstance(arguments[2], int) and arguments[2] & _WRITING:
            self._point("before writing", name)
            self._point("while writing", name, place)

    def _point(self, what: str, name: str, half: str | None = None) -> None:
        number = len(self.reached)
        self.reached.append(f"{what} {name}".strip())
        if self._action == "full disk" and number >= self._at and what not in ("os.remove", "os.rmdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        if number != self._at:
            return
        if self._action == "kill":
            if half is not None:
                descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                os.write(descriptor, _HALF)
                os.close(descriptor)
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._action == "interrupt":
            signal.raise_signal(signal.SIGINT)
