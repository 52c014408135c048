"""Reference inputs and outputs: what is fed at a corner, what is stored, which rows are independent."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuopt import reference
from gpuopt.errors import DataError, StorageError
from gpuopt.reference import Interface, make_feed
from gpuopt.shapes import Corner, ShapeRange, TensorSpec, corners

Array = np.ndarray[Any, Any]
FLOAT = TensorSpec("x", "float32", ("batch", 3))


def at(**shapes: tuple[int, ...]) -> Corner:
    return Corner("c", shapes)


def test_samples_fill_the_batch_in_turn_and_start_again() -> None:
    samples = [{"x": np.full((1, 3), value, np.float32)} for value in (1, 2, 3)]
    feed = make_feed(at(x=(5, 3)), [FLOAT], samples, {}, 0)
    assert feed["x"][:, 0].tolist() == [1, 2, 3, 1, 2]
    assert make_feed(at(x=(2, 3)), [FLOAT], samples, {}, 0)["x"][:, 0].tolist() == [1, 2]


def test_a_sample_of_several_rows_gives_each_of_them() -> None:
    samples = [{"x": np.arange(12, dtype=np.float32).reshape(4, 3)}]
    assert np.array_equal(make_feed(at(x=(2, 3)), [FLOAT], samples, {}, 0)["x"], samples[0]["x"][:2])


@pytest.mark.parametrize(("length", "expected"), [(2, [0, 1]), (3, [0, 1, 2]), (7, [0, 1, 2, 0, 1, 2, 0])])
def test_other_axes_are_cut_or_wrapped(length: int, expected: list[int]) -> None:
    samples = [{"ids": np.array([[0, 1, 2]])}, {"ids": np.array([[0, 1, 2, 3]])}]
    feed = make_feed(at(ids=(1, length)), [TensorSpec("ids", "int64", (1, "n"))], samples, {}, 0)
    assert feed["ids"].tolist() == [expected]


def test_samples_of_different_lengths_are_fitted_one_by_one() -> None:
    samples = [{"ids": np.array([[1, 2, 3]])}, {"ids": np.array([[4]])}]
    feed = make_feed(at(ids=(2, 2)), [TensorSpec("ids", "int64", ("n", "m"))], samples, {}, 0)
    assert feed["ids"].tolist() == [[1, 2], [4, 4]]


def test_a_leading_one_to_spare_is_dropped_and_scalars_work() -> None:
    specs = [TensorSpec("v", "float32", (3,)), TensorSpec("s", "float32", ())]
    samples = [{"v": np.array([[1.0, 2.0, 3.0]]), "s": np.array([7.0])}]
    feed = make_feed(at(v=(3,), s=()), specs, samples, {}, 0)
    assert feed["v"].tolist() == [1, 2, 3]
    assert feed["s"].shape == ()
    assert feed["s"] == 7


@pytest.mark.parametrize(
    ("shape", "sample"),
    [((2, 3, 4), (2, 3)), ((2,), (2, 3)), ((), (2,)), ((2, 3), ()), ((2, 3), (0, 3)), ((2, 3), (2, 0))],
)
def test_samples_that_cannot_fit_are_a_data_error(shape: tuple[int, ...], sample: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="a calibration sample of 'x' has the shape"):
        make_feed(at(x=shape), [TensorSpec("x", "float32", shape)], [{"x": np.zeros(sample, np.float32)}], {}, 0)


@settings(deadline=None)
@given(
    rows=st.integers(1, 4),
    have=st.lists(st.integers(1, 4), max_size=2),
    data=st.data(),
    dtype=st.sampled_from(["f4", "i8"]),
)
def test_any_samples_fit_any_shape_of_their_rank(rows: int, have: list[int], data: st.DataObject, dtype: str) -> None:
    shape = tuple(data.draw(st.integers(1, 6)) for _ in range(1 + len(have)))
    values = np.arange(rows * int(np.prod(have)), dtype=dtype).reshape(rows, *have)
    name = str(np.dtype(dtype))
    fed = make_feed(at(x=shape), [TensorSpec("x", name, shape)], [{"x": values}], {}, 0)["x"]
    assert fed.shape == shape
    assert str(fed.dtype) == name
    for index in np.ndindex(shape):
        assert fed[index] == values[tuple(i % size for i, size in zip(index, values.shape, strict=True))]


def test_generated_values_follow_seed_range_and_dtype() -> None:
    specs = [
        TensorSpec("normal", "float32", (1000,)),
        TensorSpec("uniform", "float32", (1000,)),
        TensorSpec("ids", "int64", (1000,)),
        TensorSpec("binary", "int32", (1000,)),
        TensorSpec("mask", "bool", (1000,)),
        TensorSpec("constant", "int64", (1000,)),
    ]
    corner = at(**{spec.name: (1000,) for spec in specs})
    bounds = {"uniform": (-2.0, 5.0), "ids": (3.0, 9.0), "constant": (4.0, 4.0)}
    feed = make_feed(corner, specs, [], bounds, seed=1)
    assert {spec.name: spec.dtype for spec in specs} == {name: str(value.dtype) for name, value in feed.items()}
    assert abs(feed["normal"].mean()) < 0.2
    assert 0.8 < feed["normal"].std() < 1.2
    assert -2 <= feed["uniform"].min() < -1.5 < 4.5 < feed["uniform"].max() <= 5
    assert set(feed["ids"]) == set(range(3, 9))
    assert set(feed["binary"]) == {0, 1}
    assert set(feed["mask"]) == {True, False}
    assert set(feed["constant"]) == {4}
    again, other = (make_feed(corner, specs, [], bounds, seed) for seed in (1, 2))
    assert all(np.array_equal(feed[name], again[name]) for name in feed)
    assert not np.array_equal(feed["normal"], other["normal"])


def interface(*outputs: str, low: int = 1, high: int = 4) -> Interface:
    spec = TensorSpec("x", "float32", ("batch", 3) if low != high else (low, 3))
    profile = {"x": ShapeRange((low, 3), (max(low, high // 2), 3), (high, 3))}
    return Interface((spec,), outputs, (profile,))


def feeds_of(tensors: Interface) -> dict[str, dict[str, Array]]:
    return {c.name: make_feed(c, tensors.inputs, [], {}, i) for i, c in enumerate(corners(tensors.profiles))}


def model(feed: Mapping[str, Array]) -> list[Array]:
    x = feed["x"]
    return [
        x * 2,
        x - x.mean(axis=0),
        x.sum(axis=0),
        np.argmax(x, axis=1),
        x[::-1] + 0,
    ]


OUTPUTS = ("rowwise", "centred", "summed", "class", "reversed")


def test_what_is_recorded_is_loaded_again(tmp_path: Path) -> None:
    tensors = interface(*OUTPUTS)
    feeds = feeds_of(tensors)
    stored = reference.record(tmp_path, tensors, model, feeds, "PyTorch")
    assert stored == reference.load(tmp_path)
    assert stored.origin == "PyTorch"
    assert stored.inputs == tensors.inputs
    assert stored.profiles == tensors.profiles
    assert [c.name for c in stored.corners] == ["profile0-min", "profile0-opt", "profile0-max"]
    assert {spec.name: (spec.dtype, spec.shape) for spec in stored.outputs} == {
        "rowwise": ("float32", ("batch", 3)),
        "centred": ("float32", ("batch", 3)),
        "summed": ("float32", (3,)),
        "class": ("int64", ("batch",)),
        "reversed": ("float32", ("batch", 3)),
    }
    for corner in stored.corners:
        assert np.array_equal(stored.feed(corner)["x"], feeds[corner.name]["x"])
        expected = dict(zip(OUTPUTS, model(feeds[corner.name]), strict=True))
        actual = stored.expected(corner)
        assert list(actual) == list(OUTPUTS)
        assert all(np.array_equal(actual[name], expected[name]) for name in OUTPUTS)


def test_outputs_that_mix_rows_are_found_out(tmp_path: Path) -> None:
    tensors = interface(*OUTPUTS)
    stored = reference.record(tmp_path, tensors, model, feeds_of(tensors), "PyTorch")
    assert stored.batched_outputs == ("class", "rowwise")


def test_a_leak_into_the_last_row_only_is_found_out(tmp_path: Path) -> None:
    def leaking(feed: Mapping[str, Array]) -> list[Array]:
        y = feed["x"] * 1
        y[-1] += y[0] if len(y) > 1 else 0
        return [y]

    tensors = interface("y")
    assert reference.record(tmp_path, tensors, leaking, feeds_of(tensors), "PyTorch").batched_outputs == ()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rows_are_told_apart_by_one_sample_and_in_any_unit(tmp_path: Path, scale: float) -> None:
    def scaled(feed: Mapping[str, Array]) -> list[Array]:
        return [value * scale if value.dtype.kind == "f" else value for value in model(feed)]

    tensors = interface(*OUTPUTS)
    one = [{"x": np.array([[1.0, 3.0, 2.0]], np.float32)}]
    feeds = {c.name: make_feed(c, tensors.inputs, one, {}, 0) for c in corners(tensors.profiles)}
    assert reference.record(tmp_path, tensors, scaled, feeds, "PyTorch").batched_outputs == ("class", "rowwise")


def test_rows_are_made_distinct_within_their_range() -> None:
    one = {"ids": np.array([[7, 2, 5]] * 3), "x": np.ones((3, 1, 2), np.float32), "mask": np.ones((3, 2), bool)}
    made = reference.with_distinct_rows(one)
    assert made is not None
    assert made["ids"].tolist() == [[7, 2, 5], [5, 7, 2], [2, 5, 7]]
    assert made["x"][:, 0, 0].tolist() == pytest.approx([1, 5 / 6, 2 / 3])
    assert made["mask"].all()
    assert {n: v.dtype for n, v in made.items()} == {n: v.dtype for n, v in one.items()}
    other = {"ids": one["ids"], "x": np.arange(3.0)}
    assert reference.with_distinct_rows(other) is other


@pytest.mark.parametrize("rows", [np.zeros((4, 3), np.float32), np.full((4, 3), 5), np.ones((4,), bool)])
def test_rows_that_cannot_be_made_distinct_show_no_independence(tmp_path: Path, rows: Array) -> None:
    assert reference.with_distinct_rows({"x": rows}) is None
    tensors = interface("y")
    feeds = {c.name: {"x": rows[: c.shapes["x"][0]]} for c in corners(tensors.profiles)}
    assert reference.record(tmp_path, tensors, lambda f: [f["x"] * 2], feeds, "ONNX").batched_outputs == ()


def test_a_model_that_refuses_other_values_shows_no_independence(tmp_path: Path) -> None:
    def picky(feed: Mapping[str, Array]) -> list[Array]:
        if not (feed["x"] == 1).all():
            raise ValueError("ones only")
        return [feed["x"]]

    tensors = interface("y")
    feeds = {c.name: {"x": np.ones(c.shapes["x"], np.float32)} for c in corners(tensors.profiles)}
    assert reference.record(tmp_path, tensors, picky, feeds, "PyTorch").batched_outputs == ()


def test_infinite_outputs_and_a_label_that_flips_are_no_dependence(tmp_path: Path) -> None:
    def masked(feed: Mapping[str, Array]) -> list[Array]:
        x = feed["x"]
        labels = np.tile(np.arange(1000) % 5, (len(x), 1))
        labels[:, 0] = len(x)
        return [np.where(x > 0, x, -np.inf), labels]

    tensors = interface("logits", "labels")
    assert reference.record(tmp_path, tensors, masked, feeds_of(tensors), "ONNX").batched_outputs == (
        "labels",
        "logits",
    )


@pytest.mark.parametrize(("low", "high"), [(4, 4), (1, 1), (2, 4)])
def test_without_a_batch_from_one_up_no_output_is_batched(tmp_path: Path, low: int, high: int) -> None:
    tensors = interface(*OUTPUTS, low=low, high=high)
    stored = reference.record(tmp_path, tensors, model, feeds_of(tensors), "PyTorch")
    assert stored.batched_outputs == ()
    assert reference.largest_batch(stored.corners, stored.profiles) is None


def test_the_largest_batch_is_that_of_all_inputs() -> None:
    profile = {"a": ShapeRange((1, 2), (4, 2), (8, 2)), "b": ShapeRange((1,), (4,), (8,))}
    assert reference.largest_batch(corners([profile]), [profile]) == "profile0-max"
    fixed = {**profile, "b": ShapeRange((5,), (5,), (5,))}
    assert reference.largest_batch(corners([fixed]), [fixed]) is None
    scalar = {**profile, "b": ShapeRange((), (), ())}
    assert reference.largest_batch(corners([scalar]), [scalar]) is None


def test_the_largest_batch_has_rows_that_a_profile_takes_alone() -> None:
    small, large = {"x": ShapeRange((1, 8), (2, 8), (4, 8))}, {"x": ShapeRange((8, 16), (8, 16), (8, 16))}
    points = corners([small, large])
    assert reference.largest_batch(points, [small, large]) == "profile0-max"
    wide = {"x": ShapeRange((1, 16), (1, 16), (1, 16))}
    points = corners([small, large, wide])
    assert reference.largest_batch(points, [small, large, wide]) == "profile1-min"


@pytest.mark.parametrize(("batch", "rows"), [(1, [0]), (2, [0, 1]), (9, [0, 8])])
def test_the_first_and_the_last_row_are_checked(batch: int, rows: list[int]) -> None:
    assert reference.rows_to_check(batch) == rows


def test_an_output_whose_rank_varies_has_an_open_shape(tmp_path: Path) -> None:
    tensors = interface("y")
    run: Callable[[Mapping[str, Array]], list[Array]] = lambda feed: [np.squeeze(feed["x"])]  # noqa: E731
    assert reference.record(tmp_path, tensors, run, feeds_of(tensors), "ONNX").outputs[0].shape == ("*",)


def test_a_model_with_another_number_of_outputs_is_refused(tmp_path: Path) -> None:
    tensors = interface("y", "z")
    with pytest.raises(ValueError, match="zip"):
        reference.record(tmp_path, tensors, lambda feed: [feed["x"]], feeds_of(tensors), "PyTorch")


def test_equal_arrays_give_equal_bytes_under_any_name(tmp_path: Path) -> None:
    arrays = {"input:a/b:0": np.ones(3), "output:é": np.zeros((2, 0)), "s": np.array(5)}
    for name in ("1.npz", "2.npz"):
        reference.save_arrays(tmp_path / name, arrays)
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()
    with np.load(tmp_path / "1.npz") as stored:
        assert {name: stored[name].shape for name in stored.files} == {n: a.shape for n, a in arrays.items()}


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        reference.save_arrays(tmp_path / "x.npz", {"x": np.array([object()])})


DAMAGES: dict[str, Callable[[Any], Any]] = {
    "list": lambda d: [d],
    "text": lambda d: "x",
    "null": lambda d: None,
    "no corners": lambda d: {k: v for k, v in d.items() if k != "corners"},
    "inputs null": lambda d: {**d, "inputs": None},
    "inputs of text": lambda d: {**d, "inputs": ["x"]},
    "input without shape": lambda d: {**d, "inputs": [{"name": "x", "dtype": "float32"}]},
    "profiles a list of numbers": lambda d: {**d, "profiles": [1]},
    "profile of text": lambda d: {**d, "profiles": [{"x": "1x3"}]},
    "no shape": lambda d: {**d, "profiles": [{"x": {"min": "1x", "opt": "1", "max": "1"}}]},
    "reversed": lambda d: {**d, "profiles": [{"x": {"min": "9", "opt": "5", "max": "1"}}]},
    "numbers for shapes": lambda d: {**d, "profiles": [{"x": {"min": 1, "opt": 1, "max": 1}}]},
    "corner shapes a list": lambda d: {**d, "corners": [{"name": "c", "shapes": ["1"]}]},
    "batched null": lambda d: {**d, "batched_outputs": None},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_reference_is_a_storage_error(tmp_path: Path, damage: Callable[[Any], Any]) -> None:
    tensors = interface(*OUTPUTS)
    reference.record(tmp_path, tensors, model, feeds_of(tensors), "PyTorch")
    path = tmp_path / "reference.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(StorageError, match="cannot be read"):
        reference.load(tmp_path)


def test_a_truncated_or_absent_reference_is_a_storage_error(tmp_path: Path) -> None:
    tensors = interface(*OUTPUTS)
    reference.record(tmp_path, tensors, model, feeds_of(tensors), "PyTorch")
    path = tmp_path / "reference.json"
    whole = path.read_bytes()
    for content in (b"", whole[:-10], b"\xff" + whole):
        path.write_bytes(content)
        with pytest.raises(StorageError):
            reference.load(tmp_path)
    path.unlink()
    with pytest.raises(StorageError):
        reference.load(tmp_path)
