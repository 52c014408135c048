"""Multiply-accumulates of convolutions and matrix products: how much of the arithmetic a node is."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from gpuopt import onnx_model, reference
from gpuopt.reference import Feed
from gpuopt.shapes import Shape

COUNTED_OPERATORS = ("Conv", "ConvTranspose", "MatMul", "Gemm")

INTEGER_OPERATORS = ("QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "QGemm")
"""The same in ONNX Runtime's operators on integers, which no graph that gpuopt counts for itself has."""

_WEIGHT_BEHIND_SCALES = ("QLinearConv", "QLinearMatMul", "QGemm")


def count(model: onnx.ModelProto, feed: Feed | None, scratch: Path) -> dict[str, int]:
    """Multiply-accumulates of every counted node of the main graph, by node name.

    A convolution makes each of its outputs from (input channels / groups) x kernel products, a
    transposed one spreads each of its inputs over (output channels / groups) x kernel; a matrix product
    takes one for each output and each element of the shared axis. Bias, activation and the bodies of
    Loop and If do not count.

    Args:
        model: graph with unique node names.
        feed: inputs whose shapes stand for open dimensions; None: every open dimension is 1.
        scratch: a folder that is not there yet, for a graph that has to run because shapes depend on data.
    """
    nodes = [node for node in model.graph.node if node.op_type in COUNTED_OPERATORS]
    if not nodes:
        return {}
    shapes = onnx_model.concrete_shapes(model, _input_shapes(model, feed))
    needed = dict.fromkeys(name for node in nodes for name in (*node.input[:2], node.output[0]) if name not in shapes)
    if needed and feed is not None:
        shapes.update(_observed(model, list(needed), feed, scratch))
    return {node.name: of_node(node, shapes) or 0 for node in nodes}


def of_reference(model: onnx.ModelProto, stored: reference.Reference | None, scratch: Path) -> dict[str, int]:
    """`count` for the shapes that the first profile is tuned for; without a reference open dimensions are 1."""
    if stored is None:
        return count(model, None, scratch)
    corner = next((c for c in stored.corners if c.name == "profile0-opt"), stored.corners[0])
    return count(model, stored.feed(corner), scratch)


def share(macs: Mapping[str, int], nodes: Collection[str]) -> float:
    """Share of the multiply-accumulates that the nodes do, 0 to 1; 0 where there are none at all."""
    total = sum(macs.values())
    return sum(macs.get(node, 0) for node in set(nodes)) / total if total else 0.0


def _input_shapes(model: onnx.ModelProto, feed: Feed | None) -> dict[str, Shape]:
    """Those of the feed; without one as the graph states them, with 1 for what it leaves open."""
    if feed is not None:
        return {name: tuple(np.shape(value)) for name, value in feed.items()}
    return {
        spec.name: tuple(size if isinstance(size, int) else 1 for size in spec.shape)
        for spec in onnx_model.input_specs(model)
    }


def _observed(model: onnx.ModelProto, names: Sequence[str], feed: Feed, scratch: Path) -> dict[str, Shape]:
    """The shapes that these tensors have in one run."""
    watched = onnx_model.watching(model, names)
    # Imported here: counting without a run needs no ONNX Runtime.
    from gpuopt.backends.onnxruntime import Session

    values = Session(onnx_model.save(watched, scratch), optimization="basic").run(feed, names)
    return {name: tuple(value.shape) for name, value in values.items()}


def of_node(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
    """Multiply-accumulates of one node of `COUNTED_OPERATORS` or `INTEGER_OPERATORS`; None where a shape is missing."""
    second = 3 if node.op_type in _WEIGHT_BEHIND_SCALES else 1
    if len(node.input) <= second or not node.output:
        return None
    data, weight, made = (shapes.get(name) for name in (node.input[0], node.input[second], node.output[0]))
    if not data or not weight or made is None:
        return None
    if node.op_type in ("Conv", "QLinearConv", "ConvInteger"):
        return math.prod(made) * math.prod(weight[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(data) * math.prod(weight[1:])
    transposed = node.op_type in ("Gemm", "QGemm") and any(a.name == "transA" and a.i for a in node.attribute)
    return math.prod(made) * (data[0] if transposed else data[-1])
