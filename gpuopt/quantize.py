"""`gpuopt quantize` without its command line: a recipe in, a folder of ONNX with Q/DQ and the reasons out.

model.onnx                for ONNX Runtime, INT8 weights
engine.onnx               for TensorRT's builder, Q/DQ and FP16; not with qoperator
calibration.ranges.json   the ranges; not for a model that held Q/DQ already
quantize.json             what was decided on every node, and why
manifest.json             SHA-256 of every file above
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpuopt
from gpuopt import bundle
from gpuopt.artifact import ENGINE_ONNX_FILE, ONNX_FILE
from gpuopt.cache import Cache
from gpuopt.compile import with_defaults
from gpuopt.errors import UsageError
from gpuopt.pipeline import Runner, check_own_quantizer, check_request, model_sha256
from gpuopt.progress import Progress
from gpuopt.recipe import Recipe, resolve

DOCUMENT_FILE = "quantize.json"


@dataclass(frozen=True)
class QuantizedModel:
    """A finished run: the folder, and the document in it."""

    folder: Path
    document: dict[str, Any]


def output_folder(recipe: Recipe) -> Path:
    """Where the result goes by default: `<model>.quantized` beside the model."""
    if recipe.model.path:
        path = Path(recipe.model.path)
        return path.with_name(f"{path.stem}.quantized")
    return Path(f"{(recipe.model.factory or 'model').rpartition(':')[2]}.quantized")


def quantize_model(
    recipe: Recipe, output: Path | None, cache: Cache, progress: Progress, command: Sequence[str]
) -> QuantizedModel:
    """Run the pipeline up to Q/DQ and FP16 and write the folder; no engine is built, TensorRT need not be there.

    Args:
        recipe: as the user wrote it; its `output.directory` is a bundle's and plays no part.
        output: the folder; None: `output_folder`.
        command: the command line, for the document.

    Raises:
        UsageError: the recipe is not for INT8 or not for gpuopt's quantizer, or the folder holds other files.
        GpuoptError: of the stage that failed; nothing is written.
    """
    if recipe.precision != "int8":
        raise UsageError(
            f"the recipe says precision {recipe.precision}, and 'gpuopt quantize' makes INT8",
            "Give --set precision=int8, or use 'gpuopt compile'.",
        )
    check_own_quantizer(recipe, "gpuopt quantize")
    destination = (output or output_folder(recipe)).absolute()
    tree = recipe.model_dump(mode="json")
    tree["output"]["directory"] = str(destination)
    if not recipe.build.target:
        # The graph for engines is asked for, whether or not this machine could build one.
        tree["build"]["target"] = ["onnxruntime"] if recipe.quantize.format == "qoperator" else ["tensorrt-rtx"]
    chosen = with_defaults(resolve(tree))
    check_request(chosen, builds=False)
    bundle.check_destination(destination)
    runner = Runner(chosen, cache, progress, str(destination))
    runner.run(until="cast")
    files = _files(runner)
    document = _document(chosen, runner, sorted([*files, DOCUMENT_FILE]), command)
    about = {key: document[key] for key in ("gpuopt_version", "created", "command", "model")}
    bundle.write(destination, files, {DOCUMENT_FILE: json.dumps(document, indent=2) + "\n"}, about)
    return QuantizedModel(destination, document)


def _files(runner: Runner) -> dict[str, Path]:
    files: dict[str, Path] = {}
    graph, engine, ranges = (runner.artifact(kind) for kind in ("onnx", "engine_onnx", "ranges"))
    if graph:
        files.update({path.name: path for path in graph.path.iterdir()})
    if engine:
        files.update({ENGINE_ONNX_FILE if p.name == ONNX_FILE else p.name: p for p in engine.path.iterdir()})
    if ranges:
        files["calibration.ranges.json"] = ranges.path / "ranges.json"
    return files


def _document(recipe: Recipe, runner: Runner, files: Sequence[str], command: Sequence[str]) -> dict[str, Any]:
    facts = {result.step.stage.name: result.entry.facts for result in runner.results}
    placement = runner.artifact("placement")
    nodes = json.loads((placement.path / "placement.json").read_text()) if placement else []
    return {
        "schema_version": 1,
        "gpuopt_version": gpuopt.__version__,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "model": {
            "path": recipe.model.path,
            "factory": recipe.model.factory,
            "kind": facts["export"].get("model_kind"),
            "sha256": model_sha256(Path(recipe.model.path)) if recipe.model.path else None,
        },
        "folder": recipe.output.directory,
        "files": list(files),
        "calibration": dict(facts["calibrate"]),
        "equalization": dict(facts["equalize"]),
        "quantization": dict(facts["quantize"]),
        "bias_correction": dict(facts.get("correct", {})),
        "warnings": [warning for result in runner.results for warning in result.entry.warnings],
        "nodes": nodes,
    }
