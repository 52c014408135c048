"""`gpuopt.load` without a GPU: ONNX Runtime's engine, and which of a bundle's engines is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import gpuopt
from gpuopt import bundle, environment, onnx_model, reference
from gpuopt.engine import _best
from gpuopt.environment import Gpu
from gpuopt.errors import EngineError, RequirementError, StorageError, UsageError
from gpuopt.reference import Interface
from gpuopt.shapes import ShapeRange, TensorSpec, corners
from tests.unit.inspection import bundles
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
    monkeypatch.setattr(environment, "why_not_run", lambda *_: "")
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
    monkeypatch.setattr(environment, "why_not_run", lambda target, _: "" if target in runnable else "no NVIDIA GPU")
    present = {kind: tmp_path / kind for kind in ("tensorrt", "tensorrt-rtx")}
    assert _best(present, 0) == expected


def test_the_gpu_that_is_named_is_the_one_that_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpus", lambda: [Gpu("NVIDIA H100", "9.0"), Gpu("NVIDIA L40S", "8.9")])
    monkeypatch.setattr(environment, "has_module", lambda name: True)
    present = {"tensorrt-rtx": tmp_path / "engine"}
    assert [_best(present, device) for device in (0, 1, 2)] == ["onnxruntime", "tensorrt-rtx", "onnxruntime"]
    assert environment.why_not_run("tensorrt", 2) == "no NVIDIA GPU 2"


def test_onnx_runtime_runs_on_the_gpu_that_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Without(ort.InferenceSession):  # type: ignore[misc]
        """ONNX Runtime as it is without CUDA, asked as if it had it."""

        def __init__(self, path: str, options: Any, providers: list[Any], **more: Any) -> None:
            asked.append(providers)
            super().__init__(path, options, providers=["CPUExecutionProvider"], **more)

    monkeypatch.setattr(ort, "InferenceSession", Without)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(environment, "gpus", lambda: [Gpu("NVIDIA L40S", "8.9")] * 4)
    for device in (0, 3):
        gpuopt.load(folder, device=device).close()
    assert asked == [[("CUDAExecutionProvider", {"device_id": n}), "CPUExecutionProvider"] for n in (0, 3)]
    for device in (4, -1):
        with pytest.raises(RequirementError, match=f"there is no GPU {device}: the driver reports 4"):
            gpuopt.load(folder, device=device)


def test_a_file_that_is_not_what_was_asked_for_is_refused(tmp_path: Path) -> None:
    folder = bundles.make(tmp_path / "model.gpuopt")
    with pytest.raises(UsageError, match="is an engine for tensorrt, not tensorrt-rtx"):
        gpuopt.load(folder / bundles.ENGINE, target="tensorrt-rtx")
    for name in (bundles.ENGINE, "model.onnx"):
        with pytest.raises(UsageError, match="is a file: ONNX Runtime runs the model of a bundle"):
            gpuopt.load(folder / name, target="onnxruntime")
    with pytest.raises(StorageError, match=r"cannot read .*nosuch: No such file"):
        gpuopt.load(tmp_path / "nosuch")
