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
import time
import traceback
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from gpuopt import environment, errors
from gpuopt.artifact import StageOutcome
from gpuopt.errors import BuildError, GpuoptError, RequirementError
from gpuopt.progress import Progress, Silent
from gpuopt.stages.context import StageContext

_PR_SET_PDEATHSIG = 1
_KINDS = {kind.__name__: kind for kind in errors.KINDS}


class Worker:
    """A child process that runs stages, started when first needed and again after a crash."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def run(self, stage: str, context: StageContext) -> tuple[StageOutcome, float]:
        """Run `gpuopt.stages.<stage>` there; gives its outcome and the seconds it took.

        Raises:
            GpuoptError: what the stage raised, or `BuildError` if the process died.
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
            if kind == "done":
                outcome, seconds = content
                return outcome, seconds
            if kind == "error":
                name, message, hint, details = content
                failure = _KINDS[name](message, hint)
                failure.details = details
                raise failure
            getattr(context.progress, kind)(*content)

    def stop(self) -> None:
        """End the process at once."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._pipe = None

    def _started(self) -> Connection:
        if self._pipe is not None and self._process is not None and self._process.poll() is None:
            return self._pipe
        self.stop()
        ours, theirs = Pipe()
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module, no shell
            [sys.executable, "-m", "gpuopt.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        )
        theirs.close()
        self._pipe = ours
        return ours

    def _post_mortem(self, stage: str, context: StageContext) -> GpuoptError:
        process = self._process
        code = process.wait() if process else 0
        self.stop()
        if code == -signal.SIGKILL:
            return RequirementError(
                f"the {stage} stage was killed, as the system does when memory runs out",
                "Use smaller shapes or a machine with more memory.",
            )
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        where = f" for {context.target}" if context.target else ""
        return BuildError(
            f"a library crashed in the {stage} stage{where} ({cause})",
            "This is a defect of that library: try another of its versions ('gpuopt doctor' lists them) and report it.",
        )


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


def _serve(pipe: Connection) -> None:
    while True:
        try:
            stage, context = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(stage, dataclasses.replace(context, progress=_progress(pipe))))


def _progress(pipe: Connection) -> Progress:
    return _PipeProgress(pipe)


def _answer(stage: str, context: StageContext) -> tuple[Any, ...]:
    started = time.monotonic()
    try:
        outcome = importlib.import_module(f"gpuopt.stages.{stage}").run(context)
        return "done", outcome, time.monotonic() - started
    except Exception as error:
        failure = _failure(stage, error)
        return "error", type(failure).__name__, failure.message, failure.hint, traceback.format_exc()


def _failure(stage: str, error: Exception) -> GpuoptError:
    if isinstance(error, GpuoptError):
        return error
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        return RequirementError(
            f"{stage} needs the Python package '{module}', which is not installed",
            f"Install it: {environment.install_hint(module)}.",
        )
    if isinstance(error, MemoryError):
        return RequirementError(f"{stage} ran out of memory", "Use smaller shapes or a larger machine.")
    if isinstance(error, OSError):
        return errors.StorageError(
            f"{stage} cannot read or write a file: {error}", "Check free space and permissions of the cache folder."
        )
    return GpuoptError(
        f"{stage}: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
        "This is a defect of gpuopt. Run 'gpuopt --debug ...' for the traceback and report it.",
    )


def _main() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ctrl-C reaches the whole process group; the parent decides and kills this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    _main()
