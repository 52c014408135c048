"""Factors move between layers and no output changes; what may not be scaled is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from gpuopt.quantization import measurement
from gpuopt.quantization.equalization import Site, cross_layer, find_sites, smooth
from tests.unit.quantization.graphs import (
    Array,
    constant,
    depthwise_block,
    model_of,
    normal,
    normalized_products,
    run,
    uneven,
)

BETWEEN = ("none", "Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "Add", "Mul")


def same(one: list[Array], other: list[Array]) -> bool:
    """Equal but for the rounding of float32."""
    return all(
        np.allclose(a, b, rtol=1e-4, atol=1e-5 * max(float(np.abs(b).max()), 1e-30))
        for a, b in zip(one, other, strict=True)
    )


def maxima(model: onnx.ModelProto, sites: list[Site], x: Array, folder: Path) -> dict[str, Any]:
    axes = {reader.tensor: reader.axis for site in sites for reader in site.readers}
    return measurement.channel_maxima(model, axes, [{"x": x}], folder)


def chain(data: st.DataObject, seed: int) -> onnx.ModelProto:
    """Convolutions, plain, grouped, depthwise and transposed, with what lets factors through between them."""
    g = np.random.default_rng(seed)
    constants: dict[str, Array] = {}
    nodes: list[onnx.NodeProto] = []
    channels, tensor = 4, "x"
    count = data.draw(st.integers(2, 4))
    for index in range(count):
        kind = data.draw(st.sampled_from(["Conv", "grouped", "depthwise", "ConvTranspose"]))
        out = channels if kind == "depthwise" else data.draw(st.sampled_from([4, 8]))
        groups = {"Conv": 1, "grouped": 2, "depthwise": channels, "ConvTranspose": data.draw(st.sampled_from([1, 2]))}[
            kind
        ]
        transposed = kind == "ConvTranspose"
        shape = (channels, out // groups, 1, 1) if transposed else (out, channels // groups, 1, 1)
        constants[f"w{index}"] = normal(g, *shape) * uneven(g, shape[0], 2)[:, None, None, None]
        inputs = [tensor, f"w{index}"]
        if data.draw(st.booleans()):
            constants[f"b{index}"] = normal(g, out)
            inputs.append(f"b{index}")
        tensor = "y" if index == count - 1 else f"c{index}"
        nodes.append(helper.make_node("ConvTranspose" if transposed else "Conv", inputs, [tensor], group=groups))
        channels = out
        between = data.draw(st.sampled_from(BETWEEN))
        if tensor == "y" or between == "none":
            continue
        extra: list[str] = []
        attributes: dict[str, Any] = {}
        if between == "PRelu":
            constants[f"k{index}"] = np.abs(normal(g, channels, 1, 1))
            extra = [f"k{index}"]
        elif between in ("Add", "Mul"):
            wide = (1, channels, 1, 1) if data.draw(st.booleans()) else ()
            constants[f"k{index}"] = np.asarray(normal(g, *wide) if wide else 0.7, np.float32)
            extra = [f"k{index}"]
        elif between.endswith("Pool"):
            attributes = {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}
        nodes.append(helper.make_node(between, [tensor, *extra], [f"a{index}"], **attributes))
        tensor = f"a{index}"
    return model_of(nodes, constants, (2, 4, 5, 5))


@settings(deadline=None, max_examples=60)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_no_output_changes(data: st.DataObject, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = chain(data, seed)
    x = normal(np.random.default_rng(seed), 2, 4, 5, 5)
    before, bytes_before = run(model, x), model.SerializeToString()
    sites = find_sites(model)
    assert len(sites) == sum("Conv" in node.op_type for node in model.graph.node) - 1
    assert same(run(cross_layer(model, sites).model, x), before)
    found = maxima(model, sites, x, tmp_path_factory.mktemp("watched") / "graph")
    for alpha in (0.0, 0.5, 1.0):
        assert same(run(smooth(model, sites, found, alpha, data.draw(st.booleans())).model, x), before)
    assert model.SerializeToString() == bytes_before


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), transposed=st.booleans())
def test_both_sides_get_the_same_range(seed: int, transposed: bool) -> None:
    g = np.random.default_rng(seed)
    constants = {
        "w1": normal(g, 6, 8) * uneven(g, 8, 3),
        "b": normal(g, 8),
        "w2": normal(g, 8, 5) * uneven(g, 8, 2)[:, None],
    }
    if transposed:
        constants["w2"] = np.ascontiguousarray(constants["w2"].T)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["s"]),
        helper.make_node("Relu", ["s"], ["r"]),
        helper.make_node("Gemm", ["r", "w2"], ["y"], transB=int(transposed)),
    ]
    model = model_of(nodes, constants, (3, 6))
    equalized = cross_layer(model, find_sites(model))
    first = np.abs(constant(equalized.model, "m", 1)).max(axis=0)
    second = np.abs(constant(equalized.model, "y", 1)).max(axis=0 if transposed else 1)
    assert np.allclose(first, second, rtol=1e-4)
    product = np.abs(constants["w1"]).max(axis=0) * np.abs(constants["w2"]).max(axis=0 if transposed else 1)
    assert np.allclose(first**2, product, rtol=1e-4)
    assert equalized.producers == ("m",)


def test_a_chain_through_a_depthwise_convolution_converges() -> None:
    model = depthwise_block()
    sites = find_sites(model)
    assert [model.graph.node[site.producer].name for site in sites] == ["c1", "c2"]
    found = cross_layer(model, sites).model
    ranges = [
        np.abs(constant(found, "c1", 1)).max(axis=(1, 2, 3)),
        np.abs(constant(found, "c2", 1)).max(axis=(1, 2, 3)),
        np.abs(constant(found, "y", 1)).max(axis=(0, 2, 3)),
    ]
    assert np.allclose(ranges[0], ranges[1], rtol=0.01)
    assert np.allclose(ranges[1], ranges[2], rtol=0.01)


def test_dead_channels_stay_as_they_are(tmp_path: Path) -> None:
    model = depthwise_block(channels=32)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    dead = onnx.numpy_helper.to_array(weights["w1"]).copy()
    dead[3] = 0
    weights["w1"].CopyFrom(onnx.numpy_helper.from_array(dead, "w1"))
    unread = onnx.numpy_helper.to_array(weights["w3"]).copy()
    unread[:, 5] = 0
    weights["w3"].CopyFrom(onnx.numpy_helper.from_array(unread, "w3"))
    x = normal(np.random.default_rng(0), 2, 16, 8, 8)
    sites = find_sites(model)
    for result in (cross_layer(model, sites), smooth(model, sites, maxima(model, sites, x, tmp_path / "w"), 0.5)):
        assert all(np.all(np.isfinite(onnx.numpy_helper.to_array(t))) for t in result.model.graph.initializer)
        assert np.array_equal(constant(result.model, "y", 1)[:, 5], unread[:, 5])
        assert same(run(result.model, x), run(model, x))
    assert constant(cross_layer(model, sites).model, "c1", 2)[3] == constant(model, "c1", 2)[3]


def test_smoothing_takes_outliers_out_of_a_normalisation_with_many_readers(tmp_path: Path) -> None:
    model = normalized_products()
    sites = find_sites(model)
    assert [(site.linear, len(site.readers)) for site in sites] == [(False, 3)]
    x = normal(np.random.default_rng(0), 4, 12, 64)
    found = maxima(model, sites, x, tmp_path / "before")
    result = smooth(model, sites, found, 0.5)
    assert same(run(result.model, x), run(model, x))
    after = maxima(result.model, sites, x, tmp_path / "after")["n"]
    assert found["n"].max() / np.median(found["n"]) > 50
    assert after.max() / np.median(after) < 10
    assert not cross_layer(model, [site for site in sites if site.linear]).producers


def test_a_normalisation_in_pieces_and_a_shared_gamma(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    gamma = uneven(g, 8, 2)
    constants = {"gamma": gamma, "beta": normal(g, 8), "w": normal(g, 8, 4), "v": normal(g, 8, 4), "one": np.float32(1)}
    nodes = [
        helper.make_node("Div", ["x", "one"], ["d"]),
        helper.make_node("Mul", ["d", "gamma"], ["m"]),
        helper.make_node("Add", ["m", "beta"], ["n"]),
        helper.make_node("MatMul", ["n", "w"], ["y"]),
        helper.make_node("LayerNormalization", ["x", "gamma"], ["k"]),
        helper.make_node("MatMul", ["k", "v"], ["z"]),
    ]
    model = model_of(nodes, constants, (2, 3, 8), ("y", "z"))
    sites = find_sites(model)
    assert [model.graph.node[site.producer].name for site in sites] == ["m", "k"]
    x = normal(g, 2, 3, 8)
    result = smooth(model, sites, maxima(model, sites, x, tmp_path / "w"), 1.0)
    assert result.producers == ("m", "k")
    assert same(run(result.model, x), run(model, x))
    assert not np.array_equal(constant(result.model, "m", 1), constant(result.model, "k", 1))


def test_a_gate_that_reads_the_same_channels_is_no_hindrance() -> None:
    g = np.random.default_rng(0)
    constants = {
        "w1": normal(g, 8, 4, 1, 1) * uneven(g, 8, 2)[:, None, None, None],
        "s1": normal(g, 4, 8, 1, 1),
        "s2": normal(g, 8, 4, 1, 1),
        "w2": normal(g, 4, 8, 1, 1),
        "axes": np.array([2, 3]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ReduceMean", ["r", "axes"], ["mean"]),
        helper.make_node("Conv", ["mean", "s1"], ["squeezed"]),
        helper.make_node("Relu", ["squeezed"], ["q"]),
        helper.make_node("Conv", ["q", "s2"], ["excited"]),
        helper.make_node("HardSigmoid", ["excited"], ["gate"]),
        helper.make_node("Mul", ["gate", "r"], ["gated"]),
        helper.make_node("Conv", ["gated", "w2"], ["y"]),
    ]
    model = model_of(nodes, constants, (2, 4, 5, 5))
    sites = find_sites(model)
    names = [node.name for node in model.graph.node]
    readers = {names[site.producer]: [names[r.node] for r in site.readers] for site in sites}
    assert readers == {"c": ["squeezed", "y"], "squeezed": ["excited"]}
    x = normal(g, 2, 4, 5, 5)
    assert same(run(cross_layer(model, sites).model, x), run(model, x))


@pytest.mark.parametrize(
    "kind", ["HardSwish", "Sigmoid", "Clip", "Softmax", "Tanh", "Softplus", "residual", "square", "output"]
)
def test_what_is_not_homogeneous_or_read_elsewhere_is_no_site(kind: str) -> None:
    g = np.random.default_rng(0)
    constants: dict[str, Array] = {"w1": normal(g, 8, 8, 1, 1), "w2": normal(g, 8, 8, 1, 1)}
    between = {
        "residual": helper.make_node("Add", ["c", "x"], ["a"]),
        "square": helper.make_node("Mul", ["c", "c"], ["a"]),
        "output": helper.make_node("Relu", ["c"], ["a"]),
        "Clip": helper.make_node("Clip", ["c", "low", "high"], ["a"]),
    }.get(kind) or helper.make_node(kind, ["c"], ["a"])
    if kind == "Clip":
        constants |= {"low": np.float32(0), "high": np.float32(6)}
    nodes = [helper.make_node("Conv", ["x", "w1"], ["c"]), between, helper.make_node("Conv", ["a", "w2"], ["y"])]
    model = model_of(nodes, constants, (1, 8, 4, 4), ("y", "c") if kind == "output" else ("y",))
    assert find_sites(model) == []
