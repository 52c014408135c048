"""What the runner hands to a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpuopt.artifact import Artifact
from gpuopt.errors import GpuoptError
from gpuopt.progress import Progress
from gpuopt.recipe import Recipe

if TYPE_CHECKING:
    from gpuopt.engine_record import Trust


@dataclass(frozen=True)
class StageContext:
    """Everything a stage may look at.

    Attributes:
        recipe: holds the sections that the stage declares; the others are at their defaults.
        data: the calibration data, or for a stage that evaluates the evaluation data; None if there is none.
        artifacts: what earlier stages made, by kind: exactly the kinds the stage declares.
        output: an empty folder; a stage writes each artifact into `made(kind)`.
        samples: how many samples of `data` to read at most; None: all.
        target: the backend an engine is for; empty outside `build`.
        progress: the listener.
        cache_folder: where a stage may keep files for later runs, of a form of its own; None: nowhere.
        deadline: when the command's time is up, by `time.monotonic`; None: never.
        journal: where a long stage may note what it has finished; None where that cannot be found again.
    """

    recipe: Recipe
    artifacts: Mapping[str, Artifact]
    output: Path
    progress: Progress
    data: str | None = None
    samples: int | None = None
    target: str = ""
    journal: Path | None = None
    cache_folder: Path | None = None
    deadline: float | None = None

    def folder(self, kind: str) -> Path:
        """Where an earlier stage's artifact lies."""
        if kind not in self.artifacts:
            raise GpuoptError(f"the stage did not declare that it needs '{kind}'")
        return self.artifacts[kind].path

    def engine_graph(self) -> Path:
        """The folder of the ONNX graph that engines are built from."""
        return self.folder("engine_onnx" if "engine_onnx" in self.artifacts else "onnx")

    @property
    def trust(self) -> Trust:
        """The code from elsewhere that the recipe lets engines run."""
        from gpuopt.engine_record import Trust

        build = self.recipe.build
        return Trust([Path(name) for name in build.plugins], build.version_compatible)

    def made(self, kind: str) -> Path:
        """A new folder for an artifact of this kind."""
        folder = self.output / kind
        folder.mkdir()
        return folder
