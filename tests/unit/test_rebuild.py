"""Which engine `gpuopt build` makes of a bundle, and which it refuses before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from gpuopt import bundle as bundles
from gpuopt import environment, onnx_model, rebuild
from gpuopt.cache import Cache
from gpuopt.environment import Gpu
from gpuopt.errors import StorageError, UsageError
from gpuopt.pipeline import Runner
from gpuopt.progress import Silent
from gpuopt.recipe import Recipe, resolve, set_value
from gpuopt.report.model import Report


def bundle(folder: Path, opset: int = 17, **settings: Any) -> Path:
    """As much of a bundle as the choice of the engine looks at; settings by recipe key with `__` for the dot."""
    tree: dict[str, Any] = {"model": {"path": "m.onnx"}, "build": {"target": ["tensorrt", "onnxruntime"]}}
    for key, value in {"build__legacy": False, **settings}.items():
        set_value(tree, key.replace("__", "."), value)
    (folder / "recipe.yaml").write_text(resolve(tree).to_yaml())
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="a")], "g", values[:1], values[1:])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(made, str(folder / "model.onnx"))
    return folder


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the machine one with these modules, this TensorRT, and a GPU or none."""

    def make(*modules: str, version: tuple[int, int] | None = None, gpu: bool = True) -> None:
        monkeypatch.setattr(environment, "has_module", lambda name: name in modules)
        monkeypatch.setattr(environment, "gpus", lambda: [Gpu("NVIDIA L40S", "8.9", "12.4")] if gpu else [])
        monkeypatch.setattr(environment, "tensorrt_version", lambda: version)

    return make


def chosen(folder: Path, target: str | None = None, *settings: str) -> Recipe:
    return rebuild._recipe(folder, target, settings)


@pytest.mark.parametrize(
    ("precision", "target", "version"),
    [
        ("int8", "tensorrt-rtx", None),
        ("fp16", "tensorrt-rtx", None),
        ("int8", "tensorrt", (10, 3)),
        ("fp16", "tensorrt", (11, 0)),
    ],
)
def test_a_graph_for_tensorrt_8_is_not_built_as_another_precision(
    precision: str, target: str, version: tuple[int, int] | None, machine: Any, tmp_path: Path
) -> None:
    machine("onnxruntime", "tensorrt", "tensorrt_rtx", version=version)
    folder = bundle(tmp_path, precision=precision, build__legacy=True)
    with pytest.raises(UsageError, match="computes in FP32 what is FP32 in the graph") as caught:
        chosen(folder, target)
    assert caught.value.hint == "Compile again without build.legacy."
    with pytest.raises(UsageError, match="cannot change"):
        chosen(folder, target, "build.legacy=false")


def test_a_timing_cache_in_the_bundle_is_refused(machine: Any, tmp_path: Path) -> None:
    machine("onnxruntime", "tensorrt", version=(10, 3))
    folder = bundle(tmp_path)
    with pytest.raises(UsageError, match="lies in") as caught:
        chosen(folder, None, f"build.timing_cache={folder / 'model.tensorrt.timing'}")
    assert caught.value.hint == "Copy it elsewhere and name the copy."
    beside = tmp_path.parent / "copy.timing"
    assert chosen(folder, None, f"build.timing_cache={beside}").build.timing_cache == str(beside)


def test_where_timings_came_from_is_not_kept(machine: Any, tmp_path: Path) -> None:
    machine("onnxruntime", "tensorrt", version=(10, 3))
    for before in (None, "first.timing"):
        folder = bundle(tmp_path, build__timing_cache=before)
        asked = ("build.timing_cache=other.timing", "build.require_timing_cache=true", "build.attempts=1")
        recipe = chosen(folder, None, *asked)
        report = Report.model_construct(engines=[])
        kept = rebuild._bundle_recipe(folder, recipe, report).build
        assert (kept.timing_cache, kept.require_timing_cache, kept.attempts) == (before, False, 1)


def test_tensorrt_with_a_gpu_comes_first_whatever_the_bundle_was_made_for(machine: Any, tmp_path: Path) -> None:
    folder = bundle(tmp_path, build__target=["tensorrt-rtx", "onnxruntime"])
    machine("onnxruntime", "tensorrt", "tensorrt_rtx", version=(10, 3))
    assert chosen(folder).build.target == ("tensorrt", "onnxruntime")
    assert chosen(folder, "tensorrt-rtx").build.target == ("tensorrt-rtx", "onnxruntime")
    machine("onnxruntime", "tensorrt", "tensorrt_rtx", version=(10, 3), gpu=False)
    assert chosen(folder).build.target == ("tensorrt-rtx", "onnxruntime")
    with pytest.raises(UsageError, match=r"model\.onnx, is in the bundle already"):
        chosen(folder, "onnxruntime")
    machine("onnxruntime")
    with pytest.raises(UsageError, match="no engine can be built here"):
        chosen(folder)


@pytest.mark.parametrize(
    "settings",
    [{"precision": "fp32"}, {"quantize__quantizer": "tensorrt"}],
    ids=["FP32 was asked for", "TensorRT's calibrator"],
)
def test_a_graph_for_tensorrt_8_that_loses_nothing_is_built_by_newer_ones(
    settings: dict[str, Any], machine: Any, tmp_path: Path
) -> None:
    machine("onnxruntime", "tensorrt", version=(10, 3))
    assert chosen(bundle(tmp_path, build__legacy=True, **settings)).build.target[0] == "tensorrt"


def test_tensorrt_8_is_told_what_it_does_not_read(machine: Any, tmp_path: Path) -> None:
    machine("onnxruntime", "tensorrt", version=(8, 5))
    with pytest.raises(UsageError, match=r"TensorRT 8\.5 does not read INT8"):
        chosen(bundle(tmp_path))
    with pytest.raises(UsageError, match=r"up to opset 17, model\.onnx has opset 18"):
        chosen(bundle(tmp_path, 18, build__legacy=True))
    assert chosen(bundle(tmp_path, build__legacy=True)).build.legacy
    machine("onnxruntime", "tensorrt", version=(10, 3))
    assert chosen(bundle(tmp_path, 20)).build.target[0] == "tensorrt"


def test_plugins_that_a_bundle_names_are_not_loaded_on_its_word(tmp_path: Path, machine: Any) -> None:
    machine("tensorrt", version=(10, 3))
    folder = bundle(tmp_path, build__plugins=["libevil.so"])
    with pytest.raises(UsageError, match=r"names plugin libraries, whose code would run: libevil.so"):
        rebuild._recipe(folder, None, ())
    found = rebuild._recipe(folder, None, ("build.plugins=[libmine.so]",))
    assert found.build.plugins == ("libmine.so",)


def with_weights_in(location: str, in_a_branch: bool) -> onnx.ModelProto:
    """A graph whose one weight lies in a file of that name, in the graph itself or in a branch."""
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4], data_location=1)
    weight.external_data.add(key="location", value=location)
    made = helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [4])
    inner = helper.make_graph([], "inner", [], [made], [weight])
    condition = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    outer = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)],
        "outer",
        [condition],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])],
    )
    graph = outer if in_a_branch else inner
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def adopted(folder: Path, scratch: Path) -> Path | None:
    """The artifact of the bundle's graph."""
    runner = Runner(resolve({"model": {"path": "m"}}), Cache(scratch / "cache"), Silent(), "build")
    rebuild._adopt(runner, folder, bundles.open_bundle(folder)["files"], scratch)
    artifact = runner.artifact("onnx")
    return artifact.path if artifact else None


@pytest.mark.parametrize("in_a_branch", [False, True])
@pytest.mark.parametrize(
    "location", ["../loot", "../model.gpuopt/loot", "reference/../../loot", "ABSOLUTE", "absent", ""]
)
def test_weights_of_a_bundle_come_from_no_other_file_and_go_nowhere_else(
    location: str, in_a_branch: bool, tmp_path: Path
) -> None:
    folder, home = tmp_path / "download/model.gpuopt", tmp_path / "home"
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference/reference.json").write_text("{}")
    (home / "scratch").mkdir(parents=True)
    graph = with_weights_in(location.replace("ABSOLUTE", str(tmp_path / "download/loot")), in_a_branch)
    (tmp_path / "graph").write_bytes(graph.SerializeToString())
    files = {"model.onnx": tmp_path / "graph", "reference": tmp_path / "reference"}
    bundles.write(folder, files, {"loot": "inside"}, {})
    (tmp_path / "download/loot").write_bytes(bytes(16))
    with pytest.raises(StorageError, match="is no file of the bundle"):
        adopted(folder, home / "scratch")
    assert not list(home.rglob("loot"))


@pytest.mark.parametrize("in_a_branch", [False, True])
def test_weights_beside_a_bundles_graph_are_taken_along(in_a_branch: bool, tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference/reference.json").write_text("{}")
    (tmp_path / "graph").write_bytes(with_weights_in("model.onnx.data", in_a_branch).SerializeToString())
    (tmp_path / "data").write_bytes(bytes(range(16)))
    files = {"model.onnx": tmp_path / "graph", "model.onnx.data": tmp_path / "data"}
    bundles.write(tmp_path / "b", {**files, "reference": tmp_path / "reference"}, {}, {})
    made = adopted(tmp_path / "b", tmp_path)
    assert made is not None
    assert (made / "model.onnx.data").read_bytes() == bytes(range(16))
    onnx_model.load(made)
