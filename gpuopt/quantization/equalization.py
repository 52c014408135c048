"""Moving per-channel factors between neighbouring layers, so that INT8's one scale fits all channels better.

A positive factor s_j taken out of channel j by what makes it (a convolution's filters, a
normalisation's gamma and beta) and put back by what reads it (the input channels of the next
weights) changes no output in real arithmetic, as long as everything between is positively
homogeneous: f(s x) = s f(x). Two rules choose the factors:

- cross-layer equalisation (Nagel et al., "Data-Free Quantization Through Weight Equalization and
  Bias Correction", ICCV 2019): the weights on both sides get the same range, from the weights alone;
- smoothing (Xiao et al., "SmoothQuant", ICML 2023): outliers of the activations between move into
  the weights that read them, from the activations' per-channel maxima.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from gpuopt import onnx_model
from gpuopt.quantization.measurement import Reals
from gpuopt.quantization.placement import WEIGHTED_OPERATORS as _WEIGHTED

LARGEST_FACTOR = 256.0
"""A channel is scaled by at most this: beyond it FP16 biases and activations come near their limits."""

_MOST_ROUNDS = 50
_CONVERGED = 1e-3
"""Largest |log s| of a round after which equalisation stops."""

_LAST_AXIS_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_CHANNEL_NORMS = ("BatchNormalization", "InstanceNormalization")
_SAME_AXIS = (
    "Relu", "LeakyRelu", "PRelu", "Abs", "Identity", "Dropout", "MaxPool", "AveragePool", "GlobalAveragePool",
    "GlobalMaxPool", "Resize",
)  # fmt: skip


_MARK = "gpuopt.equalized"


@dataclass(frozen=True)
class Reader:
    """Weights that take a factor in: `node` by position in the graph, the tensor it reads, its channel axis."""

    node: int
    tensor: str
    axis: int


@dataclass(frozen=True)
class Site:
    """A place where a factor for each channel can move.

    Attributes:
        producer: position of the node whose output channels are divided.
        channels: how many.
        linear: whether the producer has weights of its own, so that cross-layer equalisation applies.
        readers: the nodes whose input channels are multiplied: all that read the channels.
        constants: added constants on the way, divided as well: node, input, channel axis counted from the end.
    """

    producer: int
    channels: int
    linear: bool
    readers: tuple[Reader, ...]
    constants: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Equalized:
    """A graph that computes the same, and the names of the nodes whose output channels were scaled."""

    model: onnx.ModelProto
    producers: tuple[str, ...]


def find_sites(model: onnx.ModelProto) -> list[Site]:
    """Every place in an FP32 graph where factors can move, in the graph's order; no reader stands in two sites.

    Weights have to be initializers. A tensor that is a graph output, is read by a subgraph, or meets
    another activation in an Add stays as it is, and so does everything connected to it.
    """
    graph = _Graph(model)
    taken: set[int] = set()
    sites = []
    for index in range(len(graph.nodes)):
        site = _site(graph, index)
        if site is not None and taken.isdisjoint(reader.node for reader in site.readers):
            taken.update(reader.node for reader in site.readers)
            sites.append(site)
    return sites


def cross_layer(model: onnx.ModelProto, sites: Sequence[Site]) -> Equalized:
    """Give the weights on both sides of every linear site the same range a channel.

    With r1 and r2 the largest |w| of an output channel of the first and of the input channel of the
    second weights, s = sqrt(r1 / r2) makes both sqrt(r1 r2). Repeated over all sites until no factor
    moves any more, since a layer between two sites belongs to both. Channels without weights on
    either side keep their factor 1.

    Args:
        model: FP32 graph; left as it is.
        sites: `find_sites` of this graph.
    """
    graph = _Graph(model)
    linear = [site for site in sites if site.linear]
    ranges = _Magnitudes(graph, linear)
    factors = [np.ones(site.channels) for site in linear]
    for _ in range(_MOST_ROUNDS):
        moved = 0.0
        for index, site in enumerate(linear):
            first, second = ranges.of_outputs(site), ranges.of_inputs(site)
            live = (first > 0) & (second > 0)
            step = np.sqrt(np.divide(first, second, out=np.ones_like(first), where=live))
            total = np.clip(factors[index] * step, 1 / LARGEST_FACTOR, LARGEST_FACTOR)
            step = total / factors[index]
            ranges.scale(site, step)
            factors[index] = total
            moved = max(moved, float(np.max(np.abs(np.log(step)), initial=0.0)))
        if moved < _CONVERGED:
            break
    return _apply(model, linear, factors)


def smooth(
    model: onnx.ModelProto, sites: Sequence[Site], maxima: Mapping[str, Reals], alpha: float, per_channel: bool = True
) -> Equalized:
    """Move outliers of the activations into the weights that read them.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), brought to a geometric mean of 1 over a site's
    channels: a factor common to all changes nothing in INT8, and so the magnitudes stay those that
    FP16 was fine with. Where only depthwise convolutions read the channels and every filter has a
    scale of its own, taking in the whole range costs their weights nothing, and alpha is 1.

    Args:
        model: FP32 graph; left as it is.
        sites: `find_sites` of this graph.
        maxima: largest |x| a channel of the tensors that sites' readers read; float64, (channels,).
        alpha: 0: weights even; 1: activations even.
        per_channel: whether weights are quantized with a scale for each output channel.
    """
    graph = _Graph(model)
    ranges = _Magnitudes(graph, sites)
    factors, used = [], []
    for site in sites:
        activations = np.max([maxima[r.tensor] for r in site.readers if r.tensor in maxima], axis=0, initial=0.0)
        weights = ranges.of_inputs(site)
        live = (activations > 0) & (weights > 0)
        if not np.any(live):
            continue
        free = per_channel and all(_is_depthwise(graph, r.node) for r in site.readers)
        share = 1.0 if free else alpha
        logs = np.zeros(site.channels)
        logs[live] = share * np.log(activations[live]) - (1 - share) * np.log(weights[live])
        logs[live] -= np.mean(logs[live])
        factor = np.clip(np.exp(logs), 1 / LARGEST_FACTOR, LARGEST_FACTOR)
        ranges.scale(site, factor)
        factors.append(factor)
        used.append(site)
    return _apply(model, used, factors)


# The graph ---------------------------------------------------------------------------------------


class _Graph:
    """A graph with the look-ups that walking it needs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.readers: dict[str, list[tuple[int, int]]] = {}
        for index, node in enumerate(self.nodes):
            for position, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((index, position))
        self.fixed = {value.name for value in model.graph.output}
        for node in self.nodes:
            for inner in onnx_model.subgraphs(node):
                self.fixed |= onnx_model.tensors_used(inner)
        self.shapes = _shapes(model)
        if any(name not in self.shapes for node in self.nodes for name in node.output if name):
            self.shapes = {**_shapes(onnx_model.with_types(model)), **self.shapes}

    def constant(self, name: str) -> npt.NDArray[np.float32] | None:
        """A float32 initializer; None for anything else."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_type != TensorProto.FLOAT:
            return None
        array: npt.NDArray[np.float32] = numpy_helper.to_array(tensor)
        return array

    def shape_of_constant(self, name: str) -> tuple[int, ...] | None:
        tensor = self.constants.get(name)
        return tuple(tensor.dims) if tensor is not None and tensor.data_type == TensorProto.FLOAT else None

    def integers(self, node: onnx.NodeProto, attribute: str, position: int) -> list[int] | None:
        """What stands in an attribute or, in newer opsets, in a constant input; None where neither does."""
        for found in node.attribute:
            if found.name == attribute:
                return [int(value) for value in found.ints]
        if len(node.input) > position and node.input[position] in self.constants:
            return [int(v) for v in numpy_helper.to_array(self.constants[node.input[position]]).ravel()]
        return None

    def rank(self, name: str) -> int | None:
        shape = self.shapes.get(name)
        return None if shape is None else len(shape)


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Known shapes of activations; a dynamic size is None."""
    return {
        value.name: tuple(d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim)
        for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]
        if value.type.tensor_type.HasField("shape")
    }


@dataclass(frozen=True)
class _Layout:
    """A weight as (groups, first, second, rest): which of the two middle axes holds the output channels."""

    groups: int
    outputs_first: bool

    def view(self, weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)

    def axis(self, outputs: bool) -> int:
        return 1 if outputs == self.outputs_first else 2

    def channels(self, shape: Sequence[int], outputs: bool) -> int:
        return shape[0] if outputs == self.outputs_first else shape[1] * self.groups


def _layout(node: onnx.NodeProto) -> _Layout:
    if node.op_type == "Conv":
        return _Layout(int(onnx_model.attributes(node).get("group", 1)), True)
    if node.op_type == "ConvTranspose":
        return _Layout(int(onnx_model.attributes(node).get("group", 1)), False)
    return _Layout(1, node.op_type == "Gemm" and bool(onnx_model.attributes(node).get("transB", 0)))


def _has_weights(graph: _Graph, node: onnx.NodeProto) -> bool:
    """Whether a node is linear in its first input with constant float32 weights."""
    if node.op_type not in _WEIGHTED or node.input[0] in graph.constants:
        return False
    shape = graph.shape_of_constant(node.input[1])
    if shape is None or len(shape) < 2 or (node.op_type in ("MatMul", "Gemm") and len(shape) != 2):
        return False
    return node.op_type != "Gemm" or not onnx_model.attributes(node).get("transA", 0)


def _is_depthwise(graph: _Graph, index: int) -> bool:
    node = graph.nodes[index]
    shape = graph.shape_of_constant(node.input[1])
    return node.op_type == "Conv" and shape is not None and shape[1] == 1 and _layout(node).groups > 1


def _channel_axis(graph: _Graph, node: onnx.NodeProto, name: str) -> int | None:
    """The axis of a node's input or output that its weights' channels run along."""
    rank = graph.rank(name)
    if rank is None:
        return None
    return 1 if node.op_type in ("Conv", "ConvTranspose", *_CHANNEL_NORMS) else rank - 1


# Finding sites -----------------------------------------------------------------------------------


def _site(graph: _Graph, index: int) -> Site | None:
    node = graph.nodes[index]
    channels = _channels_made(graph, node)
    if channels is None or sum(bool(name) for name in node.output) != 1:
        return None
    axis = _channel_axis(graph, node, node.output[0])
    if axis is None:
        return None
    readers: list[Reader] = []
    constants: list[tuple[int, int, int]] = []
    seen: set[int] = set()
    open_tensors = [(node.output[0], axis)]
    while open_tensors:
        name, axis = open_tensors.pop()
        shape = graph.shapes.get(name, ())
        if name in graph.fixed or name not in graph.readers or axis >= len(shape) or shape[axis] != channels:
            return None
        for reader, position in graph.readers[name]:
            # A node met twice, as a product of two scaled tensors, would scale by the square.
            if reader in seen:
                return None
            seen.add(reader)
            if _absorbs(graph, reader, position, axis, channels):
                readers.append(Reader(reader, name, axis))
                continue
            next_axis = _passes(graph, reader, position, axis)
            if next_axis is None:
                return None
            out = graph.nodes[reader].output[0]
            if graph.nodes[reader].op_type in ("Add", "Sub"):
                constants.append((reader, 1 - position, next_axis - len(shape)))
            open_tensors.append((out, next_axis))
    return Site(
        index, channels, node.op_type in _WEIGHTED, tuple(sorted(readers, key=lambda r: r.node)), tuple(constants)
    )


def _channels_made(graph: _Graph, node: onnx.NodeProto) -> int | None:
    """How many channels a node makes whose scale stands in its constants; None for any other node."""
    if node.op_type in _WEIGHTED:
        if not _has_weights(graph, node) or not _bias_is_constant(graph, node):
            return None
        return _layout(node).channels(graph.shape_of_constant(node.input[1]) or (), outputs=True)
    if node.op_type in (*_LAST_AXIS_NORMS, *_CHANNEL_NORMS):
        constants = [graph.shape_of_constant(name) for name in node.input[1:3] if name]
        same = constants and all(shape is not None and len(shape) == 1 for shape in constants)
        if not same or len(set(constants)) != 1 or constants[0] is None:
            return None
        axis, rank = onnx_model.attributes(node).get("axis", -1), graph.rank(node.output[0])
        if node.op_type in _LAST_AXIS_NORMS and axis not in (-1, (rank or 0) - 1):
            return None
        return constants[0][0]
    if node.op_type == "Mul":
        shapes = [graph.shape_of_constant(name) for name in node.input]
        known = [shape for shape in shapes if shape is not None]
        # The gamma of a normalisation that was exported in pieces: one factor for each of the last axis.
        if len(known) == 1 and known[0] and np.prod(known[0]) == known[0][-1] > 1:
            return known[0][-1]
    return None


def _bias_is_constant(graph: _Graph, node: onnx.NodeProto) -> bool:
    if node.op_type == "MatMul" or len(node.input) < 3 or not node.input[2]:
        return True
    return graph.shape_of_constant(node.input[2]) is not None


def _absorbs(graph: _Graph, index: int, position: int, axis: int, channels: int) -> bool:
    """Whether a node's weights can take in a factor for each channel of this input."""
    node = graph.nodes[index]
    if position != 0 or not _has_weights(graph, node) or _channel_axis(graph, node, node.input[0]) != axis:
        return False
    return _layout(node).channels(graph.shape_of_constant(node.input[1]) or (), outputs=False) == channels


def _passes(graph: _Graph, index: int, position: int, axis: int) -> int | None:
    """The channel axis behind a node that lets positive factors through; None if it does not."""
    node = graph.nodes[index]
    kind, name = node.op_type, node.input[position]
    if sum(bool(out) for out in node.output) != 1:
        return None
    before, after = graph.rank(name), graph.rank(node.output[0])
    if before is None or after is None:
        return None
    if kind in ("Add", "Sub", "Mul", "Div"):
        other = node.input[1 - position]
        if before != after or (kind in ("Sub", "Div") and position != 0):
            return None
        is_constant = graph.shape_of_constant(other) is not None
        return axis if is_constant or (kind == "Mul" and other not in graph.constants) else None
    if position != 0:
        return None
    if kind in _SAME_AXIS:
        return axis if before == after else None
    if kind == "Transpose":
        order = graph.integers(node, "perm", len(node.input)) or list(range(before))[::-1]
        return order.index(axis)
    if kind == "ReduceMean":
        axes = graph.integers(node, "axes", 1)
        reduced = {a % before for a in axes or range(before)}
        if axis in reduced:
            return None
        return axis if onnx_model.attributes(node).get("keepdims", 1) else axis - sum(a < axis for a in reduced)
    if kind in ("Reshape", "Flatten", "Squeeze"):
        return _through_reshape(graph.shapes[name], graph.shapes[node.output[0]], axis)
    return None


def _through_reshape(before: Sequence[int | None], after: Sequence[int | None], axis: int) -> int | None:
    """The channel axis behind a Reshape that keeps channels together: as the last axis, or with only ones behind it."""
    if axis == len(before) - 1 and after and after[-1] == before[-1] is not None:
        return len(after) - 1
    if axis == 1 and len(after) > 1 and after[1] == before[1] and all(n == 1 for n in (*before[2:], *after[2:])):
        # The batch in front is all that is left, so it keeps its place.
        return 1
    return None


# Ranges and factors ------------------------------------------------------------------------------


class _Magnitudes:
    """The largest |w| for each pair of an output and an input channel, of all weights that sites touch."""

    def __init__(self, graph: _Graph, sites: Sequence[Site]) -> None:
        self._graph = graph
        self._tables: dict[int, Reals] = {}
        touched = {s.producer for s in sites if s.linear} | {r.node for s in sites for r in s.readers}
        for index in touched:
            node = graph.nodes[index]
            weight = graph.constant(node.input[1])
            assert weight is not None
            self._tables[index] = np.abs(_layout(node).view(weight)).max(axis=3).astype(np.float64)

    def of_outputs(self, site: Site) -> Reals:
        return self._range(site.producer, True)

    def of_inputs(self, site: Site) -> Reals:
        found: Reals = np.max([self._range(reader.node, False) for reader in site.readers], axis=0)
        return found

    def scale(self, site: Site, factor: Reals) -> None:
        if site.linear:
            self._multiply(site.producer, 1 / factor, True)
        for reader in site.readers:
            self._multiply(reader.node, factor, False)

    def _range(self, index: int, outputs: bool) -> Reals:
        axis = _layout(self._graph.nodes[index]).axis(not outputs)
        found: Reals = self._tables[index].max(axis=axis).ravel()
        return found

    def _multiply(self, index: int, factor: Reals, outputs: bool) -> None:
        layout = _layout(self._graph.nodes[index])
        self._tables[index] *= np.expand_dims(factor.reshape(layout.groups, -1), 3 - layout.axis(outputs))


def _apply(model: onnx.ModelProto, sites: Sequence[Site], factors: Sequence[Reals]) -> Equalized:
    """A new graph with the factors in its constants; a constant that others read too is copied first."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = _Graph(result)
    writer = _Writer(result, graph)
    producers = []
    for site, factor in zip(sites, factors, strict=True):
        if np.allclose(factor, 1.0, rtol=1e-6, atol=0):
            continue
        _divide_outputs(graph, writer, site, factor)
        for index, position, axis in site.constants:
            writer.along(index, position, 1 / factor, axis)
        for reader in site.readers:
            writer.weight(reader.node, factor, outputs=False)
        producers.append(graph.nodes[site.producer].name)
    return Equalized(result, tuple(producers))


def _divide_outputs(graph: _Graph, writer: _Writer, site: Site, factor: Reals) -> None:
    node = graph.nodes[site.producer]
    if node.op_type in _WEIGHTED:
        writer.weight(site.producer, 1 / factor, outputs=True)
        if node.op_type != "MatMul" and len(node.input) > 2 and node.input[2]:
            writer.along(site.producer, 2, 1 / factor, -1)
    elif node.op_type == "Mul":
        position = next(i for i, name in enumerate(node.input) if name in graph.constants)
        writer.along(site.producer, position, 1 / factor, -1)
    else:
        for position in range(1, min(3, len(node.input))):
            if node.input[position]:
                writer.along(site.producer, position, 1 / factor, -1)


class _Writer:
    """Multiplies constants of a graph in place."""

    def __init__(self, model: onnx.ModelProto, graph: _Graph) -> None:
        self._model, self._graph, self._names = model, graph, onnx_model.tensor_names(model.graph)

    def weight(self, index: int, factor: Reals, outputs: bool) -> None:
        """Multiply the output or input channels of a node's weights."""
        node = self._graph.nodes[index]
        layout = _layout(node)
        weight = self._graph.constant(node.input[1])
        assert weight is not None
        view = layout.view(weight)
        spread = np.expand_dims(factor.reshape(layout.groups, -1), 3 - layout.axis(outputs))[..., None]
        self._store(index, 1, (view * spread).reshape(weight.shape))

    def along(self, index: int, position: int, factor: Reals, axis: int) -> None:
        """Multiply a constant that is broadcast, its channel axis counted from the end."""
        array = self._graph.constant(self._graph.nodes[index].input[position])
        assert array is not None
        self._store(index, position, array * factor.reshape(-1, *(1,) * (-axis - 1)))

    def _store(self, index: int, position: int, array: npt.NDArray[Any]) -> None:
        node = self._graph.nodes[index]
        name = node.input[position]
        users = self._graph.readers[name]
        if len(users) > 1 or name in self._graph.fixed:
            users.remove((index, position))
            name = onnx_model.free_name(f"{name}_equalized", self._names)
            node.input[position] = name
            self._graph.readers[name] = [(index, position)]
            self._graph.constants[name] = self._model.graph.initializer.add()
        self._graph.constants[name].CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))


def set_mark(model: onnx.ModelProto, method: str, alpha: float | None) -> None:
    """Note in a graph how it was equalised: ranges found for it are of no use for the original."""
    onnx.helper.set_model_props(
        model,
        {
            **{entry.key: entry.value for entry in model.metadata_props},
            _MARK: method if alpha is None else f"{method} {alpha:g}",
        },
    )


def mark_of(model: onnx.ModelProto) -> str:
    """How a graph was equalised, such as `smooth 0.5`; empty if it was not."""
    return next((entry.value for entry in model.metadata_props if entry.key == _MARK), "")
