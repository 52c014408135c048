"""SQNR over samples and when a gain counts; sums a channel against numpy on all samples at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from gpuopt import onnx_model
from gpuopt.backends.onnxruntime import Session
from gpuopt.calibration.collectors import TensorRange
from gpuopt.calibration.held_out import Split
from gpuopt.calibration.memory import peak_bytes, release_freed, reset_peak, resident_bytes
from gpuopt.quantization import placement, qdq
from gpuopt.quantization.bias_correction import side_by_side
from gpuopt.quantization.measurement import ExactOutputs, Sqnr, channel_maxima, mean_differences, sqnr
from gpuopt.recipe import QuantizeSection
from tests.unit.quantization.graphs import model_of, normal


def session_adding(folder: Path, error: float) -> Session:
    nodes = [
        helper.make_node("Add", ["x", "e"], ["y"]),
        helper.make_node("Log", ["e"], ["z"]),
    ]
    return Session(onnx_model.save(model_of(nodes, {"e": np.float32(error)}, (1, 4), ("y", "z")), folder))


def test_sqnr_is_the_mean_over_outputs_of_the_summed_powers(tmp_path: Path) -> None:
    exact, other = session_adding(tmp_path / "a", 1.0), session_adding(tmp_path / "b", 1.5)
    feeds = [{"x": np.full((1, 4), value, np.float32)} for value in (0.0, 4.0)]
    outputs = ExactOutputs(exact)
    found = sqnr(outputs, other, feeds)
    assert found is not None
    # The second output is log(1) = 0: no signal, so no ratio.
    assert found.pooled_db == pytest.approx(10 * np.log10((1 + 25) / (0.25 + 0.25)))
    assert found.by_sample == pytest.approx([10 * np.log10(1 / 0.25), 10 * np.log10(25 / 0.25)])
    assert found.db == pytest.approx(np.mean(found.by_sample))
    same = sqnr(outputs, exact, feeds)
    assert same is not None
    assert same.db == 200
    assert sqnr(outputs, other, []) is None


@pytest.mark.parametrize(("most", "runs"), [(0, 4), (16, 3), (32, 2)])
def test_the_original_runs_again_only_where_its_outputs_are_too_large_to_keep(
    tmp_path: Path, most: int, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpuopt.quantization.measurement._MOST_KEPT", most)
    model = model_of([helper.make_node("Neg", ["x"], ["y"])], {}, (1, 4))
    session = Session(onnx_model.save(model, tmp_path / "graph"))
    seen = []
    monkeypatch.setattr(session, "run", lambda feed, run=session.run: seen.append(None) or run(feed))
    outputs = ExactOutputs(session)
    for _ in range(2):
        for index in range(2):
            feed = {"x": np.full((1, 4), index, np.float32)}
            assert np.array_equal(outputs.of(index, feed)["y"], -feed["x"])
    assert len(seen) == runs


@pytest.mark.parametrize(
    ("after", "pooled", "pays"),
    [
        ((11.0, 11.1, 10.9, 11.0), 11.0, True),
        ((11.0, 11.1, 10.9, np.nan), 11.0, True),
        ((10.1, 10.1, 10.1, 10.1), 10.1, False),
        ((16.0, 9.0, 9.0, 10.0), 11.0, False),
        # One sample that is clipped with and without hides what the others gain, and is no reason against it.
        ((11.0, 11.1, 10.9, 11.0), 9.9, True),
        ((11.0, 11.1, 10.9, 11.0), 9.7, False),
        ((11.0,), 11.0, False),
        ((np.nan, np.nan), 11.0, False),
    ],
)
def test_a_gain_counts_if_it_is_large_enough_and_no_chance(after: tuple[float, ...], pooled: float, pays: bool) -> None:
    before = Sqnr(10.0, (10.0,) * len(after))
    assert Sqnr(pooled, after).pays_over(before, 0.2) == pays


@settings(deadline=None, max_examples=20)
@given(count=st.integers(2, 6), seed=st.integers(0, 2**32 - 1))
def test_sums_a_channel_are_those_of_all_samples_at_once(
    count: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    g = np.random.default_rng(seed)
    nodes = [helper.make_node("Mul", ["x", "two"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    model = model_of(nodes, {"two": np.float32(2)}, ("batch", 3, "width"))
    feeds = [{"x": normal(g, 2, 3, int(g.integers(1, 5)))} for _ in range(count)]
    folder = tmp_path_factory.mktemp("graphs")
    found = channel_maxima(model, {"a": 1, "x": 1}, feeds, folder / "maxima")
    peaks = np.max([np.abs(feed["x"]).max(axis=(0, 2)) for feed in feeds], axis=0)
    assert np.array_equal(found["x"], peaks)
    assert np.array_equal(found["a"], 2 * peaks)
    before = model.SerializeToString(deterministic=True)
    mean = mean_differences(model, {"n": ("a", "y", 1)}, feeds, folder / "both")["n"]
    assert model.SerializeToString(deterministic=True) == before
    rows = np.array([np.minimum(2 * feed["x"], 0).mean(axis=(0, 2), dtype=np.float64) for feed in feeds])
    assert np.allclose(mean.value, rows.mean(axis=0), atol=1e-6)
    assert np.allclose(mean.squared_error, rows.var(axis=0, ddof=1) / count, atol=1e-6)


@pytest.mark.parametrize("opset", [13, 17, 18, 23])
@pytest.mark.parametrize(("shape", "axis"), [((5,), -1), ((4, 5), 1), ((2, 3, 5), -1), ((2, 5, 3, 4), 1), ((5, 2), 0)])
def test_reductions_in_every_opset_and_rank(tmp_path: Path, opset: int, shape: tuple[int, ...], axis: int) -> None:
    nodes = [helper.make_node("Neg", ["x"], ["odd \N{BULLET} name/1"]), helper.make_node("Abs", ["x"], ["y"])]
    model = model_of(nodes, {}, shape)
    model.opset_import[0].version = opset
    del model.graph.value_info[:]
    x = normal(np.random.default_rng(0), *shape)
    others = tuple(a for a in range(len(shape)) if a != axis % len(shape))
    found = channel_maxima(model, {"odd \N{BULLET} name/1": axis}, [{"x": x}], tmp_path / "maxima")
    assert np.array_equal(found["odd \N{BULLET} name/1"], np.abs(x).max(axis=others))
    pairs = {"n": ("odd \N{BULLET} name/1", "y", axis)}
    mean = mean_differences(model, pairs, [{"x": x}], tmp_path / "means")["n"]
    assert np.allclose(mean.value, (-x - np.abs(x)).mean(axis=others), atol=1e-6)


def test_memory_does_not_grow_with_the_depth(tmp_path: Path) -> None:
    layers, channels, size = 24, 16, 192
    g = np.random.default_rng(0)
    constants = {f"w{i}": normal(g, channels, channels, 1, 1, scale=0.3) for i in range(layers)}
    names = ["x", *(f"r{i}" for i in range(1, layers)), "y"]
    nodes = []
    for i in range(layers):
        nodes.append(helper.make_node("Conv", [names[i], f"w{i}"], [f"c{i}"]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [names[i + 1]]))
    model = model_of(nodes, constants, ("batch", channels, size, size))
    section = QuantizeSection()
    ranges = {name: TensorRange(-4, 4, "test") for name in names}
    quantized = qdq.quantize(model, section, placement.place(model, section, ranges, False), ranges, False).runtime
    both = side_by_side(model, quantized)
    assert len(both.pairs) == layers
    feeds = [{"x": normal(g, 1, channels, size, size)} for _ in range(2)]
    one = 4 * channels * size**2
    for measure in (
        lambda: channel_maxima(model, dict.fromkeys(names[1:], 1), feeds, tmp_path / "maxima"),
        lambda: mean_differences(both.model, both.pairs, feeds, tmp_path / "means"),
    ):
        release_freed()
        reset_peak()
        before = resident_bytes()
        assert len(measure()) == layers
        assert peak_bytes() - before < 16 * one


@pytest.mark.parametrize("count", [1, 4, 16, 19, 64])
def test_no_sample_both_chooses_and_judges(count: int) -> None:
    taken: list[None] = []
    split = Split([{"i": np.array(i)} for i in range(count + 5)], count, lambda: taken.append(None))
    chosen, judging = ([int(feed["i"]) for feed in part] for part in (split.chosen_by(), split.held_out()))
    assert sorted(chosen + judging) == list(range(count))
    assert len(judging) == split.held_out_count == count // 2
    assert len(taken) == count
    assert split.enough == (count >= 16)
