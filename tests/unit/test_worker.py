"""The worker: real stages in a real process that crash, lie, print and fail; the run goes on."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpuopt import errors, recipe
from gpuopt.artifact import Artifact
from gpuopt.errors import BuildError, GpuoptError, RequirementError, StorageError
from gpuopt.progress import Silent
from gpuopt.stages.context import StageContext
from gpuopt.user_code import Dependencies
from gpuopt.worker import Worker

# Python runs `sitecustomize` at its start, so that the worker, which knows nothing of tests, finds this stage.
SITE = """
import sys
if sys.argv[0] == "-c":
    import gpuopt.stages
    gpuopt.stages.__path__.append({folder!r})
"""

STAGE = """
import ctypes, os, signal, subprocess, sys, time
from gpuopt import errors
from gpuopt.artifact import StageOutcome
from gpuopt.user_code import Dependencies

def run(context):
    action, _, text = (context.data or "").partition(":")
    return globals()[action](context, text)

def answer(context, text):
    facts = {"pid": os.getpid(), "recipe": context.recipe.precision, "target": context.target, "text": text}
    return StageOutcome(facts, ("a warning",), Dependencies(("file.py",)))

def write(context, text):
    (context.made("onnx") / "file").write_text(context.folder("samples").name)
    return StageOutcome()

def talk(context, text):
    print("on stdout")
    os.write(1, b"on descriptor 1")
    subprocess.run(["echo", "from a child"])
    context.progress.advance(1, 2)
    context.progress.line("a line")
    context.progress.warn("a warning")
    with context.progress.stage("inner"):
        pass
    print("on stderr", file=sys.stderr)
    return StageOutcome()

def kill(context, text):
    os.kill(os.getpid(), getattr(signal, text))
    time.sleep(10)

def overrun(context, text):
    ctypes.string_at(0)

def leave(context, text):
    os._exit(int(text))

def fail(context, text):
    name, message, hint = text.split("|")
    raise getattr(errors, name)(message, hint)

def break_down(context, text):
    raise eval(text)

def unsendable(context, text):
    return StageOutcome({"x": lambda: None})

def hang(context, text):
    context.progress.line("hanging")
    time.sleep(60)
"""


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    (folder / "stages").mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(SITE.format(folder=str(folder / "stages")))
    (folder / "stages" / "trial.py").write_text(STAGE)
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), root]))
    return folder


class Listener(Silent):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def advance(self, done: int, total: int | None) -> None:
        self.heard.append(("advance", done, total))

    def line(self, text: str) -> None:
        self.heard.append(("line", text))

    def warn(self, text: str) -> None:
        self.heard.append(("warn", text))


def context(data: str, tmp_path: Path, target: str = "", progress: Any = None) -> StageContext:
    output = tmp_path / "output"
    output.mkdir(exist_ok=True)
    return StageContext(
        recipe=recipe.resolve({"model": {"path": "m.pt"}, "precision": "fp16"}),
        artifacts={"samples": Artifact("samples", tmp_path / "stored", "0")},
        output=output,
        progress=progress or Silent(),
        data=data,
        target=target,
    )


@pytest.fixture
def worker(stages: Path) -> Iterator[Worker]:
    with Worker() as worker:
        yield worker


def ask(worker: Worker, tmp_path: Path) -> dict[str, Any]:
    outcome, seconds = worker.run("trial", context("answer:x", tmp_path))
    assert seconds >= 0
    return dict(outcome.facts)


def test_a_stage_runs_in_one_other_process_and_answers(worker: Worker, tmp_path: Path) -> None:
    outcome, _ = worker.run("trial", context("answer:hello", tmp_path, "tensorrt"))
    assert outcome.facts == {"pid": outcome.facts["pid"], "recipe": "fp16", "target": "tensorrt", "text": "hello"}
    assert (outcome.warnings, outcome.dependencies) == (("a warning",), Dependencies(("file.py",)))
    assert outcome.facts["pid"] != os.getpid()
    assert ask(worker, tmp_path)["pid"] == outcome.facts["pid"], "libraries are to be imported once"


def test_a_stage_writes_artifacts(worker: Worker, tmp_path: Path) -> None:
    worker.run("trial", context("write:", tmp_path))
    assert (tmp_path / "output" / "onnx" / "file").read_text() == "stored"


def test_prints_stay_off_our_stdout_and_progress_comes_through(
    worker: Worker, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    listener = Listener()
    worker.run("trial", context("talk:", tmp_path, progress=listener))
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "", "what libraries write is kept for --debug"
    assert listener.heard == [("advance", 1, 2), ("line", "a line"), ("warn", "a warning")]


@pytest.mark.parametrize(
    ("data", "cause"),
    [("kill:SIGSEGV", "SIGSEGV"), ("kill:SIGABRT", "SIGABRT"), ("overrun:", "SIGSEGV"), ("leave:3", "exit code 3")],
)
def test_a_crash_is_a_build_error_and_the_worker_works_again(
    worker: Worker, tmp_path: Path, data: str, cause: str
) -> None:
    before = ask(worker, tmp_path)["pid"]
    with pytest.raises(BuildError) as caught:
        worker.run("trial", context(data, tmp_path, "tensorrt-rtx"))
    assert caught.value.message == f"a library crashed in the trial stage for tensorrt-rtx ({cause})"
    assert ask(worker, tmp_path)["pid"] != before


def test_a_kill_is_told_as_lack_of_memory_and_the_worker_works_again(worker: Worker, tmp_path: Path) -> None:
    with pytest.raises(RequirementError, match="the trial stage was killed, as the system does when memory runs out"):
        worker.run("trial", context("kill:SIGKILL", tmp_path))
    assert ask(worker, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_died_while_idle_is_started_again(worker: Worker, tmp_path: Path, number: int) -> None:
    process = ask(worker, tmp_path)["pid"]
    os.kill(process, number)
    assert worker._process is not None
    worker._process.wait(10)
    assert ask(worker, tmp_path)["pid"] != process


@pytest.mark.parametrize("kind", [kind for kind in errors.KINDS if kind is not GpuoptError])
def test_our_errors_keep_kind_message_and_hint(worker: Worker, tmp_path: Path, kind: type[GpuoptError]) -> None:
    with pytest.raises(kind) as caught:
        worker.run("trial", context(f"fail:{kind.__name__}|what happened|what to do", tmp_path))
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.hint) == ("what happened", "what to do")
    assert "raise getattr(errors, name)" in caught.value.details
    assert ask(worker, tmp_path)


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        ("MemoryError()", RequirementError, "trial ran out of memory"),
        ("OSError(28, 'No space left on device')", StorageError, "No space left on device"),
        ("PermissionError(13, 'Permission denied', '/x')", StorageError, "Permission denied: '/x'"),
        ("ModuleNotFoundError('m', name='onnxslim.core')", RequirementError, "the Python package 'onnxslim'"),
        ("ValueError('two\\nlines')", GpuoptError, "trial: ValueError: two lines"),
        ("RuntimeError('x' * 5000)", GpuoptError, "trial: RuntimeError: xxx"),
    ],
)
def test_other_errors_are_told_by_what_they_mean(
    worker: Worker, tmp_path: Path, raised: str, kind: type[GpuoptError], said: str
) -> None:
    with pytest.raises(kind) as caught:
        worker.run("trial", context(f"break_down:{raised}", tmp_path))
    assert type(caught.value) is kind
    assert said in caught.value.message
    assert len(caught.value.message) < 400
    assert "\n" not in caught.value.message
    assert "Traceback" in caught.value.details


def test_a_missing_package_comes_with_its_command(worker: Worker, tmp_path: Path) -> None:
    with pytest.raises(RequirementError) as caught:
        worker.run("trial", context("break_down:ModuleNotFoundError('m', name='PIL')", tmp_path))
    assert caught.value.hint == "Install it: pip install pillow."


def test_a_stage_that_is_not_there_is_refused(worker: Worker, tmp_path: Path) -> None:
    with pytest.raises(GpuoptError):
        worker.run("no_such_stage", context("answer:", tmp_path))
    assert ask(worker, tmp_path)


def test_an_outcome_that_cannot_be_sent_does_not_hang(worker: Worker, tmp_path: Path) -> None:
    with pytest.raises(GpuoptError):
        worker.run("trial", context("unsendable:", tmp_path))
    assert ask(worker, tmp_path)


def test_stopping_ends_the_process(stages: Path, tmp_path: Path) -> None:
    with Worker() as worker:
        process = ask(worker, tmp_path)["pid"]
        assert Path(f"/proc/{process}").exists()
    assert not Path(f"/proc/{process}").exists()
    worker.stop()


class Interrupting(Listener):
    def line(self, text: str) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_run_leaves_no_process(stages: Path, tmp_path: Path) -> None:
    process = 0

    @contextmanager
    def held() -> Iterator[Worker]:
        nonlocal process
        with Worker() as worker:
            process = ask(worker, tmp_path)["pid"]
            yield worker

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), held() as worker:
        worker.run("trial", context("hang:", tmp_path, progress=Interrupting()))
    assert time.monotonic() - started < 30
    assert not Path(f"/proc/{process}").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
def test_the_worker_dies_with_its_parent(stages: Path, tmp_path: Path) -> None:
    import subprocess

    script = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from tests.unit.test_worker import Worker, ask\n"
        "worker = Worker(); print(ask(worker, Path(sys.argv[1]))['pid'], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(stages)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(stages), str(root)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    process = Path(f"/proc/{parent.stdout.strip()}/stat")
    deadline = time.monotonic() + 10
    # Where nobody waits for orphans the dead process stays as a zombie (state Z).
    while process.exists() and ") Z " not in process.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not process.exists() or ") Z " in process.read_text()
