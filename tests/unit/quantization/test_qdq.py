"""Q/DQ as decided: the graphs compute what fake quantization in numpy computes, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from gpuopt.calibration.collectors import TensorRange
from gpuopt.errors import QuantizationError
from gpuopt.quantization import qdq
from gpuopt.quantization.placement import Placement, QuantizedInput, candidate_tensors, place
from gpuopt.recipe import QuantizeSection

Array = np.ndarray[Any, Any]
SIZE = (2, 16, 3, 3)
SETTINGS = QuantizeSection()


def run(model: onnx.ModelProto, **feed: Array) -> list[Array]:
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, feed)
    return outputs


# Scales ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=4, max_side=5),
        elements=st.one_of(
            st.floats(width=32, allow_nan=False, allow_infinity=False),
            st.sampled_from([0.0, 1e-45, -1e-40, 1e-38, 3e38]),
        ),
    ),
    st.data(),
)
def test_a_weight_s_codes_stay_within_127_and_are_as_near_as_they_can_be(weight: Array, data: st.DataObject) -> None:
    axis = data.draw(st.one_of(st.none(), st.integers(0, weight.ndim - 1)))
    scale = qdq.weight_scale(weight, axis)
    assert scale.dtype == np.float32
    assert scale.shape == (() if axis is None else (weight.shape[axis],))
    assert np.all(scale >= np.finfo(np.float32).tiny), "zero, or a denormal that a processor may flush to zero"
    spread = scale if axis is None else scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    codes = np.rint(weight / spread)
    assert np.all(np.abs(codes) <= 127)
    error = np.abs(codes * spread.astype(np.float64) - weight)
    assert np.all(error <= spread * (0.5 + 1e-4))
    amax = np.max(np.abs(weight), axis=None if axis is None else tuple(i for i in range(weight.ndim) if i != axis))
    normal = amax >= 127 * np.finfo(np.float32).tiny
    assert np.allclose(scale[normal], amax[normal].astype(np.float64) / 127, rtol=1e-6), "wider than the weight"


@pytest.mark.parametrize(("amax", "scale"), [(127.0, 1.0), (1e-44, np.finfo(np.float32).tiny), (254.0, 2.0)])
def test_an_activation_s_scale(amax: float, scale: float) -> None:
    found = qdq.activation_scale(amax)
    assert (found.dtype, found.shape, float(found)) == (np.float32, (), scale)


# Graphs ------------------------------------------------------------------------------------------
#
# All values are multiples of a power of two with few bits and all scales are powers of two, so that
# every sum is exact and the graphs have to be equal bit by bit, whatever the order of summation.

STEPS = (
    "conv",
    "conv",
    "residual",
    "residual",
    "concat",
    "pool",
    "reshape",
    "transpose",
    "relu",
    "split",
    "slice",
    "axis",
)


class Builder:
    """A random graph of 16-channel tensors, and what numpy makes of it."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator
        self.nodes: list[onnx.NodeProto] = []
        self.values: dict[str, Array] = {
            "shape": np.array([2, 16, 9]),
            "back": np.array(SIZE),
            "halves": np.array([8, 8]),
            **{f"slice{index}": np.array([value]) for index, value in enumerate((-1, -100, 2, -1))},
            "front": np.array([0]),
        }
        self.tensors = ["x"]

    def add(self, op_type: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        results = [name, *(f"{name}_{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(op_type, list(inputs), results, name=f"{op_type}_{name}", **attributes))
        return name

    def conv(self, source: str, channels: int = 16) -> str:
        weight = self.generator.integers(-127, 128, (16, channels, 1, 1)).astype(np.float32)
        weight[:, 0] = 127  # the largest magnitude of every channel, so that its scale is a power of two
        power = self.generator.integers(-9, -6, (16, 1, 1, 1))
        name = f"w{len(self.nodes)}"
        self.values[name] = (weight * 2.0**power).astype(np.float32)
        self.values[name + "b"] = self.generator.integers(-8, 8, 16).astype(np.float32)
        return self.add("Conv", [source, name, name + "b"])

    def step(self, kind: str) -> None:
        source = self.tensors[self.generator.integers(len(self.tensors))]
        other = self.tensors[self.generator.integers(len(self.tensors))]
        if kind == "conv":
            made = self.conv(source)
        elif kind == "residual":
            both = [self.conv(source), other]
            made = self.add("Add", both if self.generator.integers(2) else both[::-1])
        elif kind == "concat":
            made = self.conv(self.add("Concat", [source, other], axis=1), 32)
        elif kind == "pool":
            made = self.add("MaxPool", [source], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        elif kind == "reshape":
            made = self.add("Reshape", [self.add("Reshape", [source, "shape"]), "back"])
        elif kind == "transpose":
            made = self.add("Transpose", [source], perm=[0, 1, 3, 2])
        elif kind == "split":
            first = self.add("Split", [source, "halves"], outputs=2, axis=1)
            made = self.add("Concat", [f"{first}_1", first], axis=1)
        elif kind == "slice":
            made = self.add("Slice", [source, *(f"slice{index}" for index in range(4))])
        elif kind == "axis":
            made = self.add("Squeeze", [self.add("Identity", [self.add("Unsqueeze", [source, "front"])]), "front"])
        else:
            made = self.add("Relu", [source])
        self.tensors.append(made)

    def model(self, outputs: Sequence[str]) -> onnx.ModelProto:
        values = [numpy_helper.from_array(value, name) for name, value in self.values.items()]
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, SIZE) for name in dict.fromkeys(outputs)]
        start = [helper.make_tensor_value_info("x", TensorProto.FLOAT, SIZE)]
        graph = helper.make_graph(self.nodes, "g", start, ends, values)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
        return onnx.shape_inference.infer_shapes(made)


def fake_quantized(values: Array, scale: Array) -> Array:
    return (np.clip(np.rint(values / scale), -128, 127) * scale).astype(np.float32)


def in_numpy(model: onnx.ModelProto, decisions: Sequence[Placement], x: Array) -> list[Array]:
    """The FP32 graph with the operands that the decisions name rounded to their grids."""
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer} | {"x": x}
    by_node = {decision.node: decision for decision in decisions if decision.quantized}
    for node in model.graph.node:
        operands = [known[name] for name in node.input]
        for q in by_node[node.name].inputs if node.name in by_node else ():
            value = operands[q.index]
            if q.amax is not None:
                scale = np.float32(q.amax / 127)
            else:
                assert q.axis == 0
                scale = (np.abs(value).max((1, 2, 3)) / 127).reshape(-1, 1, 1, 1)
            operands[q.index] = fake_quantized(value, scale)
        first = operands[0]
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if node.op_type == "Conv":
            made = np.einsum("oi,nihw->nohw", operands[1][:, :, 0, 0].astype(np.float64), first)
            results = [(made + operands[2].reshape(1, -1, 1, 1)).astype(np.float32)]
        elif node.op_type == "Add":
            results = [first + operands[1]]
        elif node.op_type == "Concat":
            results = [np.concatenate(operands, axis)]
        elif node.op_type == "MaxPool":
            padded = np.pad(first, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
            results = [np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3)).max((4, 5))]
        elif node.op_type == "Reshape":
            results = [first.reshape(operands[1])]
        elif node.op_type == "Transpose":
            results = [first.transpose(0, 1, 3, 2)]
        elif node.op_type == "Split":
            results = np.split(first, 2, axis)
        elif node.op_type == "Slice":
            results = [first[:, :, ::-1]]
        elif node.op_type in ("Unsqueeze", "Squeeze", "Identity"):
            results = [{"Unsqueeze": first[None], "Squeeze": first[0], "Identity": first}[node.op_type]]
        else:
            results = [np.maximum(first, 0)]
        known.update(zip(node.output, results, strict=True))
    return [known[value.name] for value in model.graph.output]


def scale_of(model: onnx.ModelProto, node: onnx.NodeProto) -> Array:
    found: Array = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == node.input[1]))
    return found


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.lists(st.sampled_from(STEPS), min_size=1, max_size=9), st.data())
def test_the_graphs_equal_fake_quantization(seed: int, steps: list[str], data: st.DataObject) -> None:
    generator = np.random.default_rng(seed)
    builder = Builder(generator)
    for kind in steps:
        builder.step(kind)
    builder.tensors.append(builder.conv(builder.tensors[-1]))
    model = builder.model([builder.tensors[-1], data.draw(st.sampled_from(builder.tensors[1:]))])
    ranges = {
        name: TensorRange(0, 127 * 2.0 ** float(generator.integers(-2, 2)), "minmax")
        for name in candidate_tensors(model)
    }
    excluded = data.draw(st.sets(st.sampled_from(["Add", "Concat", "MaxPool", "Reshape"]), max_size=2))
    chosen = SETTINGS.model_copy(update={"op_types_to_exclude": tuple(excluded)})
    decisions = place(model, chosen, ranges, fp16=True)
    graphs = qdq.quantize(model, chosen, decisions, {}, fp16=True)
    assert graphs.engine is not None
    assert graphs.scales_rounded == 0
    x = (generator.integers(-200, 200, SIZE) * 0.25).astype(np.float32)
    wanted = in_numpy(model, decisions, x)
    for graph in (graphs.engine, graphs.runtime):
        for got, want in zip(run(graph, x=x), wanted, strict=True):
            assert np.array_equal(got, want)

    # The rules that hold whatever the graph.
    engine = graphs.engine
    made_by = {name: node for node in engine.graph.node for name in node.output}
    scales = {n.output[0]: float(scale_of(engine, n)) for n in engine.graph.node if n.output[0].endswith("_dequantized")
              and n.input[0] in made_by and not made_by[n.input[0]].input[0].startswith("w")}  # fmt: skip
    pairs = [node for node in engine.graph.node if node.op_type == "QuantizeLinear"]
    assert len({node.input[0] for node in pairs}) == len(pairs), "one pair a tensor"
    assert not {value.name for value in engine.graph.output} & set(scales)
    readers = {name: node for node in engine.graph.node for name in node.input}
    moving = {d.node for d in decisions if d.quantized and d.op_type not in ("Conv", "Add")}
    for node in engine.graph.node:
        if node.op_type == "Conv":
            assert node.input[0] in scales
            assert node.input[2] in builder.values
        if node.op_type == "Add":
            assert sum(name in scales for name in node.input) <= 1
        if node.name in moving:
            count = len(node.input) if node.op_type == "Concat" else 1
            shared = {scales[name] for name in node.input[:count]}
            behind = [readers[name] for name in node.output if name in readers]
            assert all(reader.op_type == "QuantizeLinear" for reader in behind)
            assert {*shared, *(float(scale_of(engine, reader)) for reader in behind)} == shared
            assert len(shared) == 1


def small(weight: Array, **attributes: Any) -> onnx.ModelProto:
    builder = Builder(np.random.default_rng(0))
    builder.values = {"w": weight}
    name = builder.add("Conv", ["x", "w"], **attributes)
    return builder.model([name])


def decided(*inputs: QuantizedInput) -> list[Placement]:
    return [Placement("Conv_t0", "Conv", True, "", "", inputs)]


WEIGHT = np.ones((16, 16, 1, 1), np.float32)


def test_consumers_share_a_pair_and_everyone_else_reads_the_float_tensor() -> None:
    builder = Builder(np.random.default_rng(0))
    relu = builder.add("Relu", ["x"])
    one, two = builder.conv(relu), builder.conv(relu)
    outputs = [builder.add("Add", [one, two]), builder.add("Transpose", [relu], perm=[0, 1, 3, 2]), relu]
    model = builder.model(outputs)
    known = {name: TensorRange(-1, 1, "minmax") for name in candidate_tensors(model)}
    engine = qdq.quantize(model, SETTINGS, place(model, SETTINGS, known, False), {}, False).engine
    assert engine is not None
    by_name = {node.name: node for node in engine.graph.node}
    first, second = (by_name[f"Conv_{name}"].input[0] for name in (one, two))
    assert first == second == "t0_dequantized"
    assert by_name[f"Transpose_{outputs[1]}"].input[0] == relu
    assert [value.name for value in engine.graph.output] == outputs


def test_names_that_are_taken_are_left_alone() -> None:
    builder = Builder(np.random.default_rng(0))
    builder.values = {"w": WEIGHT, "x_scale": np.zeros((1, 1, 3, 3), np.float32)}
    model = builder.model([builder.add("Add", [builder.add("Conv", ["x", "w"]), "x_scale"])])
    decisions = decided(QuantizedInput(0, "x", 127.0), QuantizedInput(1, "w", None, 0))
    engine = qdq.quantize(model, SETTINGS, decisions, {}, False).engine
    assert engine is not None
    x = np.arange(np.prod(SIZE), dtype=np.float32).reshape(SIZE) % 7
    assert np.allclose(run(engine, x=x)[0], run(model, x=x)[0], rtol=1e-6)


def test_a_channel_of_zeros_gives_its_bias() -> None:
    weight = WEIGHT.copy()
    weight[3] = 0
    decisions = decided(QuantizedInput(0, "x", 127.0), QuantizedInput(1, "w", None, 0))
    for fp16 in (False, True):
        graphs = qdq.quantize(small(weight), SETTINGS, decisions, {}, fp16)
        for graph in (graphs.engine, graphs.runtime):
            assert graph is not None
            (y,) = run(graph, x=np.ones(SIZE, np.float32))
            assert np.all(y[:, 3] == 0)
            assert np.allclose(y[:, 2], 16, rtol=1e-3)


def test_a_decision_of_another_graph_is_refused() -> None:
    with pytest.raises(QuantizationError, match="is of another graph: it has no input 'z'"):
        qdq.quantize(small(WEIGHT), SETTINGS, decided(QuantizedInput(0, "z", 1.0)), {}, False)
    gone = [replace(decision, node="n") for decision in decided(QuantizedInput(0, "x", 1.0))]
    with pytest.raises(QuantizationError, match="the decision on 'n' is of another graph"):
        qdq.quantize(small(WEIGHT), SETTINGS, gone, {}, False)


def test_a_weight_that_is_not_finite_is_named() -> None:
    weight = WEIGHT.copy()
    weight[0, 0] = np.nan
    with pytest.raises(QuantizationError, match="the weight 'w' of 'Conv_t0' holds NaN"):
        qdq.quantize(small(weight), SETTINGS, decided(QuantizedInput(1, "w", None, 0)), {}, False)


@pytest.mark.parametrize("shape", [(32, 24), (4, 32, 24), (1, 4, 32, 24)])
def test_stacked_matrices_run_in_onnxruntime_s_integer_kernels(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal(shape).astype(np.float32)
    x = generator.standard_normal((2, 4, 8, 32)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", x.shape), ("y", None))]
    made = helper.make_graph([node], "g", values[:1], values[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    known = {"x": TensorRange(-float(np.abs(x).max()), float(np.abs(x).max()), "minmax")}
    runtime = qdq.quantize(model, SETTINGS, place(model, SETTINGS, known, True), known, True).runtime
    session = ort.InferenceSession(runtime.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x})
    assert np.sum((got - x @ weight) ** 2) < 1e-3 * np.sum((x @ weight) ** 2)
