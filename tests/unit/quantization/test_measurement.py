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
from gpuopt.calibration.held_out import Split
from gpuopt.quantization.measurement import Sqnr, channel_maxima, mean_differences, sqnr, watching
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
    found = sqnr(exact, other, feeds)
    assert found is not None
    # The second output is log(1) = 0: no signal, so no ratio.
    assert found.db == pytest.approx(10 * np.log10((1 + 25) / (0.25 + 0.25)))
    assert found.by_sample == pytest.approx([10 * np.log10(1 / 0.25), 10 * np.log10(25 / 0.25)])
    same = sqnr(exact, exact, feeds)
    assert same is not None
    assert same.db == 200
    assert sqnr(exact, other, []) is None


@pytest.mark.parametrize(
    ("after", "pays"),
    [
        ((11.0, 11.1, 10.9, 11.0), True),
        ((10.1, 10.1, 10.1, 10.1), False),
        ((16.0, 9.0, 9.0, 10.0), False),
        ((11.0,), False),
    ],
)
def test_a_gain_counts_if_it_is_large_enough_and_no_chance(after: tuple[float, ...], pays: bool) -> None:
    before = Sqnr(10.0, (10.0,) * len(after))
    assert Sqnr(float(np.mean(after)), after).gains_over(before, 0.2) == pays


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
    session = watching(model, ["a", "y"], folder / "both")
    mean = mean_differences(session, {"n": ("y", "a", 1)}, feeds)["n"]
    rows = np.array([np.maximum(-2 * feed["x"], 0).mean(axis=(0, 2), dtype=np.float64) for feed in feeds])
    assert np.allclose(mean.value, rows.mean(axis=0), atol=1e-6)
    assert np.allclose(mean.squared_error, rows.var(axis=0, ddof=1) / count, atol=1e-6)


@pytest.mark.parametrize("count", [1, 4, 16, 19, 64])
def test_no_sample_both_chooses_and_judges(count: int) -> None:
    taken: list[None] = []
    split = Split([{"i": np.array(i)} for i in range(count + 5)], count, lambda: taken.append(None))
    chosen, judging = ([int(feed["i"]) for feed in part] for part in (split.chosen_by(), split.held_out()))
    assert sorted(chosen + judging) == list(range(count))
    assert len(judging) == split.held_out_count == count // 4
    assert len(taken) == count
    assert split.enough == (count >= 16)
