"""Batches for TensorRT's own calibrator. That it calibrates is shown on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gpuopt.backends.tensorrt import calibrator
from gpuopt.backends.tensorrt.calibrator import Batches, calibration_profile, make_calibrator
from gpuopt.backends.tensorrt.options import Feed, NativeCalibration
from gpuopt.errors import DataError
from gpuopt.shapes import ShapeRange

DTYPES = {"x": np.dtype(np.float32), "ids": np.dtype(np.int32)}


def feeds(*changes: dict[str, Any]) -> NativeCalibration:
    def give() -> Iterator[Feed]:
        for change in changes:
            feed: dict[str, Any] = {"x": np.ones((2, 3), np.float64), "ids": np.ones((2, 4), np.int64), **change}
            yield {name: value for name, value in feed.items() if value is not None}

    return NativeCalibration("entropy", give, batch=2)


def test_feeds_come_once_in_the_networks_dtypes() -> None:
    batches = Batches(feeds({}, {"x": np.zeros((3, 2)).T}), DTYPES)
    assert batches.peek() == {"x": (2, 3), "ids": (2, 4)}
    assert batches.peek() == {"x": (2, 3), "ids": (2, 4)}
    first, second = batches.next(), batches.next()
    assert first is not None
    assert second is not None
    assert {name: array.dtype for name, array in first.items()} == DTYPES
    assert (first["x"].sum(), second["x"].sum()) == (6, 0)
    assert all(array.flags.c_contiguous for array in second.values())
    assert batches.next() is None
    assert batches.count == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": np.full((2, 3), np.nan)}, "batch 2: 'x' holds NaN"),
        ({"x": np.full((2, 3), np.inf)}, "batch 2: 'x' holds NaN or infinity"),
        ({"x": np.ones((1, 3))}, "batch 2: 'x' is 1x3, not 2x3"),
        ({"x": np.ones((2, 5))}, "batch 2: 'x' is 2x5, not 2x3"),
        ({"ids": None}, "batch 2 has no input 'ids'; it has x"),
    ],
)
def test_a_bad_batch_is_refused_with_its_number(change: dict[str, Any], words: str) -> None:
    batches = Batches(feeds({}, change), DTYPES)
    assert batches.next() is not None
    with pytest.raises(DataError, match=words):
        batches.next()


def test_a_first_batch_of_another_size_is_refused_before_the_build() -> None:
    with pytest.raises(DataError, match="batch 1: 'x' is 4x3, not 2x3"):
        Batches(feeds({"x": np.ones((4, 3))}), DTYPES).peek()
    with pytest.raises(DataError, match="no batch"):
        Batches(feeds(), DTYPES).peek()


def test_the_profile_is_that_of_the_feeds() -> None:
    profile = {"x": ShapeRange((1, 3), (4, 3), (8, 3)), "ids": ShapeRange((1, 4), (4, 4), (8, 4))}
    assert calibration_profile(profile, {"x": (2, 3), "ids": (2, 4)}) == {
        "x": ShapeRange((2, 3), (2, 3), (2, 3)),
        "ids": ShapeRange((2, 4), (2, 4), (2, 4)),
    }
    assert calibration_profile(profile, {})["x"].max == (4, 3)


class Base:
    """Stands in for the class that TensorRT 8.5 to 10 has, and TensorRT-RTX has not."""


class Buffers:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def copy(self, name: str, array: np.ndarray[Any, Any]) -> int:
        self.seen.append(name)
        return len(self.seen)

    def close(self) -> None:
        self.seen.clear()


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("tensorrt")
    module.IInt8EntropyCalibrator2 = Base  # type: ignore[attr-defined]
    monkeypatch.setattr(calibrator, "_DeviceInputs", Buffers)
    return module


def test_addresses_come_in_the_order_of_the_names(trt: ModuleType) -> None:
    made = make_calibrator(trt, feeds({}), Batches(feeds({}), DTYPES))
    assert made.get_batch_size() == 2
    assert made.read_calibration_cache() is None
    assert made.get_batch(["ids", "x"]) == [1, 2]
    assert made.get_batch(["ids", "x"]) is None
    assert made.failure is None
    made.close()


def test_a_bad_batch_ends_the_calibration_without_an_exception(trt: ModuleType, tmp_path: Path) -> None:
    plan = NativeCalibration("entropy", feeds({}, {"ids": None}).feeds, 2, tmp_path / "cache")
    made = make_calibrator(trt, plan, Batches(plan, DTYPES))
    assert made.get_batch(["x", "ids"]) is not None
    assert made.get_batch(["x", "ids"]) is None
    assert isinstance(made.failure, DataError)
    made.write_calibration_cache(memoryview(b"half"))
    assert not (tmp_path / "cache").exists(), "ranges of a part of the data are not kept"


def test_the_cache_is_written_and_read_back(trt: ModuleType, tmp_path: Path) -> None:
    from gpuopt.calibration import ranges

    text = b"TRT-8503-EntropyCalibration2\nx: 3c010a14\n"
    plan = NativeCalibration("entropy", feeds().feeds, 2, tmp_path / "cache")
    made = make_calibrator(trt, plan, None)
    made.write_calibration_cache(memoryview(text))
    assert made.content == text
    assert list(ranges.read(tmp_path / "cache").ranges) == ["x"]
    again = make_calibrator(trt, plan, None)
    assert again.read_calibration_cache() == text
    assert again.content == text
