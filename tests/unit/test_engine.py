"""`gpuopt.load` without a GPU: ONNX Runtime's engine, and which of a bundle's engines is opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gpuopt
from gpuopt import bundle, environment, onnx_model, reference
from gpuopt.engine import _best
from gpuopt.errors import EngineError, UsageError
from gpuopt.reference import Interface
from gpuopt.shapes import ShapeRange, TensorSpec, corners
from tests.unit.quantization.graphs import depthwise_block, run

SHAPE = (1, 16, 8, 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle with a model for ONNX Runtime."""
    model = depthwise_block(decades=0.5)
    onnx_model.save(model, tmp_path / "onnx")
    inputs = (TensorSpec("x", "float32", SHAPE),)
    profile = {"x": ShapeRange(SHAPE, SHAPE, SHAPE)}
    feeds = {c.name: reference.make_feed(c, inputs, [], {}, 0) for c in corners([profile])}
    (tmp_path / "reference").mkdir()
    interface = Interface(inputs, ("y",), (profile,))
    reference.record(tmp_path / "reference", interface, lambda feed: run(model, feed["x"]), feeds, "ONNX")
    files = {"reference": tmp_path / "reference", **{p.name: p for p in (tmp_path / "onnx").iterdir()}}
    bundle.write(tmp_path / "model.gpuopt", files, {}, {})
    return tmp_path / "model.gpuopt"


def test_an_engine_may_be_closed_twice_and_then_says_so(folder: Path) -> None:
    engine = gpuopt.load(folder)
    assert engine.target == "onnxruntime"
    feed = {"x": np.ones(SHAPE, np.float32)}
    with engine:
        assert engine.infer(feed)["y"].shape[0] == 1
    engine.close()
    with pytest.raises(UsageError, match="the engine is closed"):
        engine.infer(feed)


def test_an_engine_that_is_refused_is_an_error_and_not_onnx_runtime(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {p.name: p for p in folder.iterdir() if p.name != bundle.MANIFEST_FILE}
    plan = folder.parent / "model.tensorrt.engine"
    plan.write_bytes(b"a plan without its record")
    bundle.write(folder, {**files, plan.name: plan}, {}, {})
    monkeypatch.setattr(environment, "why_not_run", lambda target: "")
    with pytest.raises(EngineError, match="has no record"):
        gpuopt.load(folder)
    with gpuopt.load(folder, target="onnxruntime") as engine:
        assert engine.target == "onnxruntime"


@pytest.mark.parametrize(
    ("runnable", "expected"),
    [({"tensorrt", "tensorrt-rtx"}, "tensorrt"), ({"tensorrt-rtx"}, "tensorrt-rtx"), (set(), "onnxruntime")],
)
def test_onnx_runtime_stands_in_only_where_no_engine_can_run_at_all(
    runnable: set[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "why_not_run", lambda target: "" if target in runnable else "no NVIDIA GPU")
    present = {kind: tmp_path / kind for kind in ("tensorrt", "tensorrt-rtx")}
    assert _best(present) == expected
