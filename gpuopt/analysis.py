"""`gpuopt analyze` without its command line: a recipe in, the cost of every node in INT8 out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpuopt.cache import Cache
from gpuopt.compile import with_defaults
from gpuopt.pipeline import Runner, check_own_quantizer, check_request
from gpuopt.progress import Progress
from gpuopt.recipe import AccuracySection, Recipe, resolve
from gpuopt.report import sensitivity as rendering
from gpuopt.storage import storage_errors, write_json, write_text

_SENSITIVITY_FILE = "sensitivity.json"


@dataclass(frozen=True)
class Analysis:
    """The document of `--json`: `model`, `warnings` and, under `sensitivity`, what the analyze stage measured."""

    document: dict[str, Any]


def analyze_model(recipe: Recipe, cache: Cache, progress: Progress) -> Analysis:
    """Export, calibrate, and quantize every node alone; what an interrupted run had finished is not done again.

    Raises:
        GpuoptError: of the stage that failed.
    """
    check_own_quantizer(recipe, "gpuopt analyze")
    tree = recipe.model_dump(mode="json")
    tree["precision"] = "int8"
    tree["build"]["target"] = ["onnxruntime"]
    tree["analyze"]["enabled"] = True
    tree["accuracy"] = AccuracySection(data=recipe.accuracy.data).model_dump(mode="json")
    chosen = with_defaults(resolve(tree))
    check_request(chosen)
    model = chosen.model.path or chosen.model.factory
    runner = Runner(chosen, cache, progress, f"analyze {model}")
    runner.run(until="analyze")
    artifact = runner.artifact("sensitivity")
    if artifact is None:
        raise AssertionError("the analyze stage makes it where no budget is asked for")
    with storage_errors("read", artifact.path):
        found = json.loads((artifact.path / _SENSITIVITY_FILE).read_text())
    warnings = [warning for result in runner.results for warning in result.entry.warnings]
    return Analysis(
        {"schema_version": 1, "status": "passed", "model": model, "warnings": warnings, "sensitivity": found}
    )


def write(analysis: Analysis, folder: Path | None, plot: Path | None) -> None:
    """Write `sensitivity.json` and `sensitivity.txt` into the folder, and the plot.

    Raises:
        StorageError: a file cannot be written.
    """
    found = analysis.document["sensitivity"]
    if folder is not None:
        write_json(folder / "sensitivity.json", analysis.document)
        write_text(folder / "sensitivity.txt", rendering.render(found) + "\n")
    if plot is not None:
        from gpuopt.report import plot as plotting

        plotting.save(found, plot)
