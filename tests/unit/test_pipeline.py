"""Which stages run again when a key of the recipe changes, for every key there is."""

from __future__ import annotations

import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from gpuopt import environment, reference, user_code
from gpuopt.artifact import Artifact
from gpuopt.cache import Cache, Entry
from gpuopt.compile import NO_ENGINE, remarks, with_defaults
from gpuopt.environment import Gpu
from gpuopt.errors import DataError, PrecisionError, RequirementError, UsageError
from gpuopt.pipeline import (
    STAGES,
    Runner,
    Step,
    StepResult,
    check_build_options,
    check_engine_graph,
    check_provable,
    check_request,
    plan,
)
from gpuopt.progress import Silent
from gpuopt.recipe import Recipe, resolve, set_value
from gpuopt.shapes import ShapeRange, TensorSpec, corners

_BUDGET = "measure fallback confirm"
_PLACEMENT = "equalize choose measure analyze fallback quantize"
_EVERYWHERE = "equalize calibrate choose measure analyze fallback correct confirm"

_DATA = f"samples export {_EVERYWHERE}"
"""The stages that read data, and the model that computes with them."""

# key: (another value, the stages that depend on it); with a dict instead of a value other keys have to change, too.
KEYS: dict[str, tuple[Any, str]] = {
    "version": (1, ""),
    "model.path": ("copy.onnx", ""),
    "model.factory": ("somewhere:make", "export"),
    "model.trust_pickle": (True, "export"),
    "precision": ({"precision": "fp16", "accuracy.max_drop": None}, "build verify"),
    "inputs": ({"inputs": {"x": {"shape": "1x4"}}}, f"samples export {_EVERYWHERE}"),
    "profiles": ([{"x": {"shape": "2x4"}}], "export"),
    "export.opset": (18, "export"),
    "export.exporters": (["dynamo"], "export"),
    "export.seed": (1, f"export {_EVERYWHERE}"),
    "simplify.enabled": (False, "simplify"),
    "layout.input": ("nhwc", _DATA),
    "layout.output": ("nhwc", _DATA),
    "layout.input_dtype": ("uint8", _DATA),
    **{
        f"layout.{name}": ({"layout.input_dtype": "uint8", f"layout.{name}": value}, _DATA)
        for name, value in (("mean", [0.5]), ("std", [0.5]), ("scale", 1.0))
    },
    "calibrate.data": ("other.npz", f"samples {_EVERYWHERE}"),
    "calibrate.ranges": ("ranges.json", "equalize calibrate"),
    "calibrate.method": ("minmax", "equalize calibrate"),
    "calibrate.percentile": (99.0, "equalize calibrate"),
    "calibrate.samples": (100, "equalize calibrate choose measure fallback correct confirm"),
    "calibrate.random": (True, _EVERYWHERE),
    "calibrate.values": (0, "equalize calibrate"),
    "calibrate.max_memory": ("1GiB", ""),
    "calibrate.provider": ("cpu", "calibrate"),
    "calibrate.strict": (True, "calibrate"),
    "calibrate.images": ({"calibrate.images": {"crop": 4}}, f"samples {_EVERYWHERE}"),
    # QOperator has no graph for engines, of which `verify` is told.
    "quantize.format": (
        {"quantize.format": "qoperator", "build.target": ["onnxruntime"]},
        f"calibrate {_PLACEMENT} verify benchmark",
    ),
    "quantize.quantizer": (
        {"quantize.quantizer": "tensorrt", "accuracy.max_drop": None, "build.target": ["tensorrt", "onnxruntime"]},
        "verify",
    ),
    "quantize.per_channel": (False, _PLACEMENT),
    "quantize.op_types": (["Conv"], _PLACEMENT),
    "quantize.op_types_to_exclude": (["Conv"], _PLACEMENT),
    "quantize.nodes_to_exclude": (["a"], _PLACEMENT),
    "quantize.min_channels": (8, f"calibrate {_PLACEMENT}"),
    "quantize.equalize": ("smooth", "equalize"),
    "quantize.smooth_alpha": (0.3, "equalize"),
    "quantize.bias_correction": ("on", "correct"),
    "analyze.enabled": (True, ""),
    "analyze.samples": (8, "analyze"),
    "accuracy.max_drop": (0.02, _BUDGET),
    "accuracy.metric": ("somewhere:metric", _BUDGET),
    "accuracy.data": ("other.npz", f"{_BUDGET} analyze"),
    "accuracy.labels": ("labels.npy", _BUDGET),
    "accuracy.samples": (7, _BUDGET),
    "cast.remainder": ("fp32", f"{_PLACEMENT} build"),
    "cast.op_types_to_keep": (["Add"], "cast build"),
    "cast.nodes_to_keep": (["a"], "cast build"),
    "build.target": (["tensorrt", "onnxruntime"], ""),
    # Without an engine there is none to measure.
    "build.enabled": (False, "benchmark"),
    "build.compute_capability": (["8.9"], "build"),
    "build.optimization_level": (3, "build"),
    "build.workspace": (1 << 26, "build"),
    "build.timing_cache": ("cache.bin", ""),
    "build.require_timing_cache": (True, ""),
    "build.timing_iterations": (4, "build"),
    "build.attempts": (3, "build"),
    "build.tactic_sources": (["JIT_CONVOLUTIONS"], "build"),
    "build.auxiliary_streams": (2, "build"),
    "build.version_compatible": (True, "build benchmark"),
    "build.hardware_compatibility": ("ampere+", "build"),
    "build.refit": (True, "build"),
    "build.strip_weights": (True, "build"),
    "build.weight_streaming": (True, "build"),
    "build.plugins": (["libplugin.so"], "build benchmark"),
    "build.dla_core": (0, "build"),
    "build.tf32": (False, "build"),
    "build.sparsity": (True, "build"),
    "build.io_formats": ({"build.io_formats": {"x": "fp16:hwc8"}}, "build"),
    "build.legacy": (True, f"{_PLACEMENT} build"),
    "build.repairs": (False, "build"),
    "verify.enabled": (False, ""),
    "verify.min_cosine": (0.5, "verify"),
    "verify.min_sqnr_db": (3.0, "verify"),
    "verify.batch_invariance": (False, "verify"),
    "verify.min_precision_coverage": ("80%", "verify"),
    "speed.check": (False, ""),
    "speed.mixed": (False, ""),
    "speed.seconds": (1.0, ""),
    "benchmark.enabled": ("off", ""),
    "benchmark.seconds": (1.0, "benchmark"),
    "benchmark.cuda_graph": (False, "benchmark"),
    "gates.mode": ("warn", ""),
    "gates.max_latency_ms": ({"gates.max_latency_ms": {"p99": 5}}, ""),
    "gates.max_latency_vs_fp16": (1.0, ""),
    "gates.min_throughput": (1.0, ""),
    "gates.max_engine_size": ("1GiB", ""),
    "gates.max_device_memory": ("1GiB", ""),
    "gates.max_build_seconds": (60.0, ""),
    "gates.max_calibration_warnings": (0, ""),
    "output.directory": ("elsewhere", ""),
    "failure.seconds": (0, ""),
    "failure.keep_weights": (True, ""),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="a")], "g", values[:1], values[1:])
    for name in ("model.onnx", "copy.onnx"):
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), name)
    shape = ShapeRange((1, 4), (1, 4), (1, 4))
    interface = reference.Interface((TensorSpec("x", "float32", (1, 4)),), ("y",), ({"x": shape},))
    zeros = np.zeros((1, 4), np.float32)
    feeds = {corner.name: {"x": zeros} for corner in corners(interface.profiles)}
    reference.record(tmp_path, interface, lambda _: [zeros], feeds, "ONNX")
    for name, count in (("data.npz", 3), ("other.npz", 4)):
        np.savez(name, x=np.zeros((count, 4), np.float32))
    np.save("labels.npy", np.zeros(3))
    Path("ranges.json").write_text("{}")
    Path("libplugin.so").write_bytes(b"")
    return tmp_path


def leaves(prefix: str, value: Any) -> list[str]:
    if isinstance(value, dict) and value:
        return [leaf for name, item in value.items() for leaf in leaves(f"{prefix}.{name}" if prefix else name, item)]
    return [prefix]


def recipe(changes: dict[str, Any]) -> Recipe:
    tree: dict[str, Any] = {}
    base = {
        "model.path": "model.onnx",
        "calibrate.data": "data.npz",
        "accuracy.max_drop": 0.01,
        "build.target": ["tensorrt-rtx", "onnxruntime"],
        "benchmark.enabled": "on",
    }
    for key, value in {**base, **changes}.items():
        set_value(tree, key, value)
    return resolve(tree)


def keys(chosen: Recipe, folder: Path) -> dict[str, Any]:
    """The key parts of every step, for the same artifacts of the steps before."""
    runner = Runner(chosen, Cache(folder / "cache"), Silent(), "run")
    kinds = {kind for step in plan(chosen) for kind in step.stage.makes}
    runner._artifacts = {kind: Artifact(kind, folder, "hash") for kind in kinds}
    return {step.label: runner._parts(step) for step in plan(chosen)}


def test_the_table_has_every_key() -> None:
    assert sorted(KEYS) == sorted(leaves("", recipe({}).model_dump(mode="json")))


@pytest.mark.parametrize("key", KEYS)
def test_a_key_changes_the_stages_that_depend_on_it_and_no_others(key: str, here: Path) -> None:
    value, expected = KEYS[key]
    changes = value if isinstance(value, dict) else {key: value}
    before, after = keys(recipe({}), here), keys(recipe(changes), here)
    changed = {label.partition(" ")[0] for label in before.keys() & after.keys() if before[label] != after[label]}
    assert changed == set(expected.split())


@pytest.mark.parametrize("precision", ["int8", "fp16", "auto"])
def test_one_graph_does_not_serve_tensorrt_8_and_tensorrt_rtx(
    precision: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"precision": precision, "accuracy.max_drop": None, "build.target": ["tensorrt", "tensorrt-rtx"]}
    monkeypatch.setattr(environment, "tensorrt_version", lambda: (8, 6))
    with pytest.raises(UsageError, match="one graph cannot serve tensorrt and tensorrt-rtx here: TensorRT-RTX comp"):
        check_engine_graph(with_defaults(recipe(both)))
    check_engine_graph(with_defaults(recipe({**both, "precision": "fp32"})))
    check_engine_graph(with_defaults(recipe({**both, "build.target": ["tensorrt"]})))
    monkeypatch.setattr(environment, "tensorrt_version", lambda: (10, 3))
    check_engine_graph(with_defaults(recipe(both)))


def test_a_graph_for_tensorrt_8_is_for_no_other_engine(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "tensorrt_version", lambda: (10, 3))
    for target in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(UsageError, match="computes in FP32 what is FP32 in the graph"):
            check_engine_graph(with_defaults(recipe({"build.legacy": True, "build.target": [target]})))
    elsewhere = {"build.legacy": True, "build.target": ["tensorrt"], "build.enabled": False}
    check_engine_graph(with_defaults(recipe(elsewhere)))


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_and_its_proof_depend_on_gpu_and_driver(
    target: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe({"build.target": [target, "onnxruntime"]})
    monkeypatch.setattr(environment, "has_module", lambda name: True)
    found = []
    for gpu in (Gpu("NVIDIA L40S", "8.9", "12.4"), Gpu("NVIDIA L40", "8.9", "12.4"), Gpu("NVIDIA L40", "8.9", "13.0")):
        monkeypatch.setattr(environment, "gpus", lambda gpu=gpu: [gpu])
        found.append(keys(chosen, here))
    expected = {f"{stage} {target}" for stage in ("build", "prove", "benchmark")}
    for before, after in pairwise(found):
        assert {label for label in before if before[label] != after[label]} == expected


def test_a_demanded_share_can_be_shown_where_every_engine_runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demand = {"verify.min_precision_coverage": "80%"}
    monkeypatch.setattr(environment, "has_module", lambda name: True)
    monkeypatch.setattr(environment, "gpus", lambda: [Gpu("NVIDIA H100", "9.0", "12.4")])
    check_provable(recipe({**demand, "build.target": ["tensorrt", "onnxruntime"]}))
    with pytest.raises(PrecisionError, match=r"demands 80\.0%, and .*: the engine for tensorrt-rtx does not run: Ten"):
        check_provable(recipe({**demand, "build.target": ["tensorrt", "tensorrt-rtx"]}))
    check_provable(recipe({}))


def test_an_engine_without_weights_is_built_and_not_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "has_module", lambda name: True)
    monkeypatch.setattr(environment, "gpus", lambda: [Gpu("NVIDIA H100", "9.0", "12.4")])
    chosen = {"build.target": ["tensorrt", "onnxruntime"], "benchmark.enabled": "on"}
    whole = {step.label for step in plan(recipe(chosen))}
    stripped = recipe({**chosen, "build.strip_weights": True, "verify.min_precision_coverage": "80%"})
    assert whole - {step.label for step in plan(stripped)} == {"prove tensorrt", "benchmark tensorrt"}
    with pytest.raises(PrecisionError, match="does not run: it holds no weights"):
        check_provable(stripped)


def test_the_packages_that_a_factory_uses_are_part_of_the_key(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "fac.py").write_text("x = 1\n")
    runner = Runner(recipe({}), Cache(here / "cache"), Silent(), "run")
    runner.cache.remember("sources", "name", {"files": [str(here / "fac.py")], "distributions": ["timm"]})
    found = []
    for version in ("1.0", "1.1"):
        monkeypatch.setattr(environment, "version_of", lambda name, version=version: version if name == "timm" else "")
        found.append(runner._code_fingerprint("name", "fac:make"))
    assert found[0] is not None
    assert found[0] != found[1]


def test_what_is_imported_is_known_by_its_distribution_and_what_is_read_while_it_is_there(here: Path) -> None:
    (here / "w.npy").write_bytes(b"")
    found = user_code.dependencies([str(here / "w.npy"), str(here / "gone.npy")])
    assert {"numpy", "pydantic"} <= set(found.distributions)
    assert str(here / "w.npy") in found.files
    assert str(here / "gone.npy") not in found.files


def test_analysis_is_for_int8() -> None:
    chosen = recipe({"precision": "fp16", "accuracy.max_drop": None, "analyze.enabled": True})
    assert "analyze" not in [step.label for step in plan(chosen)]


@pytest.mark.parametrize(
    "wanted", [{}, {"accuracy.max_drop": None, "analyze.enabled": True}], ids=["budget", "analyze"]
)
def test_ranges_without_samples_are_told_before_the_export(wanted: dict[str, Any], here: Path) -> None:
    chosen = recipe({"calibrate.data": None, "calibrate.ranges": "ranges.json", **wanted})
    with pytest.raises(DataError, match="no samples to measure"):
        check_request(chosen, builds=False)


@pytest.mark.parametrize("file", ["model.onnx", "program.pt2"])
def test_a_factory_beside_a_whole_model_is_refused(file: str, here: Path) -> None:
    with zipfile.ZipFile("program.pt2", "w") as archive:
        archive.writestr("m/archive_format", "pt2")
    chosen = recipe({"model.path": file, "model.factory": "somewhere:make", "accuracy.max_drop": None})
    with pytest.raises(UsageError, match="the factory somewhere:make would play no part") as caught:
        check_request(chosen, builds=False)
    assert "--set model.factory=null" in caught.value.hint


def test_options_of_engines_are_told_where_none_is_made(here: Path) -> None:
    options = {"build.plugins": ["p.so"], "build.io_formats": {"x": "fp16:chw"}, "build.tf32": False}
    told = "only engines have build.plugins, build.tf32, build.io_formats: without effect on ONNX Runtime's model"

    def said(changes: dict[str, Any]) -> list[str]:
        return remarks(recipe(changes), with_defaults(recipe(changes)))

    assert said({**options, "build.target": ["onnxruntime"]}) == [told]
    assert said({**options, "build.target": ["tensorrt-rtx"]}) == []
    assert said({"build.io_formats": "auto", "build.legacy": False, "build.target": ["onnxruntime"]}) == []


def test_options_of_engines_are_told_where_no_tensorrt_is(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "default_targets", lambda: ("onnxruntime",))
    shared = recipe({"build.target": [], "build.require_timing_cache": True})
    no_engine, options = remarks(shared, with_defaults(shared))
    assert no_engine == NO_ENGINE
    assert "build.require_timing_cache" in options


def test_labels_of_random_samples_are_refused(here: Path) -> None:
    (here / "labels.npy").write_bytes(b"")
    wanted = {"calibrate.data": None, "calibrate.random": True, "accuracy.labels": "labels.npy"}
    with pytest.raises(UsageError, match=r"labels 'labels\.npy' for random samples"):
        check_request(recipe(wanted), builds=False)


@pytest.mark.parametrize("key", ["build.timing_cache", "build.require_timing_cache"])
def test_an_option_that_the_library_lacks_is_refused_whatever_the_cache_holds(key: str, here: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    value, _ = KEYS[key]
    with pytest.raises(UsageError, match=r"TensorRT-RTX has no build\.timing_cache"):
        check_request(recipe({key: value}))
    check_request(recipe({key: value, "build.enabled": False, "benchmark.enabled": "off"}))


def test_attempts_are_refused_where_engines_cannot_be_raced(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "library_version", lambda target: "10.3.0")
    asked = {"build.target": ["tensorrt"], "build.attempts": 2}
    monkeypatch.setattr(environment, "why_not_run", lambda target: "there is no GPU")
    with pytest.raises(RequirementError, match="those of tensorrt cannot be run here: there is no GPU"):
        check_build_options(recipe(asked))
    check_build_options(recipe({**asked, "build.attempts": 1}))
    monkeypatch.setattr(environment, "why_not_run", lambda target: "")
    check_build_options(recipe(asked))
    with pytest.raises(RequirementError, match="holds no weights"):
        check_build_options(recipe({**asked, "build.strip_weights": True}))


def test_packages_are_those_that_took_part(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    found = {"onnx": "1.20", "torch": "2.8.0", "tensorrt-rtx-cu13": "1.4", "numpy": "2.0", "tensorrt": None}
    monkeypatch.setattr(environment, "version_of", found.get)
    runner = Runner(recipe({}), Cache(here / "cache"), Silent(), "run")
    stages = {stage.name: stage for stage in reversed(STAGES)}
    for name, target in (("calibrate", ""), ("build", "tensorrt")):
        entry = Entry({}, {"library_version": "8.5.3.1"} if target else {}, (), 0.0)
        runner.results.append(StepResult(Step(stages[name], target), entry, False, ""))
    # torch is there and did nothing; TensorRT is there without a distribution; TensorRT-RTX was not asked for.
    assert runner.packages() == {"numpy": "2.0", "onnx": "1.20", "tensorrt": "8.5.3.1"}
    assert runner.sources() == {"data"}
