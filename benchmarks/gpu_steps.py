"""What gpu.py and layout.py share: steps that start gpuopt, keep its log, and begin nothing after a time."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

LEGACY_SOURCES = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
"""Of TensorRT 8.5: those that need no cuBLAS and cuDNN, which newer machines do not have in its versions."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Limit:
    """A time after which nothing new begins, for a machine that is lent until a certain minute.

    Attributes:
        seconds: from now on; None is no limit.
    """

    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    def reached(self) -> bool:
        return self.seconds is not None and time.monotonic() - self.started > self.seconds


def run(command: Sequence[str | Path], log: Path) -> str:
    """Run to the end; its stdout, also where it failed: gpuopt's JSON tells why."""
    # An empty part would stand for the current folder.
    path = os.pathsep.join(filter(None, (str(ROOT), str(HERE / "peers"), os.environ.get("PYTHONPATH"))))
    started = time.monotonic()
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(" ".join(map(str, command)) + "\n" + done.stderr + done.stdout)
    last = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    say(f"{log.parent.name}/{log.stem}: {time.monotonic() - started:.0f} s, code {done.returncode} {' '.join(last)}")
    return done.stdout


def legacy_flags(legacy: bool) -> tuple[str, ...]:
    """What `gpuopt compile` needs for a bundle whose engine TensorRT 8.5 or 8.6 will build, or a newer one."""
    return ("--opset", "17", "--set", "build.legacy=true") if legacy else ()


def has_tensorrt_8() -> bool:
    from gpuopt import environment

    found = environment.tensorrt_version()
    return found is not None and found[0] == 8


def gpu_name() -> str:
    """As the driver tells it; empty without one."""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def gpuopt(*arguments: str | Path) -> list[str | Path]:
    """The command line of this Python's gpuopt."""
    return [sys.executable, "-m", "gpuopt", *arguments]


def together(jobs: int, limit: Limit, steps: Sequence[Callable[[], object]]) -> None:
    """Run the steps side by side, first come first served; none begins after the limit."""

    def one(step: Callable[[], object]) -> None:
        if not limit.reached():
            step()

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(one, step) for step in steps]:
            future.result()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
