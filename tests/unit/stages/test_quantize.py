"""Scales that FP16 can hold, weights folded as ONNX Runtime computes them, and the stage as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from gpuopt import onnx_model, recipe
from gpuopt.artifact import Artifact
from gpuopt.calibration import ranges
from gpuopt.calibration.collectors import TensorRange
from gpuopt.errors import QuantizationError
from gpuopt.progress import Silent
from gpuopt.quantization import qdq
from gpuopt.stages import quantize
from gpuopt.stages.context import StageContext

Array = np.ndarray[Any, Any]
MAX_FP16 = 65504.0


def tensor(name: str, shape: Any = None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model_of(
    nodes: list[onnx.NodeProto],
    constants: dict[str, Any],
    inputs: tuple[str, ...] = ("x",),
    outputs: tuple[str, ...] = ("y",),
) -> onnx.ModelProto:
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [tensor(n) for n in inputs], [tensor(n) for n in outputs], values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)


def run(model: onnx.ModelProto, **feed: Array) -> list[Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, feed)
    return outputs


# Scales ------------------------------------------------------------------------------------------


def with_scale(scale: Array) -> onnx.ModelProto:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], axis=0),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["y"], axis=0),
    ]
    return model_of(nodes, {"scale": scale})


def scale_of(model: onnx.ModelProto) -> Array:
    found: Array = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "scale"))
    return found


scales = hnp.arrays(
    np.float32,
    st.one_of(st.just(()), st.integers(1, 6).map(lambda n: (n,))),
    elements=st.one_of(
        st.floats(width=32, min_value=0, max_value=MAX_FP16, exclude_min=True),
        st.floats(width=16, min_value=0, max_value=MAX_FP16, exclude_min=True),
        st.sampled_from([2.0**-24, 2.0**-25, 2.0**-14, 1e-30, 6.1e-5, MAX_FP16]),
    ),
)


@settings(deadline=None)
@given(scales)
def test_every_scale_becomes_the_next_fp16_number(scale: Array) -> None:
    model = with_scale(scale)
    changed = qdq.scales_representable_in_fp16(model)
    found = scale_of(model)
    assert (found.dtype, found.shape) == (np.float32, scale.shape)
    half = found.astype(np.float16)
    assert np.array_equal(half.astype(np.float32), found), "not an FP16 number"
    assert np.all(np.isfinite(found))
    assert np.all(found >= scale)
    assert np.all(found >= 2.0**-24)
    below = np.nextafter(half, np.float16(0)).astype(np.float32)
    assert np.all((below < scale) | (half == np.float16(2.0**-24))), "a smaller FP16 number would have done"
    assert changed == int(not np.array_equal(found, scale))
    assert qdq.scales_representable_in_fp16(model) == 0


def test_only_scales_are_rounded() -> None:
    odd = np.float32(0.1)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["d"]),
        helper.make_node("Mul", ["d", "factor"], ["y"]),
    ]
    model = model_of(nodes, {"scale": odd, "factor": odd})
    assert qdq.scales_representable_in_fp16(model) == 1
    kept = next(t for t in model.graph.initializer if t.name == "factor")
    assert numpy_helper.to_array(kept) == odd


# Weights -----------------------------------------------------------------------------------------


def behind_pair(weight: Array, scale: Array, axis: int | None) -> onnx.ModelProto:
    zero = np.zeros(scale.shape, np.int8)
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "scale", "zero"], ["q"], name="Q", **attributes),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="DQ", **attributes),
        helper.make_node("Add", ["x", "d"], ["y"]),
    ]
    model = model_of(nodes, {"w": weight, "scale": scale, "zero": zero})
    for value in (*model.graph.input, *model.graph.output):
        value.CopyFrom(tensor(value.name, weight.shape))
    return model


@settings(deadline=None, max_examples=60)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_folded_weights_are_bit_equal_to_onnxruntimes(data: st.DataObject, seed: int) -> None:
    generator = np.random.default_rng(seed)
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    weight = (generator.standard_normal(shape) * 10.0 ** generator.integers(-6, 3)).astype(np.float32)
    axis = data.draw(st.one_of(st.none(), st.integers(-len(shape), len(shape) - 1)))
    if axis is None:
        scale = np.asarray(np.abs(weight).max() / 127, np.float32)
    else:
        others = tuple(i for i in range(len(shape)) if i != axis % len(shape))
        scale = np.asarray(np.abs(weight).max(axis=others) / 127, np.float32)
    # Half the time a grid with values exactly between two steps, and some that saturate.
    if data.draw(st.booleans()):
        scale = np.asarray(2.0 ** generator.integers(-4, 4, scale.shape), np.float32)
        weight = (generator.integers(-300, 300, shape) * np.float32(0.25)).astype(np.float32)
    scale = np.maximum(scale, np.float32(1e-30))
    model = behind_pair(weight, scale, axis)
    feed = np.zeros(shape, np.float32)
    before = run(model, x=feed)[0]
    qdq.fold_weights(model)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["DequantizeLinear", "Add"]
    assert "w" not in {t.name for t in model.graph.initializer}
    after = run(model, x=feed)[0]
    assert before.tobytes() == after.tobytes()


def test_the_default_axis_is_that_of_the_operator() -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    model = behind_pair(weight, np.array([0.1, 0.2, 0.3], np.float32), None)
    before = run(model, x=np.zeros((2, 3), np.float32))[0]
    qdq.fold_weights(model)
    assert np.array_equal(run(model, x=np.zeros((2, 3), np.float32))[0], before)


def test_folding_keeps_what_others_use() -> None:
    """The floating-point weight has another reader, and a subgraph reads an initializer that no outer node does."""
    branch = helper.make_graph([helper.make_node("Neg", ["inner"], ["r"])], "b", [], [tensor("r")])
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "scale"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["d"]),
        helper.make_node("Add", ["d", "w"], ["sum"]),
        helper.make_node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["sum", "x"], ["y"]),
    ]
    weight = np.array([1.0, 2.0], np.float32)
    constants = {"w": weight, "scale": np.float32(0.5), "inner": weight * 3, "yes": np.array(True), "out": weight}
    model = model_of(nodes, constants, outputs=("y", "z", "out"))
    before = run(model, x=weight)
    qdq.fold_weights(model)
    assert all(map(np.array_equal, run(model, x=weight), before))
    assert {t.name for t in model.graph.initializer} == {"w", "scale", "q", "inner", "yes", "out"}


def test_activations_are_left_alone() -> None:
    model = with_scale(np.asarray(0.5, np.float32))
    qdq.fold_weights(model)
    assert [node.op_type for node in model.graph.node] == ["QuantizeLinear", "DequantizeLinear"]


# The stage ---------------------------------------------------------------------------------------


def small_network(dynamic: bool = True) -> onnx.ModelProto:
    generator = np.random.default_rng(0)
    shapes = {"w1": (32, 16, 3, 3), "w2": (32, 32, 3, 3), "skip": (32, 16, 1, 1), "head": (32, 10)}
    weights = {n: (generator.standard_normal(s) * 0.1).astype(np.float32) for n, s in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="c1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="r1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="c2", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "skip"], ["s"], name="s"),
        helper.make_node("Add", ["c2", "s"], ["a"], name="a"),
        helper.make_node("ReduceMean", ["a", "axes"], ["m"], name="m", keepdims=0),
        helper.make_node("MatMul", ["m", "head"], ["y"], name="head"),
    ]
    model = model_of(nodes, {**weights, "axes": np.array([2, 3])})
    model.graph.input[0].CopyFrom(tensor("x", ["batch" if dynamic else 2, 16, 8, 8]))
    model.graph.output[0].CopyFrom(tensor("y", ["batch" if dynamic else 2, 10]))
    return model


ACTIVATIONS = ("x", "c1", "r1", "c2", "s", "a", "m", "y")
KNOWN = {name: TensorRange(-4, 4, "minmax") for name in ("x", "r1", "c2", "s", "m")}


def context(tmp_path: Path, known: dict[str, TensorRange] = KNOWN, **sections: Any) -> StageContext:
    onnx_model.save(small_network(), tmp_path / "onnx")
    (tmp_path / "ranges").mkdir()
    ranges.save(tmp_path / "ranges" / ranges.RANGES_FILE, known, {})
    (tmp_path / "out").mkdir()
    return StageContext(
        recipe=recipe.resolve({"model": {"path": "m"}, **sections}),
        artifacts={kind: Artifact(kind, tmp_path / kind, "") for kind in ("onnx", "ranges")},
        output=tmp_path / "out",
        progress=Silent(),
    )


def made(tmp_path: Path, kind: str) -> onnx.ModelProto:
    path = tmp_path / "out" / kind / "model.onnx"
    onnx_model.check(path)
    return onnx.load(str(path))


def test_the_stage_makes_two_graphs_that_compute_the_same(tmp_path: Path) -> None:
    outcome = quantize.run(context(tmp_path))
    deployed, engine = made(tmp_path, "onnx"), made(tmp_path, "engine_onnx")
    facts = outcome.facts
    assert (facts["format"], facts["quantized_nodes"], facts["candidate_nodes"]) == ("qdq", 4, 5)
    assert [entry["node"] for entry in facts["kept_in_floating_point"]] == ["head"]
    assert facts["kept_in_floating_point"][0]["reason"].startswith("10 channels on a side")
    x = np.random.default_rng(1).standard_normal((3, 16, 8, 8)).astype(np.float32)
    (exact,), (one,), (other,) = (run(m, x=x) for m in (small_network(), deployed, engine))
    assert one.tobytes() == other.tobytes()
    cosine = float(np.sum(one * exact) / np.linalg.norm(one) / np.linalg.norm(exact))
    assert 0.99 < cosine < 1
    kinds = {t.name: t.data_type for t in deployed.graph.initializer}
    assert sum(1 for kind in kinds.values() if kind == TensorProto.INT8) >= 3
    assert {"w1", "w2", "skip"}.isdisjoint(kinds)
    assert {"w1", "w2", "skip"} <= {t.name for t in engine.graph.initializer}


def test_a_pattern_that_excludes_nothing_is_told(tmp_path: Path) -> None:
    section = {"nodes_to_exclude": ["head", "hed*"], "op_types_to_exclude": ["Relu", "matmul"]}
    warnings = quantize.run(context(tmp_path, quantize=section)).warnings
    assert [warning.partition(" is nowhere")[0] for warning in warnings] == [
        "quantize.nodes_to_exclude: 'hed*'",
        "quantize.op_types_to_exclude: 'matmul'",
    ]


def test_every_scale_of_a_graph_for_fp16_is_an_fp16_number(tmp_path: Path) -> None:
    outcome = quantize.run(context(tmp_path, {name: TensorRange(-3.7, 3.3, "mse") for name in KNOWN}))
    assert outcome.facts["scales_rounded_to_fp16"] > 0
    model = made(tmp_path, "engine_onnx")
    names = {n.input[1] for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
    found = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name in names]
    assert len(found) == len(names)
    for scale in found:
        assert np.array_equal(scale.astype(np.float16).astype(np.float32), scale)


def test_an_fp32_remainder_keeps_the_scales(tmp_path: Path) -> None:
    outcome = quantize.run(context(tmp_path, cast={"remainder": "fp32"}))
    assert outcome.facts["scales_rounded_to_fp16"] == 0
    scales = [numpy_helper.to_array(t) for t in made(tmp_path, "onnx").graph.initializer if "x_scale" in t.name]
    assert scales
    assert np.allclose(scales[0], 4 / 127, rtol=1e-6)


def test_qoperator_makes_one_graph(tmp_path: Path) -> None:
    settings = {"quantize": {"format": "qoperator"}, "build": {"target": "onnxruntime"}}
    # QLinearConv needs the range of its output as well.
    known = {name: TensorRange(-4, 4, "minmax") for name in ACTIVATIONS}
    outcome = quantize.run(context(tmp_path, known, **settings))
    model = made(tmp_path, "onnx")
    assert (outcome.facts["format"], outcome.facts["quantized_nodes"]) == ("qoperator", 4)
    assert [node.op_type for node in model.graph.node].count("QLinearConv") == 3
    x = np.random.default_rng(1).standard_normal((3, 16, 8, 8)).astype(np.float32)
    one, exact = run(model, x=x)[0], run(small_network(), x=x)[0]
    assert float(np.sum(one * exact) / np.linalg.norm(one) / np.linalg.norm(exact)) > 0.98
    assert not (tmp_path / "out" / "engine_onnx").exists()


def test_a_weight_of_zeros_gives_a_finite_graph(tmp_path: Path) -> None:
    chosen = context(tmp_path)
    model = small_network()
    for value in model.graph.initializer:
        if value.name == "w2":
            value.CopyFrom(numpy_helper.from_array(np.zeros((32, 32, 3, 3), np.float32), "w2"))
    onnx_model.save(model, tmp_path / "onnx")
    quantize.run(chosen)
    x = np.ones((1, 16, 8, 8), np.float32)
    for kind in ("onnx", "engine_onnx"):
        assert np.all(np.isfinite(run(made(tmp_path, kind), x=x)[0]))


@pytest.mark.parametrize(
    ("known", "sections", "said"),
    [
        ({}, {}, "has no calibrated range"),
        (KNOWN, {"quantize": {"nodes_to_exclude": ["*"]}}, "excluded by quantize.nodes_to_exclude"),
        ({name: TensorRange(0, 0, "minmax") for name in KNOWN}, {}, "is zero on all calibration data"),
    ],
)
def test_nothing_to_quantize_is_told_with_the_reasons(
    tmp_path: Path, known: dict[str, TensorRange], sections: dict[str, Any], said: str
) -> None:
    with pytest.raises(QuantizationError, match="no node can be quantized") as caught:
        quantize.run(context(tmp_path, known, **sections))
    assert said in caught.value.message


def test_a_graph_without_candidates_says_so(tmp_path: Path) -> None:
    chosen = context(tmp_path)
    onnx_model.save(model_of([helper.make_node("Relu", ["x"], ["y"])], {}), tmp_path / "onnx")
    with pytest.raises(QuantizationError, match="the graph has no Conv, MatMul or Gemm"):
        quantize.run(chosen)
