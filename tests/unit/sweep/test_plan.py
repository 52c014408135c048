"""A sweep's file and the combinations that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gpuopt.errors import UsageError
from gpuopt.shapes import format_shape
from gpuopt.sweep import command, plan
from gpuopt.sweep.plan import SweepFile

MODELS = {
    "a": {"model": {"path": "a.onnx"}, "inputs": {"x": {"shape": "1x3x8x8"}}},
    "b": {"model": {"path": "b.pt"}, "inputs": {"ids": {"min": "1x8", "opt": "2x16", "max": "4x32"}}},
}


def sweep(**changes: Any) -> SweepFile:
    tree = {"models": MODELS, "precisions": ["int8", "fp16"], "targets": ["onnxruntime", "tensorrt-rtx"], **changes}
    return SweepFile.model_validate(tree)


def names(**changes: Any) -> list[str]:
    return [one.name for one in plan.combinations(sweep(**changes))]


def test_every_combination_in_the_file_s_order() -> None:
    found = names(batches=[1, 8])
    assert len(found) == 2 * 2 * 2 * 2
    assert found[:3] == ["a-int8-onnxruntime-b1", "a-int8-onnxruntime-b8", "a-int8-tensorrt-rtx-b1"]
    assert names()[0] == "a-int8-onnxruntime"


def test_what_is_said_later_goes_over_what_is_said_before() -> None:
    models = {"a": {**MODELS["a"], "build": {"workspace": "1GiB", "refit": True}}}
    target = {"target": "tensorrt-rtx", "name": "ada", "gpu": "L4", "build": {"refit": False}}
    base = {"build": {"workspace": "9GiB", "tf32": False}, "verify": {"batch_invariance": False}}
    (one,) = plan.combinations(sweep(models=models, precisions=["fp16"], targets=[target], recipe=base))
    build = one.recipe.build
    assert (build.workspace, build.refit, build.tf32, build.target) == (1 << 30, False, False, ("tensorrt-rtx",))
    assert (one.name, one.gpu, one.recipe.precision) == ("a-fp16-ada", "L4", "fp16")
    assert not one.recipe.verify.batch_invariance


def test_a_batch_is_the_first_axis_of_every_input_and_bounds_are_widened_to_hold_it() -> None:
    shapes = {}
    for one in plan.combinations(sweep(precisions=["fp16"], targets=["onnxruntime"], batches=[1, 8])):
        for section in one.recipe.inputs.values():
            told = (section.shape, section.min, section.opt, section.max)
            shapes[one.model, one.batch] = [format_shape(shape) for shape in told if shape is not None]
    assert shapes == {
        ("a", 1): ["1x3x8x8"],
        ("a", 8): ["8x3x8x8"],
        ("b", 1): ["1x8", "1x16", "4x32"],
        ("b", 8): ["1x8", "8x16", "8x32"],
    }


def test_exclusions_take_out_what_has_all_of_their_parts() -> None:
    exclude = [{"model": "a", "precision": "int8"}, {"target": "tensorrt-rtx", "batch": 8}]
    found = names(batches=[1, 8], exclude=exclude)
    assert len(found) == 16 - 4 - 3
    assert not [name for name in found if name.startswith("a-int8") or name.endswith("rtx-b8")]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no models": ({"models": {}}, "models"),
    "a name that leaves the folder": ({"models": {"../a": MODELS["a"]}}, "names a folder"),
    "a target's, too": ({"targets": [{"target": "tensorrt", "name": "a/b"}]}, "names a folder"),
    "two targets of one name": ({"targets": ["tensorrt", "tensorrt"]}, "two targets have one name"),
    "an unknown key": ({"batch": [1]}, "batch"),
    "an unknown target": ({"targets": ["tpu"]}, "targets"),
    "a batch of zero": ({"batches": [0]}, "batches"),
    "batches without shapes": (
        {"models": {"a": {"model": {"path": "a"}}}, "batches": [2]}, "a-int8-onnxruntime-b2: 'batches' needs the shapes"
    ),
    "an input without a shape": (
        {"models": {"a": {"model": {"path": "a"}, "inputs": {"x": {"dtype": "int64"}}}}, "batches": [2]}, "no shape"
    ),
    "a recipe's unknown key": ({"recipe": {"biuld": {}}}, "a-int8-onnxruntime: recipe: unknown key 'biuld'"),
    "what the sweep decides": ({"recipe": {"precision": "fp32"}}, "'precision' is the sweep's to decide"),
    "an idle exclusion": ({"exclude": [{"model": "c"}]}, "no combination has"),
    "everything excluded": ({"exclude": [{"model": "a"}, {"model": "b"}]}, "every combination"),
    "too many": ({"batches": list(range(1, 3000))}, "above 10000"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    tree = {"models": MODELS, "precisions": ["int8"], "targets": ["onnxruntime", "tensorrt-rtx"], **changes}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UsageError) as caught:
        plan.combinations(plan.read(path))
    assert message in caught.value.message


def test_a_key_changes_with_recipe_model_and_data_and_not_with_where_they_lie(tmp_path: Path) -> None:
    import numpy as np

    def key(folder: str, model: bytes = b"onnx", seed: int = 0, **recipe: Any) -> str | None:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        (place / "a.onnx").write_bytes(b"\x08\x0a" + model)
        np.savez(place / "data.npz", x=np.full((4, 3, 8, 8), seed, np.float32))
        models = {"a": {"model": {"path": str(place / "a.onnx")}, "inputs": {"x": {"shape": "1x3x8x8"}}}}
        base = {"calibrate": {"data": str(place / "data.npz"), **recipe}}
        (one,) = plan.combinations(sweep(models=models, precisions=["int8"], targets=["onnxruntime"], recipe=base))
        return command._key(one, {})

    first = key("one")
    assert first is not None
    assert key("two") == first
    others = [key("one", model=b"other"), key("one", seed=1), key("one", method="percentile")]
    assert len({first, *others}) == 4


def test_a_plugin_that_is_built_anew_under_its_name_changes_the_key(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\x08\x0aonnx")
    plugin = tmp_path / "libplugin.so"
    models = {"a": {"model": {"path": str(tmp_path / "a.onnx")}, "inputs": {"x": {"shape": "1x3"}}}}
    build = {"build": {"plugins": [str(plugin)]}}
    (one,) = plan.combinations(sweep(models=models, precisions=["fp16"], targets=["tensorrt"], recipe=build))
    keys = []
    for content in (b"first", b"second", b"first"):
        plugin.write_bytes(content)
        keys.append(command._key(one, {}))
    assert keys[0] is not None
    assert keys[0] == keys[2] != keys[1]


def test_what_comes_from_code_has_no_key() -> None:
    models = {"a": {"model": {"factory": "module:function"}, "inputs": {"x": {"shape": "1x3"}}}}
    (one,) = plan.combinations(sweep(models=models, precisions=["fp16"], targets=["onnxruntime"]))
    assert command._key(one, {}) is None
