"""A compilation that is cut off at every point, and what has to hold afterwards.

The run is `gpuopt compile` of an ONNX model to INT8 in a forked process, with its stages in that process, so that a
point may lie in a stage's own writes, too. Before it there is a bundle of an earlier, other run. After it that bundle,
or the new one, has to be whole; the next run has to pass, and give what a run that nothing happened to gives.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpuopt import bundle, cli, pipeline, precision, worker
from gpuopt.artifact import StageOutcome
from gpuopt.errors import KINDS, GpuoptError
from gpuopt.stages.context import StageContext
from gpuopt.storage import sha256_file
from tests.faults.points import Action, Points

INTERRUPTED = 130
STORAGE = 10
_KINDS = {kind.__name__: kind for kind in KINDS}


class InProcess:
    """Stands in for the worker: the same errors, in this process."""

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def run(self, stage: str, context: StageContext) -> tuple[StageOutcome, float]:
        answer = worker._answer(stage, context)
        if answer[0] == "error":
            raise _KINDS[answer[1]](answer[2], answer[3])
        return answer[1], answer[2]


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, negative for a signal, what it said, and the points that it reached."""

    code: int
    said: str
    points: list[str]


class Walk:
    """A folder with a model, data, a cache and a bundle of an earlier run, set back before each walk's step."""

    def __init__(self, folder: Path, target: str = "onnxruntime") -> None:
        """
        Args:
            folder: an empty one.
            target: what is built beside the ONNX Runtime model.
        """
        from tests.unit.quantization.graphs import depthwise_block

        self._target = target
        self._template, self._clean = folder / "template", folder / "clean"
        self.work = folder / "work"
        self._template.mkdir(parents=True)
        (self._template / "model.onnx").write_bytes(depthwise_block().SerializeToString())
        values = np.random.default_rng(0).standard_normal((40, 16, 8, 8), dtype=np.float32)
        np.savez(self._template / "calibration.npz", x=values)
        # Whatever is imported now is not imported again in each forked process.
        import gpuopt.compile
        import gpuopt.stages.verify  # noqa: F401

        # The earlier run has other settings, so that it shares no later stage with the one that is cut off.
        self.reset()
        self._passed(self.run("--calibration-method", "percentile"))
        shutil.copytree(self.work, self._clean)
        shutil.rmtree(self._template)
        self._clean.rename(self._template)
        self.old = self.manifest()
        self.reset()
        done = self._passed(self.run())
        self.points = done.points
        self.new = self.manifest()

    def reset(self) -> None:
        """Put the folder back to where the earlier run had ended."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self._template, self.work)

    def manifest(self) -> dict[str, str]:
        """Hashes of what is deployed, read from a bundle that is checked to be whole."""
        files = bundle.open_bundle(self.work / "model.gpuopt")["files"]
        return {name: digest for name, digest in files.items() if name.endswith((".onnx", ".ranges.json"))}

    def run(
        self, *flags: str, action: Action = "count", at: int = -1, change: Callable[[], None] = lambda: None
    ) -> Ended:
        """Compile in a forked process.

        Args:
            action, at: what happens at which point.
            change: called in that process before the run, to bend its world.
        """
        said, reached = self.work.parent / "said", self.work.parent / "reached"
        for file in (said, reached):
            file.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            code = 99
            try:
                code = self._compile(flags, action, at, change, said, reached)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        points = json.loads(reached.read_text()) if reached.exists() else []
        return Ended(os.waitstatus_to_exitcode(status), said.read_text() if said.exists() else "", points)

    def _compile(
        self, flags: Sequence[str], action: Action, at: int, change: Callable[[], None], said: Path, reached: Path
    ) -> int:
        os.chdir(self.work)
        os.environ["TMPDIR"] = str(self.work.parent)
        pipeline.Worker = precision.Worker = InProcess  # type: ignore[misc, assignment]
        sys.argv = ["gpuopt", "compile", "model.onnx", "-t", self._target, "--cache-dir", "cache", "-q", *flags]
        with said.open("w") as stream, contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
            change()
            points = Points(self.work, action, at)
            code = cli._run()
        reached.write_text(json.dumps(points.reached))
        return code

    def _passed(self, ended: Ended) -> Ended:
        if ended.code != 0:
            raise AssertionError(f"a run that nothing happened to ended with {ended.code}: {ended.said}")
        return ended

    def lost(self) -> str:
        """What is wrong after a run was cut off, and then with the run after it; empty if nothing is."""
        try:
            found = self.manifest()
        except GpuoptError as error:
            return f"no whole bundle: {error.message}"
        if found not in (self.old, self.new):
            return "a bundle of neither run"
        again = self.run()
        if again.code != 0:
            return f"the next run ends with {again.code}: {again.said}"
        if self.manifest() != self.new:
            return "the next run gives another result"
        left = sorted(path.name for path in self.work.iterdir())
        if left != ["cache", "calibration.npz", "model.gpuopt", "model.onnx"]:
            return f"left over: {left}"
        hidden = [path for path in self.work.rglob(".*") if path.is_file()]
        if any((self.work / "cache/scratch").iterdir()) or hidden:
            return f"left over in the cache: {[*(self.work / 'cache/scratch').iterdir(), *hidden]}"
        return ""

    def step(self, action: Action, at: int) -> str:
        """Cut a run off at a point; what is wrong then, or nothing."""
        self.reset()
        ended = self.run(action=action, at=at)
        wanted = {"kill": -9, "interrupt": INTERRUPTED, "full disk": STORAGE}[action]
        # The last changes of a run are made when its bundle is there: they do not fail it.
        if ended.code not in (wanted, 0):
            return f"exit code {ended.code}: {ended.said}"
        if action != "kill" and ("Traceback" in ended.said or len(ended.said.splitlines()) > 3):
            return f"said {ended.said}"
        return self.lost()

    def flip(self, number: int) -> str:
        """Turn a bit of the cache's file of that number around; what is wrong with the next run, or nothing."""
        self.reset()
        self._passed(self.run())
        files = sorted(path for path in (self.work / "cache").rglob("*") if path.is_file())
        path = files[number % len(files)]
        content = bytearray(path.read_bytes())
        if content:
            place = (number * 7919) % len(content)
            content[place] ^= 1 << number % 8
            path.write_bytes(bytes(content))
        shutil.rmtree(self.work / "model.gpuopt")
        shutil.copytree(self._template / "model.gpuopt", self.work / "model.gpuopt")
        return self.lost()

    def cached_files(self) -> int:
        """How many files the cache has after a run."""
        self.reset()
        self._passed(self.run())
        return len([path for path in (self.work / "cache").rglob("*") if path.is_file()])

    def with_clock(self, shifts: Iterator[float]) -> str:
        """Run under a clock that jumps by these seconds at each look, and again under the right one."""
        self.reset()
        real, struct = time.time, time.localtime

        def change() -> None:
            time.time = lambda: max(0.0, real() + next(shifts))
            time.localtime = lambda seconds=None: struct(time.time() if seconds is None else seconds)

        ended = self.run(change=change)
        if ended.code != 0:
            return f"exit code {ended.code}: {ended.said}"
        for path in self.work.rglob("*"):
            os.utime(path, (4e9, 4e9))
        return self.lost()


def sizes(folder: Path) -> dict[str, Any]:
    """Every file below a folder with its hash, to compare two states."""
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}
