"""A known bias is measured and removed, from the engine's graph and the runtime's alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from gpuopt.calibration.collectors import TensorRange
from gpuopt.quantization import bias_correction, measurement, placement, qdq
from gpuopt.quantization.measurement import Mean
from gpuopt.quantization.qdq import QuantizedGraphs
from gpuopt.recipe import QuantizeSection
from tests.unit.quantization.graphs import Array, model_of, normal, run

SETTINGS = QuantizeSection()


def network(seed: int = 0) -> onnx.ModelProto:
    """Every way to have a bias: Conv with and without, Gemm with beta, MatMul with an Add behind and without."""
    g = np.random.default_rng(seed)
    constants = {
        "w1": normal(g, 32, 16, 1, 1, scale=0.3),
        "b1": normal(g, 32),
        "w2": normal(g, 32, 32, 1, 1, scale=0.3),
        "axes": np.array([2, 3]),
        "w3": normal(g, 32, 32, scale=0.3),
        "b3": normal(g, 32),
        "w4": normal(g, 32, 32, scale=0.3),
        "b4": normal(g, 32),
        "w5": normal(g, 32, 32, scale=0.3),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"]),
        helper.make_node("ReduceMean", ["c2", "axes"], ["m"], keepdims=0),
        helper.make_node("Gemm", ["m", "w3", "b3"], ["g"], beta=0.5),
        helper.make_node("MatMul", ["g", "w4"], ["p"]),
        helper.make_node("Add", ["p", "b4"], ["s"]),
        helper.make_node("MatMul", ["s", "w5"], ["y"]),
    ]
    return model_of(nodes, constants, ("batch", 16, 6, 6))


def quantized(model: onnx.ModelProto, x: Array, clip: float = 1.0) -> QuantizedGraphs:
    """With ranges that hold this share of the largest values."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    names = [n for n in placement.candidate_tensors(model) if n != "x"]
    shown.graph.output.extend(helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    values = {"x": x, **dict(zip(names, run(shown, x)[1:], strict=True))}
    ranges = {
        n: TensorRange(-float(np.abs(v).max()) * clip, float(np.abs(v).max()) * clip, "test") for n, v in values.items()
    }
    return qdq.quantize(model, SETTINGS, placement.place(model, SETTINGS, ranges, False), ranges, False)


def measured(model: onnx.ModelProto, other: onnx.ModelProto, x: Array, folder: Path) -> dict[str, Array]:
    both = bias_correction.side_by_side(model, other)
    feeds = [{"x": x[index : index + 1]} for index in range(len(x))]
    return bias_correction.corrections(measurement.mean_differences(both.model, both.pairs, feeds, folder))


def test_a_known_bias_is_found_and_removed(tmp_path: Path) -> None:
    model = network()
    x = normal(np.random.default_rng(1), 32, 16, 6, 6)
    graphs = quantized(model, x)
    assert graphs.engine is not None
    names = ("c1", "c2", "g", "p", "y")
    assert tuple(bias_correction.side_by_side(model, graphs.runtime).pairs) == names
    # The bias of a MatMul lies in another node, so there is none of its own to find.
    planted = {name: np.linspace(1, 3, 32) for name in ("c1", "c2", "g")}
    engine, runtime = (bias_correction.correct(graph, planted) for graph in (graphs.engine, graphs.runtime))
    assert np.abs(run(runtime, x)[0] - run(graphs.runtime, x)[0]).max() > 1
    found = measured(model, runtime, x, tmp_path / "both")
    own = measured(model, graphs.runtime, x, tmp_path / "own")
    for name, shift in planted.items():
        assert np.allclose(found[name], own[name] - shift, atol=0.02), name
    before = run(graphs.runtime, x)[0]
    exact = run(model, x)[0]
    for graph in (engine, runtime):
        onnx.checker.check_model(graph, full_check=True)
        repaired = run(bias_correction.correct(graph, found), x)[0]
        assert np.abs(repaired - exact).mean() <= np.abs(before - exact).mean()
    assert run(bias_correction.correct(engine, found), x)[0].tobytes() == (
        run(bias_correction.correct(runtime, found), x)[0].tobytes()
    )


def test_the_bias_that_clipping_leaves_is_removed(tmp_path: Path) -> None:
    model = network()
    x = normal(np.random.default_rng(2), 64, 16, 6, 6)
    graphs = quantized(model, x, clip=0.4)
    shifts = measured(model, graphs.runtime, x[:48], tmp_path / "both")
    exact, held_out = run(model, x)[0][48:], x[48:]
    before = run(graphs.runtime, held_out)[0] - exact
    after = run(bias_correction.correct(graphs.runtime, shifts), held_out)[0] - exact
    assert np.abs(after.mean(axis=0)).mean() < 0.6 * np.abs(before.mean(axis=0)).mean()
    assert np.sum(after**2) < 0.7 * np.sum(before**2)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_correction_adds_to_its_channels_and_to_nothing_else(seed: int) -> None:
    """In the last layer, whose outputs show it."""
    model = network(seed)
    g = np.random.default_rng(seed)
    x, shift = normal(g, 3, 16, 6, 6), g.standard_normal(32)
    corrected = bias_correction.correct(model, {"y": shift, "unknown": shift})
    assert np.allclose(run(corrected, x)[0] - run(model, x)[0], shift, rtol=1e-3, atol=1e-3)
    assert [value.name for value in corrected.graph.output] == ["y"]


@pytest.mark.parametrize("attributes", [{"beta": 2.0}, {"beta": 0.0}, {}])
@pytest.mark.parametrize("bias", ["none", "constant", "scalar", "computed"])
def test_every_form_of_a_gemm(attributes: dict[str, float], bias: str) -> None:
    g = np.random.default_rng(0)
    constants = {"w": normal(g, 4, 4), "c": normal(g, 4), "scalar": np.float32(2)}
    third = {"none": [], "constant": ["c"], "scalar": ["scalar"], "computed": ["x"]}[bias]
    model = model_of([helper.make_node("Gemm", ["x", "w", *third], ["y"], **attributes)], constants, (3, 4))
    x, shift = normal(g, 3, 4), np.arange(4.0)
    corrected = bias_correction.correct(model, {"y": shift})
    assert np.allclose(run(corrected, x)[0] - run(model, x)[0], np.tile(shift, (3, 1)), atol=1e-4)


def test_a_branch_reads_the_corrected_product() -> None:
    g = np.random.default_rng(0)
    shown = helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Identity", ["p"], ["b"])], "branch", [], [shown])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "c"], ["s"]),
        helper.make_node("If", ["true"], ["i"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["s", "i"], ["y"]),
    ]
    model = model_of(nodes, {"w": normal(g, 4, 4), "c": normal(g, 4), "true": np.array(True)}, (3, 4))
    x, shift = normal(g, 3, 4), np.arange(4.0)
    corrected = bias_correction.correct(model, {"p": shift})
    assert np.allclose(run(corrected, x)[0] - run(model, x)[0], np.tile(2 * shift, (3, 1)), atol=1e-4)


def test_chance_is_not_corrected() -> None:
    means = {"n": Mean(np.array([1.0, 1.0, -1.0, 0.0]), np.array([0.0, 0.5, 2.0, 0.0]))}
    assert np.array_equal(bias_correction.corrections(means)["n"], [1.0, 0.5, 0.0, 0.0])
