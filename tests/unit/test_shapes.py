"""Shapes as trtexec's users write them: parsing, ranges, corners."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuopt.errors import UsageError
from gpuopt.shapes import (
    DTYPES,
    Profile,
    ShapeRange,
    corners,
    format_shape,
    parse_input,
    parse_named_shapes,
    parse_shape,
)

shapes = st.lists(st.integers(1, 10**6), max_size=6).map(tuple)
# Exporters and trtexec users write names such as `input:0`, `/model/conv/out`, `x.1`.
names = st.text("abcXYZ019_:/.-", min_size=1, max_size=12)


@st.composite
def ranges(draw: st.DrawFn, rank: int) -> ShapeRange:
    sizes = [sorted(draw(st.lists(st.integers(1, 9), min_size=3, max_size=3))) for _ in range(rank)]
    low, mid, high = (tuple(s[i] for s in sizes) for i in range(3))
    return ShapeRange(low, mid, high)


@st.composite
def profile_lists(draw: st.DrawFn) -> list[Profile]:
    ranks = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    count = draw(st.integers(1, 3))
    return [{f"x{i}": draw(ranges(rank)) for i, rank in enumerate(ranks)} for _ in range(count)]


@given(shapes)
def test_a_formatted_shape_parses_back(shape: tuple[int, ...]) -> None:
    assert parse_shape(format_shape(shape)) == shape


@pytest.mark.parametrize(
    "text",
    ["", "x", "1x", "x3", "1xx3", "0x3", "-1x3", "+1x3", "1_0x3", " 1x3", "1x3\n", "٣x3", "1.5", "a", "9" * 5000],
)
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a shape"):
        parse_shape(text)


@given(names, shapes, st.sampled_from([None, *DTYPES]))
def test_an_input_keeps_its_name_shape_and_dtype(name: str, shape: tuple[int, ...], dtype: str | None) -> None:
    text = f"{name}:{format_shape(shape)}" + (f":{dtype}" if dtype else "")
    assert parse_input(text) == (name, shape, dtype)


@pytest.mark.parametrize(("text", "dtype"), [("1x128", None), ("1x128:int64", "int64")])
def test_a_lone_shape_has_an_empty_name(text: str, dtype: str | None) -> None:
    assert parse_input(text) == ("", (1, 128), dtype)


@pytest.mark.parametrize("text", ["x", "ids:1x128:int65", "ids:float", "ids:-1x3"])
def test_an_unknown_dtype_lists_the_known_ones(text: str) -> None:
    with pytest.raises(UsageError, match="neither a shape nor a dtype") as caught:
        parse_input(text)
    assert "int64" in caught.value.hint


@pytest.mark.parametrize("text", ["ids:", "ids:int64", "int64", ""])
def test_an_input_without_a_shape_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a shape"):
        parse_input(text)


@given(st.dictionaries(names, st.lists(st.integers(1, 99), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4))
def test_a_list_of_named_shapes_is_the_same_in_one_flag_or_several(expected: dict[str, tuple[int, ...]]) -> None:
    entries = [f"{name}:{format_shape(shape)}" for name, shape in expected.items()]
    assert parse_named_shapes([",".join(entries)]) == expected
    assert parse_named_shapes(entries) == expected


def test_a_shape_without_a_name_stands_for_the_only_input() -> None:
    assert parse_named_shapes(["1x3"]) == {"": (1, 3)}


@pytest.mark.parametrize("texts", [["a:1x3,a:1x4"], ["a:1x3", "a:1x3"], ["1x3", "1x4"]])
def test_two_shapes_for_one_input_are_refused(texts: list[str]) -> None:
    with pytest.raises(UsageError, match="has two shapes"):
        parse_named_shapes(texts)


@pytest.mark.parametrize("text", ["a:1x3,", "a:", "a:1x3:int64", "a:0"])
def test_a_named_shape_without_a_valid_shape_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a shape"):
        parse_named_shapes([text])


@given(st.lists(st.tuples(*[st.integers(1, 4)] * 3), max_size=4))
def test_a_range_holds_exactly_where_it_is_ordered(sizes: list[tuple[int, int, int]]) -> None:
    low, mid, high = (tuple(s[i] for s in sizes) for i in range(3))
    if all(a <= b <= c for a, b, c in sizes):
        assert ShapeRange(low, mid, high).dynamic_axes == tuple(i for i, (a, _, c) in enumerate(sizes) if a != c)
    else:
        with pytest.raises(UsageError, match="min <= opt <= max") as caught:
            ShapeRange(low, mid, high)
        assert format_shape(mid) in caught.value.message


@pytest.mark.parametrize("three", [((1,), (1, 2), (1, 2)), ((1, 2), (1, 2), (1,)), ((), (1,), (1,))])
def test_a_range_of_different_ranks_is_refused(three: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(UsageError, match="different ranks"):
        ShapeRange(*three)


@given(ranges(2), st.tuples(st.integers(0, 10), st.integers(0, 10)))
def test_a_range_admits_what_lies_between_its_ends(held: ShapeRange, shape: tuple[int, int]) -> None:
    inside = all(size in range(a, c + 1) for a, size, c in zip(held.min, shape, held.max, strict=True))
    assert held.admits(shape) == inside
    assert not held.admits((*shape, 1))


@given(profile_lists())
def test_corners_are_distinct_lie_in_their_profile_and_hold_its_ends(profiles: list[Profile]) -> None:
    found = corners(profiles)
    keys = [tuple(sorted(corner.shapes.items())) for corner in found]
    assert len(set(keys)) == len(keys)
    assert len({corner.name for corner in found}) == len(found)
    for corner in found:
        profile = profiles[int(corner.name.removeprefix("profile").partition("-")[0])]
        assert corner.shapes.keys() == profile.keys()
        assert all(profile[name].admits(shape) for name, shape in corner.shapes.items())
    for profile, point in itertools.product(profiles, ("min", "opt", "max")):
        assert tuple(sorted((name, getattr(r, point)) for name, r in profile.items())) in keys


def test_mixed_corners_cross_the_batch_with_the_rest() -> None:
    profile = {
        "ids": ShapeRange((1, 8), (4, 64), (32, 128)),
        "mask": ShapeRange((1, 1, 8), (4, 1, 64), (32, 1, 128)),
    }
    found = {corner.name: dict(corner.shapes) for corner in corners([profile])}
    assert found["profile0-min-batch"] == {"ids": (1, 128), "mask": (1, 1, 128)}
    assert found["profile0-max-batch"] == {"ids": (32, 8), "mask": (32, 1, 8)}
    assert len(found) == 5


def test_a_dynamic_batch_alone_and_a_dynamic_rest_alone_have_no_mixed_corners() -> None:
    assert [c.name for c in corners([{"x": ShapeRange((1, 3), (2, 3), (8, 3))}])] == [
        "profile0-min",
        "profile0-opt",
        "profile0-max",
    ]
    assert len(corners([{"x": ShapeRange((1, 3), (1, 4), (1, 5))}])) == 3


def test_a_static_profile_has_one_corner_and_a_second_equal_profile_adds_none() -> None:
    static = {"x": ShapeRange((1, 3), (1, 3), (1, 3)), "scale": ShapeRange((), (), ())}
    assert [c.name for c in corners([static, static])] == ["profile0-min"]
