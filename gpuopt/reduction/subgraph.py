"""Parts of an ONNX graph as graphs of their own, with the shapes that their new inputs have there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gpuopt import onnx_model
from gpuopt.errors import UsageError
from gpuopt.shapes import Profile, Shape, ShapeRange, TensorSpec

MOST_KEPT_VALUES = 16
"""Constants of so few values are sizes, axes, scalars: a graph is not the same without them, and they say little."""


@dataclass(frozen=True)
class Piece:
    """A part of a graph, complete.

    Attributes:
        model: its inputs are what the part reads and does not make, its outputs what it makes and does not read.
        profile: min / opt / max of every input.
        nodes: how many nodes it has, constants left out.
    """

    model: onnx.ModelProto
    profile: Profile
    nodes: int

    @property
    def operators(self) -> list[str]:
        """Their types, in order."""
        return [node.op_type for node in self.model.graph.node if node.op_type != "Constant"]


class Pieces:
    """A graph to take parts from.

    Args:
        model: types and shapes need not be stated; its nodes may stand in any order.
        profile: shapes of its inputs.
    """

    def __init__(self, model: onnx.ModelProto, profile: Profile) -> None:
        self._model = onnx_model.with_types(model)
        graph = self._model.graph
        self.nodes = [node for node in graph.node if node.op_type != "Constant"]
        self._constant_nodes = {node.output[0]: node for node in graph.node if node.op_type == "Constant"}
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._outputs = [value.name for value in graph.output]
        self._known = {name for node in graph.node for name in node.output} | {*self._weights}
        self._known |= {value.name for value in graph.input}
        self._types = onnx_model.element_types(self._model)
        self._shapes = [
            onnx_model.concrete_shapes(self._model, {name: getattr(sizes, part) for name, sizes in profile.items()})
            for part in ("min", "opt", "max")
        ]

    def piece(self, kept: Sequence[int]) -> Piece | None:
        """The graph of these nodes; None where a tensor at its border has a type or shape that is not known."""
        nodes = [self.nodes[index] for index in kept]
        made = [name for node in nodes for name in node.output if name]
        inside = {name for node in nodes for name in _read_inside(node) if name in self._known}
        read = dict.fromkeys(name for node in nodes for name in node.input if name) | dict.fromkeys(sorted(inside))
        constants = [name for name in read if name in self._weights or name in self._constant_nodes]
        inputs = [name for name in read if name not in {*made, *constants}]
        outputs = [name for name in made if name not in read or name in self._outputs]
        ranges = {name: self._range(name) for name in inputs}
        if any(found is None for found in ranges.values()) or any(name not in self._types for name in inputs):
            return None
        # An output that is not stated, as the mask of a Dropout, is left out.
        typed = [name for name in outputs if name in self._types]
        if not typed:
            return None
        profile = {name: found for name, found in ranges.items() if found is not None}
        graph = helper.make_graph(
            [*(self._constant_nodes[name] for name in constants if name in self._constant_nodes), *nodes],
            "reduced",
            [self._value(name, profile[name]) for name in inputs],
            [self._value(name, self._range(name)) for name in typed],
            [self._weights[name] for name in constants if name in self._weights],
        )
        model = helper.make_model(graph, opset_imports=self._model.opset_import, functions=self._model.functions)
        model.ir_version = self._model.ir_version
        return Piece(model, profile, len(nodes))

    def _range(self, name: str) -> ShapeRange | None:
        shapes = [known.get(name) for known in self._shapes]
        if any(shape is None for shape in shapes):
            return None
        low, middle, high = (tuple(shape or ()) for shape in shapes)
        try:
            return ShapeRange(low, middle, high)
        except UsageError:
            return None

    def _value(self, name: str, sizes: ShapeRange | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, self._types[name], None if sizes is None else dimensions(sizes))


def dimensions(sizes: ShapeRange) -> list[int | str]:
    """A shape with names for what changes; dimensions that change alike have one name."""
    triples = zip(sizes.min, sizes.opt, sizes.max, strict=True)
    return [low if low == high else f"from_{low}_{middle}_to_{high}" for low, middle, high in triples]


def input_specs(piece: Piece) -> list[TensorSpec]:
    """Name, dtype and shape of a piece's inputs."""
    return onnx_model.input_specs(piece.model)


def _read_inside(node: onnx.NodeProto) -> Iterable[str]:
    """What a node's subgraphs read of the graph around them."""
    for inner in onnx_model.subgraphs(node):
        own = {name for one in inner.node for name in one.output} | {value.name for value in inner.input}
        own |= {tensor.name for tensor in inner.initializer}
        yield from onnx_model.tensors_used(inner) - own


def without_origin(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without what exporters write of the user's code: docstrings, metadata, the lines it came from."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for holder in (copy, copy.graph, *copy.functions):
        _forget(holder)
    graphs = [copy.graph]
    while graphs:
        graph = graphs.pop()
        for part in (*graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
            _forget(part)
        for node in graph.node:
            graphs.extend(onnx_model.subgraphs(node))
    return copy


def _forget(part: onnx.ModelProto | onnx.GraphProto | onnx.NodeProto | TensorProto | onnx.ValueInfoProto) -> None:
    part.ClearField("doc_string")
    if "metadata_props" in part.DESCRIPTOR.fields_by_name:
        part.ClearField("metadata_props")


def with_random_weights(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """A copy whose constants of more than 16 values are random, of the same shape and dtype.

    Of the old values two numbers remain, so that what fails for their size fails again: mean and
    standard deviation of those with a sign, smallest and largest of the others. Where all values are
    equal, they stay: such a constant says nothing.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    generator = np.random.default_rng(seed)
    held = [node.attribute[0].t for node in copy.graph.node if node.op_type == "Constant" and node.attribute]
    for tensor in (*copy.graph.initializer, *held):
        if math.prod(tensor.dims) > MOST_KEPT_VALUES:
            values = _random(generator, numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return copy


def _random(generator: np.random.Generator, old: np.ndarray) -> np.ndarray:
    if old.dtype.kind not in "biuf" or old.dtype.name == "bool":
        return generator.integers(0, 2, old.shape).astype(old.dtype) if old.dtype.kind == "b" else old
    low, high = old.min(), old.max()
    if not low < high:
        return old
    if old.dtype.kind in "iu":
        return generator.integers(int(low), int(high), old.shape, endpoint=True).astype(old.dtype)
    wide = old.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    if low > 0:
        return generator.uniform(finite.min(), finite.max(), old.shape).astype(old.dtype)
    return generator.normal(finite.mean(), finite.std(), old.shape).astype(old.dtype)


def random_feed(specs: Sequence[TensorSpec], shapes: Mapping[str, Shape], seed: int) -> dict[str, np.ndarray]:
    """Inputs of these shapes: floats standard normal, integers 0 or 1."""
    from gpuopt.reference import make_feed
    from gpuopt.shapes import Corner

    return make_feed(Corner("reduced", shapes), specs, [], {}, seed)
