"""The recipe: one place where a value can be wrong, one kind of message for it."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gpuopt import recipe
from gpuopt.errors import StorageError, UsageError
from gpuopt.recipe import Recipe, load, parse_setting, resolve, set_value
from gpuopt.shapes import ShapeRange

MINIMAL: dict[str, Any] = {"model": {"path": "m.pt"}}


def with_value(key: str, value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {"model": {"path": "m.pt"}}
    set_value(tree, key, value)
    return tree


def refusal(tree: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        resolve(tree)
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("calibrat", "calibrate"),
        ("model.factori", "model.factory"),
        ("quantize.per_chanel", "quantize.per_channel"),
        ("calibrate.images.resise", "calibrate.images.resize"),
        ("inputs.x.shapes", "inputs.x.shape"),
        ("inputs.shape.dtyp", "inputs.shape.dtype"),
        ("verify.min_cosin", "verify.min_cosine"),
    ],
)
def test_an_unknown_key_names_the_nearest_right_one(key: str, suggestion: str) -> None:
    error = refusal(with_value(key, 1))
    assert f"unknown key '{key}'" in error.message
    assert error.hint == f"Did you mean '{suggestion}'?"


@pytest.mark.parametrize("name", ["x", "shape", "min"])
def test_an_unknown_key_in_a_profile_names_the_nearest_right_one(name: str) -> None:
    error = refusal({**MINIMAL, "profiles": [{"y": {"opt": "1"}}, {name: {"mxa": "1x3"}}]})
    assert f"unknown key 'profiles.1.{name}.mxa'" in error.message
    assert error.hint == f"Did you mean 'profiles.1.{name}.max'?"


def test_an_unknown_key_like_no_other_lists_what_is_known() -> None:
    error = refusal(with_value("simplify.zzz", 1))
    assert error.hint == "Known here: enabled."


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("precision", "int4"),
        ("export.opset", "twenty"),
        ("export.opset", 16),
        ("export.exporters", []),
        ("export.exporters", "onnx"),
        ("export.seed", -1),
        ("calibrate.samples", 0),
        ("calibrate.percentile", 50),
        ("quantize.op_types", 5),
        ("build.target", "tensorrtx"),
        ("build.optimization_level", 6),
        ("verify.min_cosine", 1.5),
        ("verify.min_cosine", math.nan),
        ("verify.min_sqnr_db", math.inf),
        ("inputs.x.low", math.nan),
        ("model.factory", "not a factory"),
        ("model.factory", "os.system('x'):y"),
        ("inputs", 5),
        ("inputs.x", "1x3"),
        ("inputs.x.dtype", "float8"),
        ("inputs.x.shape", "1xa"),
        ("inputs.x.shape", [1, 0]),
        ("inputs.x.shape", [1, -3]),
        ("inputs.x.shape", -1),
        ("inputs.x.shape", True),
        ("inputs.x.shape", 1.5),
        ("inputs.x.shape", {"a": 1}),
        ("profiles", {"x": 1}),
        ("output.directory", 7),
        ("version", 2),
        ("simplify", None),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(key: str, value: Any) -> None:
    assert key in refusal(with_value(key, value)).message


@pytest.mark.parametrize("tree", [{}, {"precision": "fp16"}])
def test_a_recipe_without_a_model_says_so(tree: dict[str, Any]) -> None:
    error = refusal(tree)
    assert "'model' is missing" in error.message
    assert "path or factory" in error.hint


def test_a_model_section_without_path_and_factory_is_refused() -> None:
    assert "give a path, a factory, or both" in refusal({"model": {"trust_pickle": True}}).message


@pytest.mark.parametrize("tree", [{1: 2, **MINIMAL}, {None: 1, **MINIMAL}, {**MINIMAL, "inputs": {3: {}}}])
def test_keys_that_are_no_text_are_refused(tree: dict[Any, Any]) -> None:
    refusal(tree)


def test_several_problems_are_counted() -> None:
    error = refusal({**MINIMAL, "precison": "int8", "buld": {}})
    assert error.message.endswith("(and 1 more)")


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx", ["onnxruntime", "tensorrt"]])
def test_qoperator_is_refused_for_tensorrt_with_the_reason(target: Any) -> None:
    error = refusal({**MINIMAL, "quantize": {"format": "qoperator"}, "build": {"target": target}})
    assert error.message.startswith("recipe: quantize.format qoperator is for ONNX Runtime")
    assert "QLinearConv" in error.message


def test_qoperator_is_taken_for_onnxruntime_alone() -> None:
    assert resolve({**MINIMAL, "quantize": {"format": "qoperator"}, "build": {"target": "onnxruntime"}})


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            "onnxruntime",
            "engines of build.target tensorrt alone, and build.target is onnxruntime: nothing would be INT8",
        ),
        ("tensorrt-rtx", "TensorRT-RTX has no calibrators"),
        (["tensorrt", "tensorrt-rtx"], "TensorRT-RTX has no calibrators"),
    ],
)
def test_the_native_quantizer_is_refused_for_other_targets_than_tensorrt(target: Any, said: str) -> None:
    assert said in refusal({**MINIMAL, "quantize": {"quantizer": "tensorrt"}, "build": {"target": target}}).message


def test_the_native_quantizer_leaves_the_graph_in_fp32() -> None:
    chosen = resolve({**MINIMAL, "quantize": {"quantizer": "tensorrt"}, "build": {"target": "tensorrt"}})
    assert (chosen.built_precision, chosen.graph_precision) == ("int8", "fp32")
    assert resolve(MINIMAL).graph_precision == "int8"
    assert resolve({**MINIMAL, "precision": "fp16"}).graph_precision == "fp16"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"shape": "1x3"}, ((1, 3), (1, 3), (1, 3))),
        ({"shape": 8}, ((8,), (8,), (8,))),
        ({"shape": [2, 3]}, ((2, 3), (2, 3), (2, 3))),
        ({"max": "8x3"}, ((8, 3), (8, 3), (8, 3))),
        ({"min": "1x3", "max": "8x3"}, ((1, 3), (8, 3), (8, 3))),
        ({"min": "1x3", "opt": "4x3"}, ((1, 3), (4, 3), (4, 3))),
        ({"min": "1", "shape": "2", "max": "4"}, ((1,), (2,), (4,))),
        ({"shape": "1", "opt": "4", "max": "8"}, ((1,), (4,), (8,))),
        ({"min": "1", "opt": "4", "shape": "8"}, ((1,), (4,), (8,))),
        ({"shape": "scalar"}, ((), (), ())),
        ({"min": "scalar", "max": []}, ((), (), ())),
    ],
)
def test_an_inputs_range_fills_what_is_missing_from_its_shape_or_nearest_neighbour(given: Any, expected: Any) -> None:
    assert resolve({**MINIMAL, "inputs": {"x": given}}).inputs["x"].range() == ShapeRange(*expected)


def test_an_input_without_shapes_has_no_range() -> None:
    assert resolve({**MINIMAL, "inputs": {"x": {"dtype": "int64"}}}).inputs["x"].range() is None


@pytest.mark.parametrize("section", [{"min": "8", "max": "1"}, {"min": "1x3", "max": "3"}, {"opt": "1", "max": "1x1"}])
def test_shapes_that_are_no_range_are_refused_by_the_inputs_name(section: dict[str, str]) -> None:
    assert "inputs.tokens" in refusal({**MINIMAL, "inputs": {"tokens": section}}).message


@pytest.mark.parametrize("section", [{"low": 5, "high": 1}, {"low": 5}, {"high": -1}])
def test_value_bounds_in_the_wrong_order_are_refused(section: dict[str, float]) -> None:
    error = refusal({**MINIMAL, "inputs": {"x": section}})
    assert "inputs.x" in error.message
    assert "is above high" in error.message


def test_a_budget_above_all_there_is_is_refused_but_for_a_metric_of_ones_own() -> None:
    accuracy = {"max_drop": 50}
    with pytest.raises(UsageError, match=r"max_drop 50 is 5000%, above all there is: write 0\.5%"):
        recipe.resolve({"model": {"path": "m"}, "accuracy": accuracy})
    own = recipe.resolve({"model": {"path": "m"}, "accuracy": {**accuracy, "metric": "a:b"}})
    assert own.accuracy.max_drop == 50


def test_a_further_profile_that_leaves_a_shape_open_is_refused() -> None:
    with pytest.raises(UsageError, match=r"profiles\.1 gives no shape for y"):
        resolve({**MINIMAL, "profiles": [{"x": {"opt": "1"}}, {"x": {"opt": "1"}, "y": {}}]}).extra_profiles()


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model: &m {path: a}\nother: *m\n", "aliases are not allowed"),
        (BOMB.encode(), "aliases are not allowed"),
        (b"model: {path: a}\nmodel: {path: b}\n", "a key is repeated"),
        (b"model: {path: a, path: b}\n", "a key is repeated"),
        (b"", "holds no sections"),
        (b"- a\n- b\n", "holds no sections"),
        (b"just text\n", "holds no sections"),
        (b"\x80\x02}q\x00.", "is not a recipe"),
        (b"\xff\xfe\x00\x01", "is not a recipe"),
        (b"model: [unclosed\n", "is not a recipe"),
        (b"model: !!python/object/apply:os.system ['true']\n", "is not a recipe"),
        (b"? [a]\n: b\n", "is not a recipe"),
        (b"model: 2024-99-99\n", "is not a recipe"),
        (b"model: !!timestamp x\n", "is not a recipe"),
        (b"model: !!bool x\n", "is not a recipe"),
        (b"model: !!int ''\n", "is not a recipe"),
        (b"[" * 20000, "is not a recipe"),
        (b"a: " + b"9" * 5000 + b"\n", "is not a recipe"),
        (b"x" * (recipe.MAX_RECIPE_BYTES + 1), "is larger than"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load(path)
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert str(path) in caught.value.message


@given(st.binary(max_size=60))
def test_any_bytes_are_either_a_mapping_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_bytes(content)
    with contextlib.suppress(UsageError):
        assert isinstance(load(path), dict)


def test_a_recipe_that_cannot_be_read_is_a_storage_error(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(StorageError, match="cannot read"):
            load(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("build.target=onnxruntime", ("build.target", "onnxruntime")),
        ("a.b=[x, y]", ("a.b", ["x", "y"])),
        ("a=1", ("a", 1)),
        ("a=true", ("a", True)),
        ("a=null", ("a", None)),
        ("a=", ("a", None)),
        ("a=b=c", ("a", "b=c")),
        ("a=1x3x224", ("a", "1x3x224")),
        (" a =1", ("a", 1)),
    ],
)
def test_a_setting_is_read_as_yaml(text: str, expected: tuple[str, Any]) -> None:
    assert parse_setting(text) == expected


@pytest.mark.parametrize("text", ["", "a", "=1", "a=[", "a=*x", "a={b: 1, b: 2}", "a=2024-99-99", "a=" + "[" * 20000])
def test_a_setting_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        parse_setting(text)


def test_set_value_makes_the_levels_that_lack_and_keeps_the_rest() -> None:
    tree: dict[str, Any] = {"a": {"x": 1}}
    set_value(tree, "a.b.c", 2)
    set_value(tree, "d", 3)
    assert tree == {"a": {"x": 1, "b": {"c": 2}}, "d": 3}


@pytest.mark.parametrize("level", [5, "text", [1], None])
def test_set_value_below_a_value_is_refused(level: Any) -> None:
    with pytest.raises(UsageError, match="holds a value, not a section"):
        set_value({"a": level}, "a.b", 1)


shape_texts = st.sampled_from(["1x3x224x224", "scalar", "7", "2x8"])
input_names = st.sampled_from(["", "x", "input:0", "on", "123", "null", "a.b", "é", "- y"])
trees = st.fixed_dictionaries(
    {"model": st.sampled_from([{"path": "m.pt"}, {"factory": "a.b:c", "path": "w: 1"}])},
    optional={
        "precision": st.sampled_from(["int8", "fp16", "fp32"]),
        "inputs": st.dictionaries(
            input_names,
            st.fixed_dictionaries(
                {},
                optional={"shape": shape_texts, "dtype": st.sampled_from(["int64", "bool"]), "low": st.floats(-9, 0)},
            ),
            max_size=3,
        ),
        "profiles": st.lists(st.dictionaries(input_names, st.fixed_dictionaries({"opt": shape_texts})), max_size=2),
        "calibrate": st.fixed_dictionaries(
            {}, optional={"images": st.fixed_dictionaries({"scale": st.floats(1e-9, 1)}), "data": st.text(max_size=5)}
        ),
        "quantize": st.fixed_dictionaries({"nodes_to_exclude": st.lists(st.text(max_size=4), max_size=2)}),
        "build": st.fixed_dictionaries({"target": st.sampled_from(["tensorrt", ["onnxruntime", "tensorrt-rtx"]])}),
        "verify": st.fixed_dictionaries({"min_cosine": st.floats(-1, 1)}),
    },
)


@given(trees)
def test_yaml_reads_back_to_an_equal_recipe(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    chosen = resolve(tree)
    path = tmp_path_factory.getbasetemp() / "resolved.yaml"
    path.write_text(chosen.to_yaml(), encoding="utf-8")
    assert resolve(load(path)) == chosen
    assert resolve(yaml.safe_load(chosen.to_yaml())) == chosen


def test_a_restricted_recipe_hides_undeclared_sections() -> None:
    whole = resolve(
        {
            "model": {"path": "secret.pt"},
            "precision": "fp16",
            "quantize": {"min_channels": 3},
            "export": {"seed": 7, "opset": 18},
            "build": {
                "compute_capability": ["8.6"],
                "optimization_level": 2,
                "workspace": "64MiB",
                "target": "tensorrt",
            },
        }
    )
    seen = whole.restricted_to(
        ("quantize", "export.seed", "build.compute_capability", "build.optimization_level", "build.workspace")
    )
    assert seen.quantize == whole.quantize
    assert (seen.export.seed, seen.export.opset) == (7, Recipe.model_fields["export"].default.opset)
    assert (seen.build.compute_capability, seen.build.optimization_level, seen.build.workspace) == (
        ("8.6",),
        2,
        64 << 20,
    )
    assert seen.build.target == ()
    assert seen.precision == "int8"
    assert seen.model.path is None
    assert whole.restricted_to(("model", "precision")).model == whole.model
    assert whole.export.opset == 18, "the whole recipe must stay as it was"


def test_a_recipe_cannot_be_changed() -> None:
    chosen = resolve(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        chosen.export.opset = 18  # type: ignore[misc]
