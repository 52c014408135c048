"""Statistics that the graph computes are those of the tensors themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from gpuopt import onnx_model
from gpuopt.backends.onnxruntime import Session
from gpuopt.calibration import statistics
from gpuopt.calibration.statistics import GraphStatistics

Array = np.ndarray[Any, Any]


def identity(shape: list[int | str] | None, opset: int = 19) -> onnx.ModelProto:
    """x -> Neg -> t -> Neg -> y; the statistics are of t = -x."""
    nodes = [helper.make_node("Neg", ["x"], ["t"], "first"), helper.make_node("Neg", ["t"], ["y"], "second")]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx_model.with_types(model)


def run(model: onnx.ModelProto, most: int, feed: Array, folder: Path) -> tuple[float, float, Any]:
    extended = GraphStatistics(model, ["t"], most)
    session = Session(onnx_model.save(model, folder))
    extended.remove()
    return extended.read("t", session.run({"x": feed}, extended.outputs))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_they_equal_those_of_the_array(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    shape = data.draw(st.lists(st.integers(0, 9), max_size=4))
    open_axes = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    declared: list[int | str] | None = [
        f"d{i}" if is_open else n for i, (n, is_open) in enumerate(zip(shape, open_axes, strict=True))
    ]
    if all(open_axes) and data.draw(st.booleans()):
        declared = None
    most = data.draw(st.integers(0, 60))
    opset = data.draw(st.sampled_from([13, 17, 20]))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    low, high, values = run(identity(declared, opset), most, x, tmp_path_factory.mktemp("m"))
    assert (low, high) == ((float((-x).min()), float((-x).max())) if x.size else (np.inf, -np.inf))
    if not most:
        assert values is None
        return
    assert np.array_equal(np.ravel(values), np.ravel(statistics.share(-x, most)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 1, 37, 99])
def test_nan_and_infinity_show(bad: float, position: int, tmp_path: Path) -> None:
    x = np.ones((4, 25), np.float32)
    x.flat[position] = bad
    low, high, _ = run(identity([4, 25]), 5, x, tmp_path)
    assert not (np.isfinite(low) and np.isfinite(high))


def test_the_graph_is_given_back_as_it_was() -> None:
    model = identity(["n", 7])
    before = model.SerializeToString(deterministic=True)
    extended = GraphStatistics(model, ["t"], 3)
    assert model.SerializeToString(deterministic=True) != before
    extended.remove()
    assert model.SerializeToString(deterministic=True) == before


@settings(deadline=None, max_examples=200)
@given(length=st.integers(1, 200_000), most=st.integers(1, 5_000))
def test_positions_are_spread(length: int, most: int) -> None:
    found = statistics.positions(length, most)
    assert found.size == min(length, most)
    assert found[0] == 0
    assert found[-1] < length
    assert (np.diff(found) >= 0).all()
    if length > most > 1:
        # Three-gap theorem: the widest gap is below 1 + golden ratio average gaps.
        assert np.diff(found).max() <= 2.7 * length / most + 1


@pytest.mark.parametrize("channels", [2, 3, 64, 768, 1024, 4096])
def test_no_channel_is_passed_over(channels: int) -> None:
    """Channels last: equal distances would see the same few channels for ever."""
    most = 1 << 14
    seen = np.bincount(statistics.positions(197 * channels, most) % channels, minlength=channels)
    expected = min(most, 197 * channels) / channels
    assert seen.min() >= expected / 4
    assert seen.max() <= expected * 4


def test_the_share_is_a_slices_own() -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((3, 10, 100))
    together = statistics.share(rows, 50)
    alone = np.concatenate([statistics.share(row[None], 50) for row in rows])
    assert together.shape == (3, 50)
    assert np.array_equal(together, alone)
    assert statistics.share(rows, 0).size == rows.size
