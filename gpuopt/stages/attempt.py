"""One try of a reduction, in the worker: does this graph fail, or differ? No step of the pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx

from gpuopt import environment, onnx_model
from gpuopt.artifact import ONNX_FILE, StageOutcome
from gpuopt.backends.onnxruntime import Session
from gpuopt.comparison import compare
from gpuopt.errors import AccuracyError
from gpuopt.reduction.files import LIMITS_FILE, OTHER_FILE, PROFILE_FILE, VALUES_FILE, profile_from_json
from gpuopt.reduction.subgraph import random_feed
from gpuopt.shapes import ShapeRange
from gpuopt.stages.context import StageContext
from gpuopt.tolerance import Limits, problem


def run(context: StageContext) -> StageOutcome:
    """Try the graph of the artifact `onnx` on what `context.target` names.

    `tensorrt`, `tensorrt-rtx`: build an engine. `onnxruntime`: open a session and run random inputs of
    the smallest, tuned-for and largest shapes. `record`: run it, and keep the value of every tensor.
    `difference`: run it as written, then its optimized form or the other graph beside it, on values kept.

    Raises:
        BuildError, QuantizationError, RequirementError: the library's refusal.
        AccuracyError: the outputs differ.
    """
    folder = context.folder("onnx")
    tries = {"record": _record, "difference": _difference, "onnxruntime": _open_and_run}
    if context.target in tries:
        tries[context.target](folder)
    else:
        _build(context)
    return StageOutcome()


def _profile(folder: Path) -> dict[str, ShapeRange]:
    return profile_from_json(json.loads((folder / PROFILE_FILE).read_text()))


def _build(context: StageContext) -> None:
    from gpuopt.backends.tensorrt import builder
    from gpuopt.stages.build import build_options

    path = context.folder("onnx") / ONNX_FILE
    options = build_options(context, path, next(iter(environment.gpus()), None))
    builder.build(context.target, path, (_profile(context.folder("onnx")),), options, context.progress)


def _open_and_run(folder: Path) -> None:
    session = Session(folder / ONNX_FILE)
    specs = onnx_model.input_specs(onnx.load(str(folder / ONNX_FILE), load_external_data=False))
    for seed, part in enumerate(("min", "opt", "max")):
        shapes = {name: getattr(sizes, part) for name, sizes in _profile(folder).items()}
        session.run(random_feed(specs, shapes, seed))


def _record(folder: Path) -> None:
    model = onnx_model.with_types(onnx_model.load(folder))
    names = [name for node in model.graph.node for name in node.output if name]
    watched = onnx_model.watching(model, [name for name in names if name in onnx_model.element_types(model)])
    path = onnx_model.save(watched, folder / "watched")
    shapes = {name: sizes.opt for name, sizes in _profile(folder).items()}
    feed = random_feed(onnx_model.input_specs(model), shapes, 0)
    np.savez(folder / VALUES_FILE, **{**feed, **Session(path, optimization="none").run(feed)})


def _difference(folder: Path) -> None:
    with np.load(folder / VALUES_FILE, allow_pickle=False) as archive:
        feed = {name: archive[name] for name in archive.files}
    expected = Session(folder / ONNX_FILE, optimization="none").run(feed)
    other = folder / OTHER_FILE
    if other.is_file():
        specs = onnx_model.input_specs(onnx.load(str(other), load_external_data=False))
        actual = Session(other, optimization="none").run({s.name: feed[s.name].astype(s.dtype) for s in specs})
    else:
        actual = Session(folder / ONNX_FILE).run(feed)
    limits = Limits(**json.loads((folder / LIMITS_FILE).read_text()))
    rows = {name: compare(value.astype(expected[name].dtype), expected[name]) for name, value in actual.items()}
    for name, figures in rows.items():
        if found := problem(figures, limits):
            raise AccuracyError(
                f"output '{name}' differs: {found}",
                "The nodes of the reduced graph are where: keep them out of INT8 or FP16, or of the optimizer.",
            )
