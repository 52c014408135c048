"""From the command line's words to a recipe, and the answers of the small commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpuopt import environment, request
from gpuopt.cache import Cache
from gpuopt.errors import StorageError, UsageError
from gpuopt.recipe import Recipe, resolve
from gpuopt.request import Flags
from gpuopt.shapes import ShapeRange


def made(*settings: str, path: Path | None = None, **flags: Any) -> Recipe:
    return request.recipe(path, Flags(**{"model": "m.pt", **flags}), settings)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        ({"trust_pickle": True}, "model.trust_pickle", True),
        ({"factory": "a.b:c"}, "model.factory", "a.b:c"),
        ({"precision": "fp16"}, "precision", "fp16"),
        ({"output": Path("out")}, "output.directory", "out"),
        ({"target": ("tensorrt", "onnxruntime")}, "build.target", ("tensorrt", "onnxruntime")),
        ({"compute_capability": ("8.6",)}, "build.compute_capability", ("8.6",)),
        ({"calibration_data": "d"}, "calibrate.data", "d"),
        ({"calibration_method": "mse"}, "calibrate.method", "mse"),
        ({"calibration_samples": 3}, "calibrate.samples", 3),
        ({"random_calibration": True}, "calibrate.random", True),
        ({"quant_format": "qoperator", "target": ("onnxruntime",)}, "quantize.format", "qoperator"),
        ({"min_cosine": 0.0}, "verify.min_cosine", 0.0),
        ({"opset": 18}, "export.opset", 18),
        ({"max_accuracy_drop": "0.5%"}, "accuracy.max_drop", 0.005),
        ({"max_accuracy_drop": "0.02"}, "accuracy.max_drop", 0.02),
        ({"metric": "a.b:c", "max_accuracy_drop": "1%"}, "accuracy.metric", "a.b:c"),
        ({"labels": "l.npy", "max_accuracy_drop": "1%"}, "accuracy.labels", "l.npy"),
        ({"evaluation_data": "e.npz"}, "accuracy.data", "e.npz"),
        ({"analyze_samples": 8}, "analyze.samples", 8),
        ({"workspace": "2GiB"}, "build.workspace", 2 << 30),
        ({"optimization_level": 0}, "build.optimization_level", 0),
        ({"timing_cache": "t"}, "build.timing_cache", "t"),
        ({"require_timing_cache": True}, "build.require_timing_cache", True),
        ({"tactic_sources": ("A, B", "C")}, "build.tactic_sources", ("A", "B", "C")),
        ({"plugins": ("a.so", "b.so")}, "build.plugins", ("a.so", "b.so")),
        ({"io_formats": ("a=b=fp16:chw", "c=int8:chw32")}, "build.io_formats", {"a=b": "fp16:chw", "c": "int8:chw32"}),
    ],
)
def test_a_flag_sets_its_key(flags: dict[str, Any], key: str, value: Any) -> None:
    found: Any = made(**flags)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_flags_go_before_the_file_and_settings_before_flags(tmp_path: Path) -> None:
    path = written(tmp_path, "model: {path: a.pt}\nprecision: fp32\nexport: {opset: 18, seed: 5}\n")
    found = made("export.opset=17", path=path, model=None, precision="fp16", opset=19)
    assert (found.model.path, found.precision, found.export.opset, found.export.seed) == ("a.pt", "fp16", 17, 5)
    assert request.recipe(path, Flags(), []).precision == "fp32"


def test_inputs_come_together_from_their_flags(tmp_path: Path) -> None:
    found = made(
        inputs=("ids:2x8:int64", "input:0:1x3"),
        min_shapes=("ids:1x8",),
        max_shapes=("ids:4x8,mask:4x8",),
        opt_shapes=("mask:2x8",),
    )
    assert found.inputs["ids"].range() == ShapeRange((1, 8), (2, 8), (4, 8))
    assert found.inputs["ids"].dtype == "int64"
    assert found.inputs["input:0"].range() == ShapeRange((1, 3), (1, 3), (1, 3))
    assert found.inputs["mask"].range() == ShapeRange((2, 8), (2, 8), (4, 8))


def test_an_input_flag_keeps_what_the_file_says_beside_it(tmp_path: Path) -> None:
    path = written(tmp_path, "inputs: {a.b: {shape: 1x3, low: -1}}\n")
    found = made(path=path, min_shapes=("a.b:1x3",), max_shapes=("a.b:8x3",))
    assert (found.inputs["a.b"].low, found.inputs["a.b"].max) == (-1, (8, 3))


def test_a_shape_by_flag_replaces_the_range_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "inputs: {x: {min: 1x16, opt: 2x16, max: 8x16, high: 3}}\n")
    assert made(path=path, inputs=("x:4x16",)).inputs["x"].range() == ShapeRange((4, 16), (4, 16), (4, 16))
    found = made(path=path, inputs=("x:4x16",), max_shapes=("x:6x16",)).inputs["x"]
    assert (found.range(), found.high) == (ShapeRange((4, 16), (4, 16), (6, 16)), 3)
    assert made(path=path, max_shapes=("x:6x16",)).inputs["x"].range() == ShapeRange((1, 16), (2, 16), (6, 16))


def test_an_input_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="input 'x' is given twice"):
        made(inputs=("x:1x3", "x:1x4"))


@pytest.mark.parametrize("inputs", ["inputs:", "inputs: [x]", "inputs: {x: 1x3}"])
def test_an_input_flag_over_inputs_that_are_no_mapping_is_refused(tmp_path: Path, inputs: str) -> None:
    with pytest.raises(UsageError, match="no mapping of input names"):
        made(path=written(tmp_path, inputs + "\n"), inputs=("x:1x3",))


def test_the_model_is_a_factory_unless_a_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert made(model="pkg.mod:make").model.factory == "pkg.mod:make"
    assert made(model="pkg.mod:make").model.path is None
    Path("pkg.mod:make").touch()
    assert made(model="pkg.mod:make").model.path == "pkg.mod:make"
    assert made(model="C:/models/m.pt").model.path == "C:/models/m.pt"


def test_weights_and_a_factory_go_together_but_not_two_factories() -> None:
    found = made(model="weights.pt", factory="a:b").model
    assert (found.path, found.factory) == ("weights.pt", "a:b")
    with pytest.raises(UsageError, match="two factories"):
        made(model="a:b", factory="c:d")


def test_a_factory_given_as_the_model_is_compiled_and_not_the_file_of_the_recipe(tmp_path: Path) -> None:
    path = written(tmp_path, "model: {path: model.onnx, trust_pickle: true}\n")
    found = made(path=path, model="a:b").model
    assert (found.path, found.factory, found.trust_pickle) == (None, "a:b", True)
    weights = made(path=written(tmp_path, "model: {path: w.pt, factory: a:b}\n"), model="other.pt").model
    assert (weights.path, weights.factory) == ("other.pt", "a:b")


def test_a_flag_for_one_name_keeps_the_recipe_s_others(tmp_path: Path) -> None:
    text = "gates: {max_latency_ms: {p50: 1, p99: 5}}\nbuild: {io_formats: {a: fp16:chw, b: fp16:hwc8}}\n"
    path = written(tmp_path, text + "layout: {input: {x: nhwc}, output: nhwc}\n")
    flags = {"max_latency": ("p99=0.1ms",), "io_formats": ("b=fp32:chw",), "input_layout": ("y=nhwc",)}
    found = made(path=path, **flags, output_layout=("z=nhwc",))
    assert found.gates.max_latency_ms == {"p50": 1, "p99": 0.1}
    assert found.build.io_formats == {"a": "fp16:chw", "b": "fp32:chw"}
    assert (found.layout.input, found.layout.output) == ({"x": "nhwc", "y": "nhwc"}, {"z": "nhwc"})
    assert made("gates.max_latency_ms={}", path=path).gates.max_latency_ms == {}
    assert made(path=path, io_formats=("auto",)).build.io_formats == "auto"


def test_two_limits_for_one_percentile_are_refused() -> None:
    with pytest.raises(UsageError, match="twice for p99"):
        made(max_latency=("p99=5ms", "P99=6ms"))


@pytest.mark.parametrize("text", ["precision: fp16\n", "model:\nprecision: fp16\n"])
def test_no_model_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="no model is given") as caught:
        made(path=written(tmp_path, text), model=None)
    assert "--recipe" in caught.value.hint


def test_a_recipe_file_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        made(path=tmp_path / "absent.yaml")


@pytest.mark.parametrize("texts", [("image",), ("=fp16:chw",), ("image=",), ("a=fp16:chw", "a=fp32:chw")])
def test_a_format_without_name_or_value_or_twice_is_refused(texts: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"no format|two formats") as caught:
        made(io_formats=texts)
    assert "--io-format" in caught.value.hint


def test_the_dry_run_is_a_recipe_with_the_plan_in_comments(tmp_path: Path) -> None:
    chosen = made(precision="fp16", target=("tensorrt-rtx",), model=str(tmp_path / "m.pt"))
    text = request.describe(chosen, as_json=False)
    again = resolve(yaml.safe_load(text))
    assert request.describe(again, as_json=False) == text, "a resolved recipe resolves to itself"
    assert again.build.target == ("tensorrt-rtx", "onnxruntime")
    assert again.model.path == str(tmp_path / "m.pt")
    document = json.loads(request.describe(chosen, as_json=True))
    assert resolve(document["recipe"]) == again
    assert [line.partition(". ")[2] for line in text.splitlines() if line.startswith("#   ")] == document["plan"]
    assert document["plan"][0] == "samples"
    assert "build tensorrt-rtx" in document["plan"]
    assert "quantize" not in document["plan"]


def test_a_cache_is_the_given_folder_or_one_that_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with request.open_cache(Path("here"), discard=False) as cache:
        assert cache.folder == tmp_path / "here"
    monkeypatch.setenv("GPUOPT_CACHE_DIR", str(tmp_path / "default"))
    with request.open_cache(None, discard=False) as cache:
        assert cache.folder == tmp_path / "default"
    with request.open_cache(Path("here"), discard=True) as cache:
        cache.remember("last", "x", 1)
        kept = cache.folder
    assert not kept.exists()
    assert list(tmp_path.iterdir()) == []


def test_the_cache_command_counts_and_clears(tmp_path: Path) -> None:
    empty = json.loads(request.cache_state(tmp_path / "cache", clear=False, as_json=True))
    assert empty == {"folder": str(tmp_path / "cache"), "entries": 0, "size_bytes": 0, "cleared_entries": 0}
    cache = Cache(tmp_path / "cache")
    with cache.scratch() as scratch:
        (scratch / "staged" / "onnx").mkdir(parents=True)
        (scratch / "staged" / "onnx" / "model.onnx").write_bytes(bytes(3000))
        cache.store({"a": "b"}, scratch / "staged", {"facts": {}, "warnings": [], "seconds": 0})
    state = json.loads(request.cache_state(tmp_path / "cache", clear=False, as_json=True))
    assert state["entries"] == 1
    assert state["size_bytes"] > 3000
    assert "1 entries" in request.cache_state(tmp_path / "cache", clear=False, as_json=False)
    cleared = json.loads(request.cache_state(tmp_path / "cache", clear=True, as_json=True))
    assert (cleared["cleared_entries"], cleared["entries"], cleared["size_bytes"]) == (1, 0, 0)


def test_doctor_tells_every_target_and_package() -> None:
    text = request.doctor(as_json=False)
    document = json.loads(request.doctor(as_json=True))
    assert [t["target"] for t in document["targets"]] == [s.target for s in environment.target_states()]
    for target in document["targets"]:
        assert f"{target['target']:<14}{'ready' if target['ready'] else 'not ready'}" in text
        assert bool(target["needs"]) != target["ready"]
        for need in target["needs"]:
            assert need in text
    assert document["packages"]["onnx"] in text
