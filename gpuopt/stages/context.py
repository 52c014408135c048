"""What the runner hands to a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpuopt.artifact import Artifact
from gpuopt.errors import GpuoptError
from gpuopt.progress import Progress
from gpuopt.recipe import Recipe


@dataclass(frozen=True)
class StageContext:
    """Everything a stage may look at.

    Attributes:
        recipe: holds the sections that the stage declares; the others are at their defaults.
        data: the calibration data as resolved by the runner; None if there is none.
        artifacts: what earlier stages made, by kind: exactly the kinds the stage declares.
        output: an empty folder; a stage writes each artifact into `made(kind)`.
        target: the backend an engine is for; empty outside `build`.
        progress: the listener.
    """

    recipe: Recipe
    artifacts: Mapping[str, Artifact]
    output: Path
    progress: Progress
    data: str | None = None
    target: str = ""

    def folder(self, kind: str) -> Path:
        """Where an earlier stage's artifact lies."""
        if kind not in self.artifacts:
            raise GpuoptError(f"the stage did not declare that it needs '{kind}'")
        return self.artifacts[kind].path

    def engine_graph(self) -> Path:
        """The folder of the ONNX graph that engines are built from."""
        return self.folder("engine_onnx" if "engine_onnx" in self.artifacts else "onnx")

    def made(self, kind: str) -> Path:
        """A new folder for an artifact of this kind."""
        folder = self.output / kind
        folder.mkdir()
        return folder
