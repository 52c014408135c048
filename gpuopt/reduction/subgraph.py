"""Parts of an ONNX graph as graphs of their own, with the shapes that their new inputs have there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import AttributeProto, GraphProto, SparseTensorProto, TensorProto, helper, numpy_helper

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
        model = helper.make_model(graph, opset_imports=self._model.opset_import, functions=self._functions(nodes))
        model.ir_version = self._model.ir_version
        return Piece(model, profile, len(nodes))

    def _functions(self, nodes: Sequence[onnx.NodeProto]) -> list[onnx.FunctionProto]:
        """The model's own functions that these nodes call, themselves or through others."""
        known = {(one.domain, one.name, one.overload): one for one in self._model.functions}
        called = {}
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            key = (node.domain, node.op_type, node.overload)
            if key in known and key not in called:
                called[key] = known[key]
                waiting.extend(known[key].node)
            for inner in onnx_model.subgraphs(node):
                waiting.extend(inner.node)
        return list(called.values())

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
    for part in _parts(copy):
        for field in ("doc_string", "metadata_props"):
            if field in part.DESCRIPTOR.fields_by_name:
                part.ClearField(field)
    return copy


def _parts(message: Message) -> Iterator[Message]:
    """A message and every one in it: of a model its functions, nodes, constants, the bodies of branches and loops."""
    yield message
    if isinstance(message, TensorProto):
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in [value] if isinstance(value, Message) else value:
                yield from _parts(one)


def with_random_weights(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """A copy whose constants of more than 16 values are random, of the same shape and dtype, wherever they stand.

    Of the old values four numbers remain, so that what fails for their size fails again: smallest and
    largest, and mean and standard deviation of floating-point numbers with a sign. Where all values are
    equal, they stay: such a constant says nothing. NaN and infinities become numbers like the others, and
    texts numbers in the order of their first appearance.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    generator = np.random.default_rng(seed)
    for part in _parts(copy):
        tensors: Iterable[TensorProto] = ()
        if isinstance(part, GraphProto):
            tensors = part.initializer
        elif isinstance(part, SparseTensorProto):
            tensors = (part.values,)
        elif isinstance(part, AttributeProto):
            tensors = (part.t, *part.tensors)
            _make_attribute_random(generator, part)
        for tensor in tensors:
            if math.prod(tensor.dims) > MOST_KEPT_VALUES:
                _make_tensor_random(generator, tensor)
    return copy


def _make_tensor_random(generator: np.random.Generator, tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.STRING:
        tensor.string_data[:] = _numbered(tensor.string_data)
        return
    values = _random(generator, numpy_helper.to_array(tensor))
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _make_attribute_random(generator: np.random.Generator, attribute: AttributeProto) -> None:
    """Constants may be written as lists; of all other nodes, lists of integers and texts are structure."""
    if len(attribute.floats) > MOST_KEPT_VALUES:
        attribute.floats[:] = _random(generator, np.array(attribute.floats, np.float32)).tolist()
    if attribute.name == "value_ints" and len(attribute.ints) > MOST_KEPT_VALUES:
        attribute.ints[:] = _random(generator, np.array(attribute.ints, np.int64)).tolist()
    if attribute.name == "value_strings" and len(attribute.strings) > MOST_KEPT_VALUES:
        attribute.strings[:] = _numbered(attribute.strings)


def _numbered(texts: Iterable[bytes]) -> list[bytes]:
    numbers: dict[bytes, bytes] = {}
    return [numbers.setdefault(text, str(len(numbers)).encode()) for text in texts]


def _random(generator: np.random.Generator, old: np.ndarray) -> np.ndarray:
    name = old.dtype.name
    if name == "bool":
        return old if old.all() or not old.any() else generator.integers(0, 2, old.shape).astype(bool)
    if name.startswith("complex"):
        real, imaginary = (_random(generator, part) for part in (old.real, old.imag))
        return (real + 1j * imaginary).astype(old.dtype)
    # Types of ml_dtypes, as bfloat16 and int4, are no types of numpy's by their kind, but by their name.
    if name.startswith(("int", "uint")):
        whole = old.astype(np.uint64 if name.startswith("u") else np.int64)
        low, high = int(whole.min()), int(whole.max())
        return generator.integers(low, high, old.shape, whole.dtype, endpoint=True).astype(old.dtype)
    wide = old.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    if not finite.size:
        return np.zeros(old.shape).astype(old.dtype)
    low, high = finite.min(), finite.max()
    if low > 0:
        return generator.uniform(low, high, old.shape).astype(old.dtype)
    return generator.normal(finite.mean(), finite.std(), old.shape).clip(low, high).astype(old.dtype)


def random_feed(specs: Sequence[TensorSpec], shapes: Mapping[str, Shape], seed: int) -> dict[str, np.ndarray]:
    """Inputs of these shapes: floats standard normal, integers 0 or 1."""
    from gpuopt.reference import make_feed
    from gpuopt.shapes import Corner

    return make_feed(Corner("reduced", shapes), specs, [], {}, seed)
