"""Engines or graphs of several precisions, timed in turn. Not a step of the pipeline: `precision.py` asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gpuopt import reference
from gpuopt.artifact import ONNX_FILE, StageOutcome
from gpuopt.bench.measuring import Race, Subject, race
from gpuopt.bench.subjects import SessionSubject
from gpuopt.gpu_turn import gpu_turn
from gpuopt.progress import Progress
from gpuopt.reference import Reference
from gpuopt.shapes import format_shape, tuned_shapes
from gpuopt.stages.context import StageContext

SUBJECT = "subject "
"""Artifacts of this kind and a name run in the race under that name."""


def run(context: StageContext) -> StageOutcome:
    """Time every subject at the first profile's optimum.

    Returns facts: `target`, `shapes`, `includes`; `milliseconds` by name (median of the rounds, one inference);
    `rounds` by name; `loads` that they belong to.
    """
    stored = reference.load(context.folder("reference"))
    folders = {k.removeprefix(SUBJECT): a.path for k, a in context.artifacts.items() if k.startswith(SUBJECT)}
    seconds = context.recipe.speed.seconds
    if context.target == "onnxruntime":
        found, includes = _race_sessions(folders, stored, seconds, context.progress)
    else:
        found, includes = _race_engines(folders, stored, context)
    shapes = {name: format_shape(shape) for name, shape in tuned_shapes(stored.profiles).items()}
    return StageOutcome(
        {
            "target": context.target,
            "shapes": shapes,
            "includes": includes,
            "milliseconds": dict(found.milliseconds),
            "rounds": {name: list(times) for name, times in found.rounds.items()},
            "loads": found.loads,
        }
    )


def _race_engines(folders: Mapping[str, Path], stored: Reference, context: StageContext) -> tuple[Race, str]:
    from gpuopt.bench.engine_race import Racing, race_engines
    from gpuopt.cuda.device import Device
    from gpuopt.environment import has_module

    graphs = has_module("cuda.bindings")
    racing = Racing(
        {name: next(f for f in sorted(folder.iterdir()) if f.suffix == ".engine") for name, folder in folders.items()},
        tuned_shapes(stored.profiles),
        context.trust,
        graphs,
        context.recipe.speed.seconds,
    )
    with gpu_turn(context.progress), Device() as device:
        found = race_engines(racing, device, context.progress.advance)
    how = "as a CUDA graph" if graphs else "without CUDA graphs"
    loads = "loaded once" if found.loads == 1 else f"loaded {found.loads} times"
    return (
        found,
        f"compute alone, {how}: inputs and outputs stay on the GPU, the next inference waits enqueued; {loads}",
    )


def _race_sessions(
    folders: Mapping[str, Path], stored: Reference, seconds: float, progress: Progress
) -> tuple[Race, str]:
    shapes = tuned_shapes(stored.profiles)
    corner = next(c for c in stored.corners if dict(c.shapes) == shapes)
    feed = stored.feed(corner)
    subjects: dict[str, Subject] = {name: SessionSubject(f / ONNX_FILE, feed) for name, f in folders.items()}
    return race(subjects, seconds, tell=progress.advance), "a whole call of ONNX Runtime on the CPU"
