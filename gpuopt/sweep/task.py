"""One combination of a sweep: `gpuopt compile` in a process of its own, watched, and its row written.

The same function runs here and on a node of a Ray cluster. The process dies with whoever started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import gpuopt
from gpuopt import environment
from gpuopt.errors import GpuoptError, RequirementError, defect, one_line
from gpuopt.interpreter import module_command
from gpuopt.pipeline import STAGES, own_version
from gpuopt.report.model import Failure, Report
from gpuopt.storage import sha256_json, storage_errors
from gpuopt.sweep.results import Row, figures
from gpuopt.sweep.store import Store, open_store, sha256_of_manifest

_PR_SET_PDEATHSIG = 1
_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_BETWEEN_MEASUREMENTS = 0.5
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Task:
    """What has to be known to make one combination, anywhere.

    Attributes:
        recipe: as YAML, without the folder of the result.
        key: of the recipe and its files; None: not known. That of the row has the machine in it, too.
        about: the fields of its row that are decided.
        output: of the sweep; a folder or a URL.
        run: the sweep that began it; attempts are counted within it.
        version: of the gpuopt that planned it; a worker with another one refuses.
        folder: where a factory's code is looked for.
        memory: bytes that the processes may have resident together; None: no limit.
    """

    name: str
    recipe: str
    key: str | None
    about: dict[str, Any]
    output: str
    run: str
    version: str
    folder: str
    gpu: str = ""
    cache_dir: str | None = None
    timeout: str | None = None
    memory: int | None = None


def key_on(key: str | None, machine: str) -> str | None:
    """Of the row of a task that is made on a machine; None: not all of it can be known."""
    return None if key is None else sha256_json([key, machine])


@functools.cache
def this_machine() -> str:
    """Hash of what decides a bundle beside its recipe and files: gpuopt, packages, GPUs and their drivers."""
    packages = {name: environment.version_of(name) for stage in STAGES for name in stage.packages}
    gpus = sorted({(gpu.name, gpu.driver_version) for gpu in environment.gpus()})
    return sha256_json({"gpuopt": own_version(), "packages": packages, "gpus": gpus})


@functools.cache
def this_node() -> str:
    """`this_machine` with all GPUs: Ray shows a worker those that it gave it, which may be none."""
    shown = os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        return this_machine()
    finally:
        if shown is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = shown


class Running:
    """A compilation at work; `finished` looks after it and has its row when it has ended.

    Args:
        machine: the one it runs on, as `this_machine` or `this_node` has it.

    Raises:
        GpuoptError: it cannot be begun.
    """

    def __init__(self, task: Task, machine: str) -> None:
        self._task = dataclasses.replace(task, key=key_on(task.key, machine))
        self._store = open_store(task.output)
        self._attempts = _begun(self._store, task)
        self._started = time.monotonic()
        self._measured = self._started
        self._cut_short: GpuoptError | None = None
        self._open = contextlib.ExitStack()
        try:
            with storage_errors("begin", Path(task.name)):
                scratch = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="gpuopt-task-")))
                self._bundle = self._open.enter_context(self._store.bundle_folder(task.name))
                (scratch / "recipe.yaml").write_text(task.recipe)
                self._said, self._complained = scratch / "stdout", scratch / "stderr"
                self._process = self._start(scratch / "recipe.yaml")
        except BaseException:
            self._open.close()
            raise

    def _start(self, recipe: Path) -> subprocess.Popen[bytes]:
        task = self._task
        folder = Path(task.folder) if Path(task.folder).is_dir() else None
        arguments = ["compile", "--recipe", str(recipe), "-o", str(self._bundle), "--json", "-q"]
        arguments += ["--cache-dir", task.cache_dir] if task.cache_dir else []
        arguments += ["--timeout", task.timeout] if task.timeout else []
        command = module_command("gpuopt", *arguments, folder=folder)
        with self._said.open("wb") as said, self._complained.open("wb") as complained:
            return subprocess.Popen(  # noqa: S603 - our own interpreter and module, no shell
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=complained,
                preexec_fn=_die_with_the_parent,
            )

    def finished(self) -> Row | None:
        """The row, written to the store, once the process has ended; None while it works.

        A row that cannot be written is the row of a failure: no later sweep would find it.
        """
        code = self._process.poll()
        if code is None:
            self._watch_memory()
            return None
        try:
            row = self._row(code)
            # The upload of a bundle comes before its row.
            self._open.close()
            self._write(row)
        except GpuoptError as error:
            row = failed_row(self._task, error, self._seconds(), self._attempts)
            with contextlib.suppress(GpuoptError):
                self._write(row)
        return row

    def _write(self, row: Row) -> None:
        self._store.write(f"rows/{self._task.name}.json", row.model_dump_json(indent=2).encode())

    def stop(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
        # A half-made bundle is not uploaded.
        with contextlib.suppress(KeyboardInterrupt):
            self._open.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)

    def _watch_memory(self) -> None:
        now = time.monotonic()
        if self._task.memory is None or now - self._measured < _SECONDS_BETWEEN_MEASUREMENTS:
            return
        self._measured = now
        used = resident_bytes(self._process.pid)
        if used > self._task.memory:
            self._cut_short = RequirementError(
                f"it took {used >> 20} MiB of memory, and the sweep gives a task {self._task.memory >> 20} MiB",
                "Raise memory in the sweep's file (--memory), or use smaller shapes.",
            )
            self._process.kill()

    def _seconds(self) -> float:
        return round(time.monotonic() - self._started, 3)

    def _row(self, code: int) -> Row:
        if self._cut_short is not None:
            return failed_row(self._task, self._cut_short, self._seconds(), self._attempts)
        if code == -signal.SIGKILL:
            error = RequirementError(
                "it was killed, as the system does when memory runs out", "Give it more memory, or use smaller shapes."
            )
            return failed_row(self._task, error, self._seconds(), self._attempts)
        with self._said.open("rb") as stream:
            said = stream.read(_MOST_BYTES)
        report = _report(said)
        failure = report.error if report is not None else _failure(said, code, self._complained)
        passed = code == 0 and report is not None
        return Row.model_validate(
            {
                **_EMPTY,
                **self._task.about,
                "key": self._task.key,
                "status": "passed" if passed else "failed",
                "error": None if passed else failure,
                "reused": False,
                **(figures(report, self._task.about["target"]) if passed and report is not None else {}),
                "bundle": self._store.place(self._task.name) if passed else None,
                "manifest_sha256": sha256_of_manifest(self._bundle) if passed else None,
                "seconds": self._seconds(),
                "attempts": self._attempts,
            }
        )


_EMPTY: dict[str, Any] = dict.fromkeys(
    ("file", "engine_status", "size_bytes", "lowest_sqnr_db", "lowest_cosine", "latency_p50_ms",
     "milliseconds_per_sample", "measured_on", "bundle", "manifest_sha256")
)  # fmt: skip


def run_to_end(task: Task) -> str:
    """Make one combination on this node of a cluster and wait for it; gives its row as JSON.

    What keeps it from being made is in the row, but for the loss of this process.
    """
    try:
        if task.version != gpuopt.__version__:
            raise RequirementError(
                f"the worker has gpuopt {gpuopt.__version__}, the sweep was begun by {task.version}",
                "Install the same version everywhere.",
            )
        running = Running(task, this_node())
        try:
            while (row := running.finished()) is None:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        except BaseException:
            running.stop()
            raise
    except GpuoptError as error:
        row = failed_row(task, error, 0.0, 1)
    return row.model_dump_json()


def failed_row(task: Task, error: GpuoptError, seconds: float, attempts: int) -> Row:
    """The row of a combination that came to nothing."""
    failure = Failure(kind=error.kind, exit_code=error.exit_code, message=error.message, hint=error.hint, stage=None)
    return Row.model_validate(
        {
            **_EMPTY,
            **task.about,
            "key": task.key,
            "status": "failed",
            "error": failure,
            "reused": False,
            "seconds": seconds,
            "attempts": attempts,
        }
    )


def resident_bytes(process: int) -> int:
    """What a process and all that it started have in memory; shared pages count for each."""
    total, waiting = 0, [process]
    while waiting:
        number = waiting.pop()
        try:
            total += int(Path(f"/proc/{number}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
            for thread in Path(f"/proc/{number}/task").iterdir():
                waiting += map(int, (thread / "children").read_text().split())
        except (OSError, IndexError, ValueError):
            continue
    return total


def _begun(store: Store, task: Task) -> int:
    """Count this attempt: a worker that is lost cannot tell."""
    count = attempts(store, task) + 1
    store.write(_attempts_file(task), json.dumps({"run": task.run, "count": count}).encode())
    return count


def attempts(store: Store, task: Task) -> int:
    """How often a task was begun in its sweep.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        before = json.loads(store.read(_attempts_file(task)) or b"{}")
        return int(before["count"]) if before.get("run") == task.run else 0
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0


def _attempts_file(task: Task) -> str:
    return f"rows/{task.name}.begun"


def _report(said: bytes) -> Report | None:
    try:
        return Report.model_validate_json(said)
    except ValidationError:
        return None


def _failure(said: bytes, code: int, complained: Path) -> Failure:
    """What a run that made no report says of its end."""
    try:
        return Failure.model_validate(json.loads(said)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        with complained.open("rb") as stream:
            words = one_line(stream.read(4096).decode(errors="replace"))
        problem = defect(RuntimeError(words or f"exit code {code}"), "gpuopt compile gave no answer: ")
        return Failure(kind=problem.kind, exit_code=1, message=problem.message, hint=problem.hint, stage=None)


def _die_with_the_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
