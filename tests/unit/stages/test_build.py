"""From a recipe to an engine with its record: what the stage tells the builder, and what it writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuopt import engine_record, environment, onnx_model, reference
from gpuopt.artifact import Artifact
from gpuopt.backends.tensorrt.builder import BuiltEngine
from gpuopt.environment import Gpu
from gpuopt.errors import DataError
from gpuopt.progress import Silent
from gpuopt.recipe import resolve, set_value
from gpuopt.reference import Interface
from gpuopt.shapes import ShapeRange, TensorSpec, corners
from gpuopt.stages import build
from gpuopt.stages.context import StageContext
from gpuopt.storage import sha256_file
from tests.unit.quantization.graphs import depthwise_block, run

PROFILE = {"x": ShapeRange((1, 16, 8, 8), (2, 16, 8, 8), (4, 16, 8, 8))}
GPU = Gpu("NVIDIA H100 80GB HBM3", "9.0", "13.0", 80 << 30)


def context(folder: Path, target: str = "tensorrt-rtx", **settings: Any) -> StageContext:
    """The stage's context for a small FP32 graph; settings by recipe key with `__` for the dot."""
    model = depthwise_block(decades=0.5)
    onnx_model.save(model, folder / "onnx")
    inputs = (TensorSpec("x", "float32", ("batch", 16, 8, 8)),)
    feeds = {c.name: reference.make_feed(c, inputs, [], {}, i) for i, c in enumerate(corners([PROFILE]))}
    (folder / "reference").mkdir()
    interface = Interface(inputs, ("y",), (PROFILE,))
    reference.record(folder / "reference", interface, lambda feed: run(model, feed["x"]), feeds, "ONNX")
    (folder / "out").mkdir()
    tree: dict[str, Any] = {"model": {"path": "m"}, "precision": "fp32"}
    for key, value in settings.items():
        set_value(tree, key.replace("__", "."), value)
    artifacts = {kind: Artifact(kind, folder / kind, "") for kind in ("onnx", "reference")}
    return StageContext(
        resolve(tree), artifacts, folder / "out", Silent(), target=target, cache_folder=folder / "cache"
    )


def test_an_engine_lies_beside_its_record(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    asked = {"build__compute_capability": ["8.9"], "build__workspace": "256MiB", "build__io_formats": {"x": "fp16:chw"}}
    outcome = build.run(context(tmp_path, **asked))
    path = tmp_path / "out/engine/model.tensorrt-rtx.engine"
    record = engine_record.read(path)
    facts = outcome.facts
    assert (record.sha256, record.size_bytes) == (sha256_file(path), path.stat().st_size)
    assert (record.target, record.precision, record.compute_capabilities) == ("tensorrt-rtx", "fp32", ("8.9",))
    assert record.shape_profiles() == (PROFILE,)
    assert [(t.name, t.dtype) for t in (*record.inputs, *record.outputs)] == [("x", "float16"), ("y", "float32")]
    assert record.inputs[0].shape[1:] == (16, 8, 8)
    assert facts["file"] == record.file
    assert facts["library_version"] == record.library_version
    assert facts["options"] == {"workspace_bytes": 256 << 20, "io_formats": {"x": "fp16:chw"}}
    assert facts["repairs"] == []
    assert facts["attempts"] == []
    assert facts["timing_cache"] is None
    assert facts["compute_capabilities"] == ["8.9"]
    assert facts["build_seconds"] > 0


@pytest.mark.parametrize(
    ("asked", "timings", "kept"),
    [
        ({}, b"timings", None),
        ({"build__attempts": 2}, b"timings", b"timings"),
        ({"build__attempts": 2}, None, None),
        ({"build__timing_cache": "copy", "build__require_timing_cache": True}, b"timings", b"timings"),
    ],
)
def test_timings_that_give_the_engine_again_lie_beside_it(
    asked: dict[str, Any], timings: bytes | None, kept: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    made = BuiltEngine(b"plan", "1.7", (), timings=timings)
    monkeypatch.setattr(build, "_built", lambda *_: (made, []))
    build.run(context(tmp_path, **asked))
    files = {path.name: path.read_bytes() for path in (tmp_path / "out/engine").iterdir()}
    assert files.get("model.tensorrt.timing") == kept


def test_every_setting_reaches_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {
        "precision": "int8",
        "cast__remainder": "fp32",
        "cast__nodes_to_keep": ["r*"],
        "cast__op_types_to_keep": ["Clip"],
        "build__optimization_level": 1,
        "build__workspace": "1GiB",
        "build__timing_cache": "t.cache",
        "build__require_timing_cache": True,
        "build__timing_iterations": 3,
        "build__attempts": 2,
        "build__tactic_sources": ["JIT_CONVOLUTIONS"],
        "build__auxiliary_streams": 0,
        "build__version_compatible": True,
        "build__hardware_compatibility": "ampere+",
        "build__refit": True,
        "build__strip_weights": True,
        "build__weight_streaming": True,
        "build__plugins": ["lib.so"],
        "build__dla_core": 0,
        "build__sparsity": True,
        "build__repairs": False,
    }
    made = context(tmp_path, "tensorrt", **asked)
    options = build.build_options(made, tmp_path / "onnx/model.onnx", GPU)
    section = made.recipe.build
    for name in ("optimization_level", "require_timing_cache", "timing_iterations", "attempts", "tactic_sources",
                 "refit", "auxiliary_streams", "version_compatible", "hardware_compatibility", "strip_weights",
                 "weight_streaming", "dla_core", "sparsity", "repairs"):  # fmt: skip
        assert getattr(options, name) == getattr(section, name), name
    assert (options.precision, options.fp16_remainder, options.workspace_bytes) == ("int8", False, 1 << 30)
    assert (options.timing_cache, options.plugins) == (Path("t.cache"), (Path("lib.so"),))
    assert options.fp32_nodes == ("r1", "r2")
    assert build.build_options(replace(made, target="tensorrt-rtx"), Path("m"), GPU).fp32_nodes == ()


def test_the_timing_cache_lies_in_gpuopts_own_by_release_and_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(build, "import_module", lambda target: rtx)
    made = context(tmp_path, "tensorrt")
    options = build.build_options(made, Path("m"), GPU)
    name = f"tensorrt-{rtx.__version__}-NVIDIA_H100_80GB_HBM3-9.0.timing"
    assert options.timing_cache == tmp_path / "cache/timing" / name
    assert build.build_options(replace(made, target="tensorrt-rtx"), Path("m"), GPU).timing_cache is None
    assert build.build_options(made, Path("m"), None).timing_cache is None
    assert build.build_options(replace(made, cache_folder=None), Path("m"), GPU).timing_cache is None


@pytest.mark.parametrize(
    ("target", "settings", "gpu", "expected"),
    [
        ("tensorrt", {}, GPU, ("9.0",)),
        ("tensorrt", {"build__hardware_compatibility": "same-compute-capability"}, GPU, ("9.0",)),
        ("tensorrt", {"build__hardware_compatibility": "ampere+"}, GPU, ()),
        ("tensorrt-rtx", {}, GPU, ()),
        ("tensorrt-rtx", {"build__compute_capability": ["8.6", "current", "9.0"]}, GPU, ("8.6", "9.0")),
        ("tensorrt-rtx", {"build__compute_capability": ["8.6"]}, None, ("8.6",)),
    ],
)
def test_the_gpus_that_an_engine_runs_on(
    target: str, settings: dict[str, Any], gpu: Gpu | None, expected: tuple[str, ...], tmp_path: Path
) -> None:
    assert build._capabilities(context(tmp_path, target, **settings), gpu) == expected


@pytest.mark.parametrize(("samples", "batches"), [(1, 0), (2, 1), (5, 2)])
def test_samples_that_fill_no_batch_of_the_calibrator_are_counted(samples: int, batches: int, tmp_path: Path) -> None:
    native = {"precision": "int8", "quantize__quantizer": "tensorrt", "build__target": ["tensorrt"]}
    made = context(tmp_path, "tensorrt", **native)
    np.savez(tmp_path / "data.npz", x=np.ones((samples, 16, 8, 8), np.float32))
    made = replace(made, data=str(tmp_path / "data.npz"))
    feeds = build._native_calibration(made, reference.load(tmp_path / "reference")).feeds()
    if batches:
        assert [feed["x"].shape for feed in feeds] == [(2, 16, 8, 8)] * batches
        return
    with pytest.raises(DataError) as caught:
        list(feeds)
    assert caught.value.message.startswith("1 calibration sample does not fill a batch")
    assert "needs 2, the size that the first profile is tuned for" in caught.value.message
    assert "--opt-shapes" in caught.value.hint


def test_the_facts_of_gpus_have_types() -> None:
    for gpu in environment.gpus():
        assert gpu.total_bytes > 1 << 30
        assert np.array([float(gpu.compute_capability), float(gpu.driver_version)]).min() > 0
    assert (environment.free_gpu_memory() is None) == (environment.gpus() == [])


def test_engines_run_no_code_but_what_the_recipe_names(tmp_path: Path) -> None:
    made = context(tmp_path, build__plugins=["lib.so"], build__version_compatible=True)
    assert (tuple(made.trust.plugins), made.trust.host_code) == ((Path("lib.so"),), True)
    nothing = replace(made, recipe=resolve({"model": {"path": "m"}})).trust
    assert (tuple(nothing.plugins), nothing.host_code) == ((), False)
