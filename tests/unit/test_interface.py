"""Which inputs and shapes a model is compiled for: every source, every contradiction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuopt import recipe
from gpuopt.errors import DataError, UsageError
from gpuopt.interface import ResolvedInputs, StatedInput, corner_feeds, dynamic_axes, resolve, with_model_names
from gpuopt.shapes import ShapeRange, TensorSpec

STATIC = StatedInput(TensorSpec("x", "float32", (1, 3)), ShapeRange((1, 3), (1, 3), (1, 3)))
BOUNDED = StatedInput(TensorSpec("x", "float32", ("s0", 3)), ShapeRange((1, 3), (8, 3), (8, 3)))
UNBOUNDED = StatedInput(TensorSpec("x", "float32", ("s0", 3)), ShapeRange((1, 3), (16, 3), (16, 3)), (0,))
OPEN = StatedInput(TensorSpec("x", "float32", ("n", 3)), None)
SAMPLE = {"x": np.zeros((2, 3), np.float32)}


def asked(inputs: Any = None, profiles: Any = (), **sections: Any) -> recipe.Recipe:
    return recipe.resolve({"model": {"path": "m"}, "inputs": inputs or {}, "profiles": profiles, **sections})


def resolved(
    inputs: Any = None,
    parameters: tuple[str, ...] = (),
    stated: tuple[StatedInput, ...] = (),
    samples: Any = (),
    profiles: Any = (),
) -> ResolvedInputs:
    return resolve(asked(inputs, profiles), parameters, stated, list(samples))


def refusal(*arguments: Any, **named: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        resolved(*arguments, **named)
    assert caught.value.hint
    return caught.value


def ranges(found: ResolvedInputs) -> dict[str, tuple[Any, ...]]:
    return {name: (r.min, r.opt, r.max) for name, r in found.profiles[0].items()}


def test_shapes_come_from_the_recipe() -> None:
    found = resolved({"ids": {"min": "1x8", "max": "4x8", "dtype": "int64"}, "mask": {"shape": "1x8"}})
    assert found.inputs == (TensorSpec("ids", "int64", ("batch", 8)), TensorSpec("mask", "float32", (1, 8)))
    assert ranges(found)["ids"] == ((1, 8), (4, 8), (4, 8))
    assert found.warnings == ()


def test_a_lone_shape_takes_the_models_the_datas_or_forwards_name() -> None:
    lone = {"": {"shape": "1x3"}}
    assert [s.name for s in resolved(lone, stated=(STATIC,)).inputs] == ["x"]
    assert [s.name for s in resolved(lone, samples=[SAMPLE]).inputs] == ["x"]
    assert [s.name for s in resolved(lone, ("image", "flag")).inputs] == ["image"]
    assert [s.name for s in resolved(lone).inputs] == ["input"]


def test_a_lone_shape_for_several_inputs_is_refused() -> None:
    two = (STATIC, StatedInput(TensorSpec("y", "float32", (1,)), None))
    assert "needs a name: the model has the inputs x, y" in refusal({"": {"shape": "1x3"}}, stated=two).message


def test_shapes_come_from_the_model() -> None:
    assert ranges(resolved(stated=(STATIC,))) == {"x": ((1, 3),) * 3}
    assert resolved(stated=(STATIC,)).inputs[0].shape == (1, 3)
    bounded = resolved(stated=(BOUNDED,))
    assert ranges(bounded) == {"x": ((1, 3), (8, 3), (8, 3))}
    assert bounded.inputs[0].shape == ("batch", 3)
    assert bounded.warnings == ()


def test_an_upper_bound_that_the_model_does_not_set_is_told() -> None:
    found = resolved(stated=(UNBOUNDED,))
    assert "axes [0] of 'x'" in found.warnings[0]
    assert "16x3" in found.warnings[0]
    assert resolved({"x": {"min": "1x3", "max": "64x3"}}, stated=(UNBOUNDED,)).warnings == ()


def test_shapes_come_from_the_data_where_the_model_leaves_them_open() -> None:
    assert ranges(resolved(stated=(OPEN,), samples=[SAMPLE])) == {"x": ((2, 3),) * 3}
    assert ranges(resolved(samples=[{"a": np.zeros((1, 2)), "b": np.zeros(4, np.int32)}])) == {
        "a": ((1, 2),) * 3,
        "b": ((4,),) * 3,
    }


def test_the_recipe_goes_before_the_model_and_the_model_before_the_data() -> None:
    found = resolved({"x": {"shape": "4x3"}}, stated=(BOUNDED,), samples=[SAMPLE])
    assert ranges(found) == {"x": ((4, 3),) * 3}
    assert ranges(resolved(stated=(BOUNDED,), samples=[SAMPLE])) == {"x": ((1, 3), (8, 3), (8, 3))}


@pytest.mark.parametrize("stated", [(), (OPEN,)])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max": "8x3"}, ((2, 3), (8, 3), (8, 3))),
        ({"min": "1x3"}, ((1, 3), (2, 3), (2, 3))),
        ({"opt": "4x3"}, ((2, 3), (4, 3), (4, 3))),
        ({"opt": "1x3"}, ((1, 3), (1, 3), (2, 3))),
    ],
)
def test_an_end_that_is_left_out_comes_from_the_data_and_that_is_told(given: Any, expected: Any, stated: Any) -> None:
    found = resolved({"x": given}, stated=stated, samples=[SAMPLE])
    assert ranges(found) == {"x": expected}
    assert "comes from one calibration sample, 2x3; --min-shapes and --max-shapes choose" in found.warnings[0]


@pytest.mark.parametrize("given", [{"shape": "8x3"}, {"shape": "1x3", "max": "8x3"}, {"min": "1x3", "max": "8x3"}])
def test_shapes_that_are_given_are_not_those_of_the_data(given: Any) -> None:
    found = resolved({"x": given}, samples=[SAMPLE])
    assert ranges(found) == ranges(resolved({"x": given}))
    assert found.warnings == ()
    assert ranges(resolved({"x": {"max": "8x3"}}, stated=(BOUNDED,), samples=[SAMPLE]))["x"][0] == (1, 3)


def test_one_of_several_inputs_may_be_given_and_the_rest_come_from_the_data() -> None:
    sample = {"ids": np.zeros((1, 8), np.int64), "mask": np.zeros((1, 8), np.int64)}
    found = resolved({"ids": {"min": "1x8", "max": "4x8"}}, samples=[sample])
    assert ranges(found) == {"ids": ((1, 8), (4, 8), (4, 8)), "mask": ((1, 8),) * 3}


@pytest.mark.parametrize(
    ("inputs", "stated", "sample", "dtype"),
    [
        ({"x": {"shape": "2x3", "dtype": "int32"}}, (), np.zeros((2, 3), np.int64), "int32"),
        ({}, (StatedInput(TensorSpec("x", "int64", (2, 3)), None),), np.zeros((2, 3), np.float32), "int64"),
        ({}, (), np.zeros((2, 3), np.int16), "int16"),
        ({}, (), np.zeros((2, 3), np.float64), "float32"),
        ({"x": {"shape": "2x3"}}, (), None, "float32"),
    ],
)
def test_the_dtype_comes_from_recipe_model_data_in_this_order(
    inputs: Any, stated: Any, sample: Any, dtype: str
) -> None:
    found = resolved(inputs, stated=stated, samples=[] if sample is None else [{"x": sample}])
    assert found.inputs[0].dtype == dtype


@pytest.mark.parametrize(
    ("stated", "shapes"),
    [
        (STATIC, {"shape": "2x3"}),
        (STATIC, {"min": "1x3", "max": "2x3"}),
        (BOUNDED, {"shape": "9x3"}),
        (BOUNDED, {"shape": "1x4"}),
        (BOUNDED, {"shape": "3"}),
        (UNBOUNDED, {"shape": "1x4"}),
        (OPEN, {"shape": "1x4"}),
    ],
)
def test_shapes_that_the_model_does_not_take_are_refused(stated: StatedInput, shapes: Any) -> None:
    error = refusal({"x": shapes}, stated=(stated,))
    assert error.message.startswith("input 'x' takes ")
    assert ", not " in error.message


@pytest.mark.parametrize(("stated", "shapes"), [(BOUNDED, "8x3"), (UNBOUNDED, "999x3"), (OPEN, "5x3"), (STATIC, "1x3")])
def test_shapes_that_the_model_takes_are_taken(stated: StatedInput, shapes: str) -> None:
    assert resolved({"x": {"shape": shapes}}, stated=(stated,)).profiles


def test_a_lower_bound_holds_also_where_there_is_no_upper_one() -> None:
    stated = StatedInput(TensorSpec("x", "float32", ("s0", 3)), ShapeRange((4, 3), (16, 3), (16, 3)), (0,))
    assert "takes 4x3" in refusal({"x": {"shape": "3x3"}}, stated=(stated,)).message


def test_an_open_shape_says_how_to_give_it() -> None:
    error = refusal(stated=(OPEN,))
    assert error.message == "the shape of input 'x' (nx3) is open"
    assert "--input x:1x3," in error.hint
    assert "is open" in refusal({"y": {"dtype": "int64"}}).message


def test_nothing_known_names_what_forward_takes() -> None:
    error = refusal(parameters=("pixels", "mask"))
    assert "not known" in error.message
    assert "--input pixels:" in error.hint
    assert "pixels, mask" in error.hint


def test_a_name_that_the_model_does_not_have_is_refused_with_the_nearest() -> None:
    error = refusal({"xs": {"shape": "1x3"}}, stated=(STATIC,))
    assert error.message == "the model has no input 'xs'; it has x"
    assert error.hint == "Did you mean 'x'?"
    assert refusal({"zzzz": {"shape": "1x3"}}, stated=(STATIC,)).hint == "Use one of these names."


def test_more_names_than_forward_takes_are_refused() -> None:
    inputs = {"a": {"shape": "1"}, "b": {"shape": "1"}}
    assert refusal(inputs, ("a",)).message == "forward has no parameter 'b'; it takes a"
    assert refusal(inputs, ("p", "q")).message == "forward has no parameter 'a'; it takes p, q"
    assert [s.name for s in resolved({"a": {"shape": "1"}}, ("p",)).inputs] == ["a"], "the only input needs no name"


def test_further_profiles_name_every_input_and_make_axes_dynamic() -> None:
    inputs = {"x": {"shape": "1x8"}, "s": {"shape": "scalar"}}
    found = resolved(inputs, profiles=[{"x": {"min": "1x16", "max": "4x16"}, "s": {"shape": "scalar"}}])
    assert found.inputs == (TensorSpec("x", "float32", ("batch", "x_dim1")), TensorSpec("s", "float32", ()))
    assert len(found.profiles) == 2
    assert dynamic_axes(found.inputs) == {"x": (0, 1), "s": ()}


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ({"y": {"shape": "1x3"}}, "profiles.0 names y; the inputs are x"),
        ({"x": {"shape": "1x3"}, "y": {"shape": "1"}}, "profiles.0 names x, y; the inputs are x"),
        ({}, "profiles.0 names ; the inputs are x"),
        ({"x": {"shape": "3"}}, "profiles.0: input 'x' does not take 3 to 3"),
        ({"x": {"shape": "1x3x1"}}, "profiles.0: input 'x' does not take 1x3x1"),
        ({"x": {"shape": "9x3"}}, "profiles.0: input 'x' does not take 9x3 to 9x3"),
        ({"x": {}}, "profiles.0 gives no shape for x"),
    ],
)
def test_a_further_profile_that_does_not_fit_is_refused(profile: Any, said: str) -> None:
    assert said in refusal(stated=(BOUNDED,), profiles=[profile]).message


def test_samples_of_one_array_go_to_the_only_input() -> None:
    renamed = with_model_names([{"other": SAMPLE["x"]}], [STATIC])
    assert list(renamed[0]) == ["x"]
    several = [{"a": SAMPLE["x"], "b": SAMPLE["x"]}]
    assert with_model_names(several, [STATIC]) == several
    assert with_model_names([SAMPLE], []) == [SAMPLE]


def test_feeds_are_made_for_every_corner_with_the_recipes_bounds() -> None:
    chosen = asked({"": {"min": "1x3", "max": "4x3", "low": 5, "high": 6}}, export={"seed": 3})
    found = resolve(chosen, (), (), [])
    feeds = corner_feeds(chosen, found, [])
    assert {name: feed["input"].shape for name, feed in feeds.items()} == {
        "profile0-min": (1, 3),
        "profile0-opt": (4, 3),
    }
    assert all(5 <= feed["input"].min() <= feed["input"].max() <= 6 for feed in feeds.values())
    assert np.array_equal(corner_feeds(chosen, found, [])["profile0-opt"]["input"], feeds["profile0-opt"]["input"])
    other = asked({"": {"min": "1x3", "max": "4x3", "low": 5, "high": 6}}, export={"seed": 4})
    assert not np.array_equal(corner_feeds(other, found, [])["profile0-min"]["input"], feeds["profile0-min"]["input"])


def test_feeds_take_the_samples_where_there_are_some() -> None:
    chosen = asked({"x": {"min": "1x3", "max": "4x3"}})
    samples = [{"x": np.full((1, 3), 9, np.float32)}]
    feeds = corner_feeds(chosen, resolve(chosen, (), (), samples), samples)
    assert all(np.all(feed["x"] == 9) for feed in feeds.values())


def test_a_sample_that_cannot_fit_is_told_before_the_export() -> None:
    samples = [{"x": np.zeros((1, 3, 9, 8), np.float32)}]
    inputs = {"x": {"min": "1x3x8x8", "max": "4x3x8x16"}}
    with pytest.raises(DataError, match="a calibration sample of 'x' is 1x3x9x8, the input 4x3x8x16") as caught:
        resolved(inputs, samples=samples)
    assert "channels-last" not in caught.value.hint
    with pytest.raises(DataError, match="a calibration sample of 'x' is 1x8x9x3") as caught:
        resolved({"x": {"min": "1x3x8x9", "max": "4x3x8x9"}}, samples=[{"x": np.zeros((1, 8, 9, 3), np.float32)}])
    assert "channels-last" in caught.value.hint
    assert "--input-layout nhwc" in caught.value.hint
    assert resolved(inputs, samples=[{"x": np.zeros((1, 3, 8, 99), np.float32)}]).profiles, "a dynamic axis is cut"
