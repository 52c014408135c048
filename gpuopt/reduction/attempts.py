"""Trying a graph on the stage that failed, in another process, and telling whether it failed in the same way."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpuopt.artifact import ONNX_FILE, Artifact
from gpuopt.cache import Cache
from gpuopt.errors import AccuracyError, GpuoptError, ReductionError, TimeLimitError, UsageError
from gpuopt.pipeline import Runner
from gpuopt.progress import Silent
from gpuopt.recipe import Recipe, resolve
from gpuopt.reduction.files import VALUES_FILE, write_profile
from gpuopt.shapes import Profile, format_shape
from gpuopt.stages.context import StageContext
from gpuopt.worker import Worker

if TYPE_CHECKING:
    from gpuopt.reduction.subgraph import Piece

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|\([^()]*\)|\{[^{}]*\}|\[[^\[\]]*\]")
_MOST_CHARACTERS = 200
_SECONDS_BETWEEN_KILLS = 0.1

BY_PIPELINE = ("simplify", "equalize", "calibrate", "choose", "quantize", "correct", "cast", "verify")
"""Stages that are tried by running the pipeline up to them, on random data."""


@dataclass(frozen=True)
class Check:
    """What a graph is tried on.

    Attributes:
        stage: `build` (of `target`), `run` (in ONNX Runtime), `difference`, or one of `BY_PIPELINE`.
        recipe: the settings; its model, data and inputs play no part.
        target: the backend of `build`.
    """

    stage: str
    recipe: Recipe
    target: str = ""


def signature(error: GpuoptError) -> str:
    """What of a failure has to come again: its kind and its words, without names, numbers and shapes."""
    if isinstance(error, AccuracyError):
        return error.kind
    text = error.message.partition(" (tried in vain")[0]
    for _ in range(3):
        text = _QUOTED.sub("", text)
    words = re.sub(r"(?<![A-Za-z])\d[\w.:]*|\b[\w/.]*[/_.]\w*\d\w*\b", "N", text)
    return f"{error.kind}: {' '.join(words.split())[:_MOST_CHARACTERS]}"


def out_of_time() -> ReductionError:
    """The error of a graph whose only try did not come to an end."""
    return ReductionError("the time ran out before the whole graph was tried", "Give it more: --seconds 600.")


class Attempts:
    """Tries graphs, each in a process that is not this one, within a time.

    One process serves until it dies, as a crash of a library is a failure like others; `again` takes a new one.

    Args:
        seconds: for all tries; `is_over` is True from then on, and the try at work is ended.

    Attributes:
        tries: how many there were.
        scratch: a folder that is gone at the end.
    """

    def __init__(self, check: Check, seconds: float) -> None:
        self.check = check
        self.tries = 0
        self._deadline = time.monotonic() + seconds
        self._worker = Worker()
        self._scratch = tempfile.TemporaryDirectory(prefix="gpuopt-reduce-")
        self.scratch = Path(self._scratch.name)

    def __enter__(self) -> Attempts:
        return self

    def __exit__(self, *exception: object) -> None:
        self._worker.stop()
        self._scratch.cleanup()

    def is_over(self) -> bool:
        """Whether the time has run out."""
        return time.monotonic() >= self._deadline

    def grant(self, seconds: float) -> None:
        """Let what comes have so much time, whatever is left."""
        self._deadline = time.monotonic() + seconds

    def again(self) -> None:
        """Let the next try have a new process."""
        self._worker.stop()

    def error_of(self, piece: Piece, beside: dict[str, Path] | None = None) -> GpuoptError | None:
        """How a graph fails; None if it does not, or the time ran out.

        Args:
            beside: files that lie beside this graph, by name.
        """
        from gpuopt import onnx_model

        self.tries += 1
        with tempfile.TemporaryDirectory(prefix="gpuopt-reduce-") as scratch:
            folder = Path(scratch) / "onnx"
            onnx_model.save(piece.model, folder)
            write_profile(piece.profile, folder)
            for name, path in (beside or {}).items():
                (folder / name).symlink_to(path.absolute())
            try:
                if self.check.stage in BY_PIPELINE:
                    return self._by_pipeline(folder, piece.profile)
                return self._in_worker(folder, Path(scratch) / "made", self.check)
            except UsageError:
                return None

    def record(self, piece: Piece, check: Check, destination: Path) -> Path:
        """Run a graph on random inputs and store the value of every tensor.

        Raises:
            ReductionError: the time ran out.
            GpuoptError: it does not run.
        """
        from gpuopt import onnx_model

        with tempfile.TemporaryDirectory(prefix="gpuopt-reduce-") as scratch:
            folder = Path(scratch) / "onnx"
            onnx_model.save(piece.model, folder)
            write_profile(piece.profile, folder)
            if (error := self._in_worker(folder, Path(scratch) / "made", check)) is not None:
                raise error
            if not (folder / VALUES_FILE).is_file():
                raise out_of_time()
            shutil.copyfile(folder / VALUES_FILE, destination)
        return destination

    def _in_worker(self, folder: Path, made: Path, check: Check) -> GpuoptError | None:
        target = {"build": check.target, "run": "onnxruntime"}.get(check.stage, check.stage)
        made.mkdir()
        context = StageContext(
            recipe=check.recipe,
            artifacts={"onnx": Artifact("onnx", folder, "")},
            output=made,
            progress=Silent(),
            target=target,
        )
        try:
            with self._ended_by(self._worker.kill):
                self._worker.run("attempt", context)
            return None
        except TimeLimitError:
            raise
        except GpuoptError as error:
            return None if self.is_over() else error

    def _by_pipeline(self, folder: Path, profile: Profile) -> GpuoptError | None:
        recipe = recipe_for(self.check.recipe, folder / ONNX_FILE, profile)
        runner = Runner(recipe, Cache(folder.parent / "cache"), Silent(), "reduce")
        try:
            with self._ended_by(runner.kill):
                runner.run(until=self.check.stage)
            return None
        except TimeLimitError:
            raise
        except GpuoptError as error:
            here = runner.at_work is not None and runner.at_work.stage.name == self.check.stage
            return error if here and not self.is_over() else None

    @contextlib.contextmanager
    def _ended_by(self, kill: Callable[[], None]) -> Iterator[None]:
        """Have a thread call `kill` when the time is up, until what runs meanwhile has ended."""
        ended = threading.Event()

        def watch() -> None:
            wait = max(0.1, self._deadline - time.monotonic())
            # Again and again: between two stages there may be no process that could be killed.
            while not ended.wait(wait):
                kill()
                wait = _SECONDS_BETWEEN_KILLS

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def recipe_for(recipe: Recipe, graph: Path, profile: Profile) -> Recipe:
    """The recipe for another graph: its shapes, random data, and nothing that is the user's."""
    tree = recipe.model_dump(mode="json")
    tree["model"] = {"path": str(graph)}
    tree["inputs"] = {
        name: {part: format_shape(getattr(sizes, part)) for part in ("min", "opt", "max")}
        for name, sizes in profile.items()
    }
    tree["profiles"] = []
    tree["calibrate"] |= {"data": None, "ranges": None, "random": True, "samples": 2, "images": None}
    tree["accuracy"] = {}
    tree["gates"] = {}
    tree["build"] |= {"plugins": [], "timing_cache": None, "require_timing_cache": False, "io_formats": {}}
    # The graph is as it was exported: a change of its inputs has been made, or is not what failed.
    tree["layout"] = {}
    tree["output"] = {}
    return resolve(tree)
