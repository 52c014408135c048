"""Small ONNX graphs for the tests of equalisation and bias correction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from gpuopt import onnx_model

Array = np.ndarray[Any, Any]
Shape = tuple[int | str, ...]


def model_of(
    nodes: Iterable[onnx.NodeProto],
    constants: Mapping[str, Array],
    shape: Shape,
    outputs: tuple[str, ...] = ("y",),
) -> onnx.ModelProto:
    """A graph from `x` of the given shape, its nodes named after their first output, with all types inferred."""
    nodes = list(nodes)
    for node in nodes:
        node.name = node.output[0]
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "g", inputs, made, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    return onnx_model.with_types(model)


def run(model: onnx.ModelProto, x: Array) -> list[Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, {"x": x})
    return outputs


def constant(model: onnx.ModelProto, node: str, position: int) -> Array:
    """The initializer that a node reads."""
    name = next(n for n in model.graph.node if n.name == node).input[position]
    value: Array = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))
    return value


def normal(generator: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    return (generator.standard_normal(shape) * scale).astype(np.float32)


def uneven(generator: np.random.Generator, channels: int, decades: float) -> Array:
    """Positive factors that span some powers of ten."""
    return (10.0 ** generator.uniform(-decades / 2, decades / 2, channels)).astype(np.float32)


def depthwise_block(channels: int = 32, decades: float = 3.0, seed: int = 0) -> onnx.ModelProto:
    """MobileNet's block, 1x1, depthwise 3x3, 1x1, the channels between of very different ranges."""
    g = np.random.default_rng(seed)
    one, two = uneven(g, channels, decades), uneven(g, channels, decades)
    constants = {
        "w1": normal(g, channels, 16, 1, 1, scale=0.25) * one[:, None, None, None],
        "b1": normal(g, channels, scale=0.25) * one,
        "w2": normal(g, channels, 1, 3, 3, scale=0.3) * (two / one)[:, None, None, None],
        "b2": normal(g, channels, scale=0.1) * two,
        "w3": normal(g, 16, channels, 1, 1, scale=0.2) / two[None, :, None, None],
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], group=channels, pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("Conv", ["r2", "w3"], ["y"]),
    ]
    return model_of(nodes, constants, ("batch", 16, 8, 8))


def normalized_products(outlier: float = 100.0, channels: int = 64, seed: int = 0) -> onnx.ModelProto:
    """LayerNorm, some of whose channels are outliers, read by three products (as queries, keys and values are)."""
    g = np.random.default_rng(seed)
    gamma, beta = np.ones(channels, np.float32), normal(g, channels, scale=0.1)
    gamma[::16] = outlier
    names = ("q", "k", "v")
    constants = {"gamma": gamma, "beta": beta} | {n: normal(g, channels, 32, scale=0.1) / gamma[:, None] for n in names}
    nodes = [helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["n"])]
    nodes += [helper.make_node("MatMul", ["n", name], [f"y_{name}"]) for name in names]
    return model_of(nodes, constants, ("batch", 12, channels), tuple(f"y_{name}" for name in names))
