"""Turns on a GPU. The lock is real, in real processes; the GPU's address is all that has to be made up here."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from gpuopt import environment, time_limit
from gpuopt.errors import TimeLimitError
from gpuopt.gpu_turn import gpu_turn
from gpuopt.progress import Silent


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("GPUOPT_CACHE_DIR", str(tmp_path / "of this job"))
    monkeypatch.setattr(environment, "pci_bus_address", lambda index=0: f"0000:0{index + 1}:00.0")
    return tmp_path / "gpuopt"


def _hold(started: Any, seconds: float) -> None:
    with gpu_turn(Silent()):
        started.set()
        time.sleep(seconds)


def test_the_second_waits_for_the_first_and_says_so(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    first = context.Process(target=_hold, args=(started, 0.3))
    first.start()
    started.wait(10)
    heard = Heard()
    with gpu_turn(heard, 1) as waited:
        assert waited < 0.2, "another GPU is free"
    assert heard.lines == []
    with gpu_turn(heard) as waited:
        assert waited > 0.1
    assert heard.lines == ["another gpuopt is at work on this GPU: waiting for it"]
    first.join()
    assert sorted(path.name for path in folder.iterdir()) == ["gpu-0000-01-00.0.lock", "gpu-0000-02-00.0.lock"]


def test_a_killed_process_keeps_nobody_waiting(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    first = context.Process(target=_hold, args=(started, 600))
    first.start()
    started.wait(10)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    with gpu_turn(Silent()) as waited:
        assert waited < 5


def test_nobody_waits_without_a_gpu_or_a_place_for_the_lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("a file where the folder would be")
    (folder.parent / "of this job").write_text("another")
    with gpu_turn(Silent()) as waited:
        assert waited == 0
    folder.unlink()
    monkeypatch.setattr(environment, "pci_bus_address", lambda index=0: "")
    with gpu_turn(Silent()) as waited:
        assert waited == 0
    assert not folder.exists()


def test_without_a_home_the_lock_lies_in_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    with gpu_turn(Silent()):
        pass
    assert [path.name for path in (folder.parent / "of this job").iterdir()] == ["gpu-0000-01-00.0.lock"]
    monkeypatch.delenv("GPUOPT_CACHE_DIR")
    with gpu_turn(Silent()) as waited:
        assert waited == 0


def test_the_time_limit_ends_the_waiting(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    first = context.Process(target=_hold, args=(started, 600))
    first.start()
    started.wait(10)
    before = time.monotonic()
    with pytest.raises(TimeLimitError), time_limit.within(0.2), gpu_turn(Silent()):
        pass
    assert time.monotonic() - before < 5
    first.kill()
    first.join()
