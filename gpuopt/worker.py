"""Stages run in a process of their own: a library that crashes takes the stage along, not the run.

The worker also keeps whatever libraries print away from stdout, which is for data, and dies with
its parent. One worker serves all stages of a run, so that each library is imported once.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any

from gpuopt import environment, errors, time_limit, user_code
from gpuopt.artifact import StageOutcome
from gpuopt.errors import BuildError, GpuoptError, RequirementError, TimeLimitError, defect
from gpuopt.interpreter import search_path
from gpuopt.progress import Silent
from gpuopt.stages.context import StageContext

_PR_SET_PDEATHSIG = 1
_MOST_LOG_BYTES = 1 << 16
_SECONDS_TO_STOP = 3.0

# The worker searches where its parent does: `interpreter` says why.
_BOOTSTRAP = "import sys; sys.path[:] = sys.argv[2:]; from gpuopt.worker import serve; serve(int(sys.argv[1]))"
_KINDS = {kind.__name__: kind for kind in errors.KINDS}


class Worker:
    """A child process that runs stages, started when first needed and again after a crash."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def run(self, stage: str, context: StageContext) -> tuple[StageOutcome, float]:
        """Run `gpuopt.stages.<stage>` there; gives its outcome and the seconds it took.

        Raises:
            GpuoptError: what the stage raised, or `BuildError` if the process died.
            TimeLimitError: the command's time is up; the process is ended.
        """
        pipe = self._started()
        try:
            pipe.send((stage, dataclasses.replace(context, progress=Silent())))
        except ConnectionError as error:
            raise self._post_mortem(stage, context) from error
        while True:
            try:
                kind, *content = pipe.recv()
            except (EOFError, ConnectionError) as error:
                raise self._post_mortem(stage, context) from error
            except TimeLimitError:
                time_limit.lift()
                if stage == "build":
                    _let_stop(pipe)
                self.stop()
                raise
            if kind == "done":
                outcome, seconds = content
                return outcome, seconds
            if kind == "error":
                name, message, hint, details = content
                failure = _KINDS[name](message, hint)
                if isinstance(failure, TimeLimitError):
                    # The builder was a little earlier than the alarm, which has nothing to end any more.
                    time_limit.lift()
                failure.details = details + self._said()
                raise failure
            getattr(context.progress, kind)(*content)

    def kill(self) -> None:
        """End the process while another thread waits in `run`, which raises then."""
        process = self._process
        if process is not None:
            process.kill()

    def stop(self) -> None:
        """End the process at once."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._log is not None:
            self._log.close()
        self._process = self._pipe = self._log = None

    def _started(self) -> Connection:
        if self._pipe is not None and self._process is not None and self._process.poll() is None:
            return self._pipe
        self.stop()
        ours, theirs = Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the worker
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module, no shell
            [sys.executable, "-c", _BOOTSTRAP, str(theirs.fileno()), *search_path()],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )
        theirs.close()
        self._pipe = ours
        return ours

    def _post_mortem(self, stage: str, context: StageContext) -> GpuoptError:
        process = self._process
        code = process.wait() if process else 0
        said = self._said()
        self.stop()
        failure = self._cause_of_death(stage, context.target, code)
        failure.details = said
        return failure

    def _said(self) -> str:
        """The end of what libraries wrote to stderr, for `--debug`."""
        if self._log is None:
            return ""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _MOST_LOG_BYTES))
        return self._log.read().decode(errors="replace")

    @staticmethod
    def _cause_of_death(stage: str, target: str, code: int) -> GpuoptError:
        if code == -signal.SIGKILL:
            return RequirementError(
                f"the {stage} stage was killed, as the system does when memory runs out",
                "Use smaller shapes or a machine with more memory.",
            )
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        where = f" for {target}" if target else ""
        return BuildError(
            f"a library crashed in the {stage} stage{where} ({cause})",
            "This is a defect of that library: try another of its versions ('gpuopt doctor' lists them) and report it.",
        )


def _let_stop(pipe: Connection) -> None:
    """TensorRT's builder knows of the end, too, and keeps what it has timed if it is let."""
    until = time.monotonic() + _SECONDS_TO_STOP
    # A message may have been cut in two by the alarm: then there is nothing to be understood any more.
    with contextlib.suppress(Exception):
        while (left := until - time.monotonic()) > 0 and pipe.poll(left):
            if pipe.recv()[0] in ("done", "error"):
                return


class _PipeProgress:
    """The progress listener inside the worker."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        yield

    def advance(self, done: int, total: int | None) -> None:
        self._pipe.send(("advance", done, total))

    def line(self, text: str) -> None:
        self._pipe.send(("line", text))

    def warn(self, text: str) -> None:
        self._pipe.send(("warn", text))


def _answer(stage: str, context: StageContext) -> tuple[Any, ...]:
    started = time.monotonic()
    try:
        outcome = importlib.import_module(f"gpuopt.stages.{stage}").run(context)
        return "done", outcome, time.monotonic() - started
    except (Exception, SystemExit) as error:
        failure = _failure(stage, error)
        return "error", type(failure).__name__, failure.message, failure.hint, traceback.format_exc() + failure.details


def _failure(stage: str, error: Exception | SystemExit) -> GpuoptError:
    if isinstance(error, GpuoptError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return environment.missing_module(error, stage)
    if isinstance(error, MemoryError):
        return RequirementError(f"{stage} ran out of memory", "Use smaller shapes or a larger machine.")
    if isinstance(error, OSError):
        return errors.StorageError(
            f"{stage} cannot read or write a file: {error}", "Check free space and permissions of the cache folder."
        )
    return defect(error, f"{stage}: ")


def serve(descriptor: int) -> None:
    """The worker's life: answer requests that come over the pipe until it closes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    user_code.watch_imports()
    # Ctrl-C reaches the whole process group; the parent decides and kills this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = Connection(descriptor)
    while True:
        try:
            stage, context = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(stage, dataclasses.replace(context, progress=_PipeProgress(pipe))))
