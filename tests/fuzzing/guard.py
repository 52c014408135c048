"""What reading one hostile file may not do: raise what nobody foresaw, run code, write elsewhere, hang, take memory.

An audit hook sees every file that Python opens, every process and every import by a pickle; it stays in the process
for good. Memory is the growth of the process's peak, which Linux resets for each file. A native crash and a native
hang end the process, and whoever started it sees that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from gpuopt.errors import GpuoptError

MOST_SECONDS = 20
"""For one file; what comes near is a hang in the making, since every seed takes well under one."""

_ROOM = 2 << 30
"""Beyond this the operating system refuses, so that a finding does not take the machine along."""

_CODE_EVENTS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "pty.spawn"}
_OPENS_A_SESSION = "ort.InferenceSession(sys.argv[1]"
"""gpuopt looks in a process of its own whether ONNX Runtime crashes on a graph."""
_CHANGING_EVENTS = {"os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "shutil.rmtree", "os.mkdir"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Forbidden(BaseException):
    """Not an Exception: readers that catch those must not hide it."""


@dataclass(frozen=True)
class Finding:
    """What went wrong with an input.

    Attributes:
        kind: `exception`, `hang`, `memory` or `forbidden`.
        what: one line; the same defect gives the same one, as far as that can be told.
    """

    kind: str
    what: str


class Guard:
    """Watches calls one after the other; made once a process, since an audit hook cannot be taken back."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: where files may be written.
        """
        self._folder = os.path.realpath(folder)
        self._watching = False
        sys.addaudithook(self._audit)
        signal.signal(signal.SIGALRM, _too_slow)

    def check(self, read: Callable[[], object], most_bytes: int = 512 << 20) -> Finding | None:
        """Call; None if it returned or raised a GpuoptError that is not about gpuopt's own defects.

        Args:
            most_bytes: how much the process may grow.
        """
        before = _reset_peak()
        started = time.monotonic()
        try:
            with self._limits():
                read()
        except GpuoptError as error:
            if type(error) is GpuoptError:
                return Finding("exception", f"internal error: {error.message}")
            if not error.message or len(error.lines().splitlines()) > 3:
                return Finding("exception", f"a message of no use: {error.lines()!r}")
        except Forbidden as error:
            return Finding("hang" if str(error) == "time" else "forbidden", f"{error} {_where(error)}")
        except MemoryError as error:
            return Finding("memory", f"MemoryError {_where(error)}")
        except RecursionError as error:
            return Finding("exception", f"RecursionError {_where(error)}")
        except Exception as error:
            return Finding("exception", f"{type(error).__name__}: {str(error)[:80]} {_where(error)}")
        grown = _peak() - before
        if grown > most_bytes:
            return Finding("memory", f"{grown >> 20} MiB more than before")
        if time.monotonic() - started > MOST_SECONDS:
            return Finding("hang", "the time limit was passed in native code")
        return None

    @contextlib.contextmanager
    def _limits(self) -> Iterator[None]:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, hard))
        signal.alarm(MOST_SECONDS)
        self._watching = True
        try:
            yield
        finally:
            self._watching = False
            signal.alarm(0)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event == "subprocess.Popen" and arguments[0] == sys.executable and _OPENS_A_SESSION in str(arguments[1]):
            return
        if event in _CODE_EVENTS:
            raise Forbidden(f"{event} {str(arguments)[:80]}")
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and isinstance(flags, int) and flags & _WRITING:
                self._check_place(event, path)
        elif event in _CHANGING_EVENTS:
            self._check_place(event, arguments[0])

    def _check_place(self, event: str, path: Any) -> None:
        place = os.path.realpath(os.fsdecode(path))
        # Bytecode of our own modules, and the devices.
        if not place.startswith((self._folder + os.sep, "/dev/")) and "__pycache__" not in place:
            raise Forbidden(f"{event} {place}")


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise Forbidden("time")


def _where(error: BaseException) -> str:
    """The innermost line of gpuopt's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if "/gpuopt/" in frame.filename]
    return f"at {ours[-1]}" if ours else ""


def _reset_peak() -> int:
    """Start the measurement of the peak anew; gives the resident bytes now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0
