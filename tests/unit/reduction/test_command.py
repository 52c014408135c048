"""Failed folders: nothing of the user's is lost, no code of somebody else runs, and the failure is kept in time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from gpuopt import bundle, environment, time_limit
from gpuopt.cache import Cache
from gpuopt.errors import BuildError, GpuoptError, QuantizationError, RequirementError, StorageError, UsageError
from gpuopt.pipeline import STAGES, Runner, Step
from gpuopt.progress import Silent
from gpuopt.recipe import resolve
from gpuopt.reduction import command, reproduction
from gpuopt.reduction.attempts import Attempts, Check, signature
from gpuopt.reduction.reproduction import Wish
from gpuopt.reduction.subgraph import Pieces
from gpuopt.request import Flags
from gpuopt.shapes import ShapeRange
from tests.unit.inspection import bundles

PROFILE = {"x": ShapeRange((2, 8), (2, 8), (2, 8))}


def tanh(folder: Path) -> Path:
    """A graph that nothing can be quantized in."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 8]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Tanh", ["x"], ["y"])], "tanh", values[:1], values[1:])
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


def failed(folder: Path, **sections: Any) -> Path:
    """A folder as `compile` leaves it, of a recipe with these sections."""
    recipe = resolve({"model": {"path": str(folder / "gone.onnx")}, "build": {"target": ["tensorrt-rtx"]}, **sections})
    about = {"created": "", "gpuopt_version": ""}
    bundle.write(folder / "model.gpuopt.failed", {}, {"recipe.yaml": recipe.to_yaml(), "report.md": ""}, about)
    return folder / "model.gpuopt.failed"


def reduce(subject: Path, output: Path | None = None) -> None:
    recipe = command.recipe_of(subject, Flags(), ())
    cache = Cache(subject.resolve().parent / "cache")
    command.reduce(command.Request(subject, recipe, None, output, Wish(1)), cache, Silent())


def everything(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def with_notes(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def with_more_in_the_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../victim.txt"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))


def with_a_link(folder: Path) -> None:
    (folder / "report.md").unlink()
    (folder / "report.md").symlink_to(folder.parent / "victim.txt")


def with_another_recipe(folder: Path) -> None:
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("seed: 0", "seed: 1"))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (with_notes, UsageError),
        (with_more_in_the_manifest, StorageError),
        (with_a_link, StorageError),
        (with_another_recipe, StorageError),
    ],
)
def test_a_folder_that_is_not_as_it_was_written_is_left_alone(
    change: Callable[[Path], None], kind: type[GpuoptError], tmp_path: Path
) -> None:
    (tmp_path / "victim.txt").write_text("private")
    folder = failed(tmp_path)
    change(folder)
    before = everything(tmp_path)
    with pytest.raises(kind) as caught:
        reduce(folder)
    assert "gone.onnx" not in caught.value.message
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", [".", "mine", "failure/mine"])
def test_nothing_but_the_failure_goes_into_a_failed_folder(name: str, tmp_path: Path) -> None:
    folder = failed(tmp_path)
    with pytest.raises(UsageError, match="lies in the folder"):
        reduce(folder, folder / name)


def test_the_current_folder_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(failed(tmp_path))
    with pytest.raises(UsageError, match="is the current folder"):
        reduce(Path())


@pytest.mark.parametrize(
    ("sections", "flags", "settings"),
    [
        ({"model": {"factory": "os:abort"}}, Flags(), ("model.factory=os:abort",)),
        ({"model": {"path": "a.pt", "trust_pickle": True}}, Flags(), ("model.trust_pickle=true",)),
        ({"accuracy": {"max_drop": 0.1, "metric": "os:abort"}}, Flags(), ("accuracy.metric=os:abort",)),
        ({"calibrate": {"data": "os:abort"}}, Flags(), ("calibrate.data=os:abort",)),
        ({"build": {"plugins": ["a b.so"]}}, Flags(), ('build.plugins=["a b.so"]',)),
        ({"build": {"plugins": ["a b.so"]}}, Flags(plugins=("other.so",)), ()),
    ],
)
def test_code_that_a_failed_recipe_names_has_to_be_named_again(
    sections: dict[str, Any], flags: Flags, settings: tuple[str, ...], tmp_path: Path
) -> None:
    folder = failed(tmp_path, **sections)
    with pytest.raises(UsageError, match="names code that would run") as caught:
        command.recipe_of(folder, Flags(), ())
    for setting in settings:
        assert setting in caught.value.hint
    recipe = command.recipe_of(folder, flags, settings)
    assert not flags.plugins or recipe.build.plugins == flags.plugins


def test_flags_go_over_a_failed_recipe_which_names_no_file_that_is_written(tmp_path: Path) -> None:
    folder = failed(tmp_path, build={"target": ["tensorrt-rtx"], "timing_cache": "/etc/passwd"})
    recipe = command.recipe_of(folder, Flags(target=("tensorrt",)), ("precision=fp16",))
    assert recipe.build.target == ("tensorrt",)
    assert recipe.precision == "fp16"
    assert recipe.build.timing_cache is None
    mine = command.recipe_of(folder, Flags(), ("build.timing_cache=mine",))
    assert mine.build.timing_cache == "mine"


def test_a_failure_without_a_graph_says_why_in_one_line(tmp_path: Path) -> None:
    recipe = resolve({"model": {"path": "x"}})
    runner = Runner(recipe, Cache(tmp_path / "cache"), Silent(), "run")
    runner.at_work = Step(next(stage for stage in STAGES if stage.name == "export"))
    document = command.describe(recipe, runner, BuildError("it broke"), Wish(1), Silent(), tmp_path)
    assert command.told_of(document) == "log and versions, and no graph (the export stage takes none)"


def test_no_name_of_the_users_home_is_in_a_note(tmp_path: Path) -> None:
    message = f"cannot open {Path.home()}/networks/model.onnx"
    check = Check("build", resolve({"model": {"path": "x"}}), "tensorrt-rtx")
    document = reproduction.note(BuildError(message), check, message, tmp_path)
    assert str(Path.home()) not in (tmp_path / "failure.json").read_text()
    assert document["signature"] == signature(BuildError("cannot open ~/networks/model.onnx"))


@pytest.mark.skipif("tensorrt" in environment.default_targets(), reason="TensorRT builds here")
def test_what_the_target_lacks_is_no_failure_of_the_graph(tmp_path: Path) -> None:
    path = tanh(tmp_path)
    recipe = command.recipe_of(path, Flags(target=("tensorrt",)), ())
    asked = command.Request(path, recipe, None, None, Wish(60))
    with pytest.raises(RequirementError, match="target tensorrt cannot be built here"):
        command.reduce(asked, Cache(tmp_path / "cache"), Silent())
    with pytest.raises(RequirementError):
        reproduction.reproduce(path, PROFILE, Check("build", recipe, "tensorrt"), Wish(60), Silent(), tmp_path)


def test_the_tries_leave_time_to_write_what_is_found() -> None:
    assert command.seconds_for_tries(60) == 60
    with time_limit.within(25):
        assert 9 < command.seconds_for_tries(60) <= 10
        assert command.seconds_for_tries(3) == 3
    with time_limit.within(4):
        assert command.seconds_for_tries(60) < 0


def test_the_pipeline_is_ended_when_the_time_is_up(tmp_path: Path) -> None:
    piece = Pieces(onnx.load(str(tanh(tmp_path))), PROFILE).piece((0,))
    assert piece is not None
    check = Check("quantize", resolve({"model": {"path": "x"}, "build": {"target": ["onnxruntime"]}}))
    with Attempts(check, 0.5) as attempts:
        assert attempts.error_of(piece) is None
        assert attempts.is_over()


def test_a_failure_that_cannot_be_reduced_is_kept_as_log_and_versions(tmp_path: Path) -> None:
    recipe = resolve(
        {
            "model": {"path": str(tanh(tmp_path))},
            "precision": "int8",
            "calibrate": {"random": True, "samples": 2},
            "build": {"target": ["onnxruntime"]},
        }
    )
    runner = Runner(recipe, Cache(tmp_path / "cache"), Silent(), "test")
    with pytest.raises(QuantizationError) as caught:
        runner.run(until="quantize")
    reference = runner.artifact("reference")
    assert reference is not None
    shutil.rmtree(reference.path)
    error = BuildError(caught.value.message)
    with time_limit.within(600), command.kept(recipe, runner, error, Silent()) as files:
        assert set(files) == {"failure/failure.json", "failure/log.txt"}
        document = json.loads(files["failure/failure.json"].read_text())
        assert time_limit.ends() is None
    assert document["error"]["message"] == caught.value.message
    assert document["why_no_graph"].startswith("the failure could not be reduced")


def test_a_graph_of_a_bundle_has_the_shapes_it_was_compiled_for(tmp_path: Path) -> None:
    graph = bundles.make(tmp_path / "a.gpuopt") / "model.onnx"
    found = command._profile(graph, command.recipe_of(graph, Flags(), ()))
    assert found == {"x": ShapeRange((1, 16, 8, 8), (4, 16, 8, 8), (8, 16, 8, 8))}
    asked = command._profile(graph, command.recipe_of(graph, Flags(inputs=("x:64x16x8x8",)), ()))
    assert asked["x"].max == (64, 16, 8, 8)
    assert command._beside(graph) == tmp_path / "model.failure"
    alone = shutil.copy(graph, tmp_path / "alone.onnx")
    with pytest.raises(UsageError, match="is open") as caught:
        command._profile(Path(alone), command.recipe_of(Path(alone), Flags(), ()))
    assert "--input x:1x16x8x8" in caught.value.hint
