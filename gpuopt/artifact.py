"""What passes between the stages: files with a kind and a hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpuopt.storage import list_files, sha256_file, sha256_json
from gpuopt.user_code import Dependencies

ONNX_FILE = "model.onnx"
"""Every ONNX artifact is a folder with this file, and its external data beside it if it has any."""

ENGINE_ONNX_FILE = "engine.onnx"
"""Its name in a bundle, where the engines are built from another graph than ONNX Runtime gets."""


@dataclass(frozen=True)
class Artifact:
    """A folder of files that a stage made.

    Attributes:
        kind: what it is, by name: `samples`, `onnx`, `float_onnx`, `engine_onnx`, `reference`, `ranges`,
            `placement`, `engine`, `verification`. `onnx` is what ONNX Runtime gets; engines are built from
            `engine_onnx` where there is one, which is in INT8. They differ in the weights (INT8 numbers
            for ONNX Runtime; floating point, Q and DQ for TensorRT's builder to fold) and in the
            remainder: FP16 for TensorRT, FP32 for ONNX Runtime, which would round the biases to a grid
            that FP16 cannot hold and runs FP16 slowly on a CPU. `float_onnx` is the FP32 graph that INT8
            was made from.
        path: the folder.
        sha256: hash over the relative paths and contents of its files.
    """

    kind: str
    path: Path
    sha256: str


@dataclass(frozen=True)
class StageOutcome:
    """What a stage says beside the files it wrote.

    Attributes:
        facts: for the report; JSON values only.
        warnings: one line each, for the report and the terminal.
        dependencies: of the user's own code, on which the result depends; None if the stage ran none.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    dependencies: Dependencies | None = None


def folder_hashes(folder: Path) -> dict[str, str]:
    """Relative path to SHA-256 of every file below `folder`."""
    return {str(path.relative_to(folder)): sha256_file(path) for path in list_files(folder)}


def folder_sha256(folder: Path) -> str:
    """One hash over all files below `folder`."""
    return sha256_json(folder_hashes(folder))
