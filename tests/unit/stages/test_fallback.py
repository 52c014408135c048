"""The search for what falls back, on a model whose last quantized node does not stay in INT8 alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from gpuopt import onnx_model, recipe, reference
from gpuopt.artifact import Artifact
from gpuopt.calibration import ranges
from gpuopt.calibration.collectors import TensorRange
from gpuopt.errors import AccuracyError
from gpuopt.progress import Silent
from gpuopt.quantization import sensitivity
from gpuopt.quantization.sensitivity import Figures, Layer, Sensitivity
from gpuopt.shapes import ShapeRange, TensorSpec
from gpuopt.stages import fallback, measure
from gpuopt.stages.context import StageContext
from gpuopt.storage import write_json
from tests.unit.quantization.graphs import model_of, normal, run

SHAPE = (1, 16, 4, 4)


def residual_context(folder: Path) -> StageContext:
    """Two convolutions and an addition, which is in INT8 only as long as the second convolution is."""
    generator = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "w1"], ["b"]),
        helper.make_node("Add", ["b", "r"], ["y"]),
    ]
    model = model_of(nodes, {name: normal(generator, 16, 16, 1, 1) for name in ("w0", "w1")}, SHAPE)
    x = normal(generator, 4, *SHAPE[1:])
    names = ("onnx", "ranges", "reference", "accuracy", "sensitivity")
    for name in (*names, "out"):
        (folder / name).mkdir()
    onnx_model.save(model, folder / "onnx")
    bounds = TensorRange(-8.0, 8.0, "minmax")
    ranges.save(folder / "ranges" / ranges.RANGES_FILE, dict.fromkeys("xr", bounds), {})
    reference.record(
        folder / "reference",
        reference.Interface((TensorSpec("x", "float32", SHAPE),), ("y",), ({"x": ShapeRange(SHAPE, SHAPE, SHAPE)},)),
        lambda feed: run(model, feed["x"]),
        {"profile0-min": {"x": x[:1]}},
        "ONNX",
    )
    none = Figures(None, None, None, 0.0)
    layers = tuple(
        Layer(rank, rank, node, "", None, None, None, cost, None, 0, 0.0)
        for rank, (node, cost) in enumerate([("a", 1.0), ("b", 0.5), ("y", 0.01)], 1)
    )
    found = Sensitivity(4, "", none, 1.0, layers)
    write_json(folder / "sensitivity" / sensitivity.SENSITIVITY_FILE, found.to_json())
    np.savez(folder / "data.npz", x=x)
    context = StageContext(
        recipe=recipe.resolve({"model": {"path": "m"}, "accuracy": {"max_drop": 0.0}}),
        artifacts={name: Artifact(name, folder / name, "") for name in names},
        output=folder / "out",
        progress=Silent(),
        data=str(folder / "data.npz"),
    )
    (folder / "measured").mkdir()
    facts: dict[str, Any] = dict(measure.run(dataclasses.replace(context, output=folder / "measured")).facts)
    assert not facts["held"]
    write_json(folder / "accuracy" / measure.ACCURACY_FILE, facts)
    return context


def test_a_budget_that_only_fp16_holds_is_not_held(tmp_path: Path) -> None:
    context = residual_context(tmp_path)
    with pytest.raises(AccuracyError, match=r"at best 0\.9\d+, with 1 of 3 nodes in FP16") as caught:
        fallback.run(context)
    assert "too low for a drop of 0" in caught.value.message
