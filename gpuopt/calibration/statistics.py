"""Statistics of activations computed inside the graph: extremes, and a share of the values.

Activations then stay where they are made, on the GPU too, and are freed as in plain inference; what
comes out of a run is a few numbers and some thousand values a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

_GOLDEN_RATIO = (5**0.5 - 1) / 2
_PREFIX = "gpuopt.statistics"
_EXTREMES = ("ReduceMax", "ReduceMin")
# The extremes that ONNX Runtime gives leave NaN out; a sum does not, and no square cancels another.
_WITNESS = "ReduceSumSquare"
_Shape = list[int | None]


def places(count: int) -> npt.NDArray[np.float64]:
    """`count` numbers in [0, 1), ascending and evenly spread.

    Multiples of the golden ratio, modulo 1: their distances take three values at most (the three-gap
    theorem, V. Sos 1958), and unlike equal ones never fall into step with the length of an axis.
    """
    spread: npt.NDArray[np.float64] = np.sort(np.arange(count) * _GOLDEN_RATIO % 1.0)
    return spread


def positions(length: int, most: int) -> npt.NDArray[np.int64]:
    """Which `most` of `length` values make the share, ascending; all where there are no more, or where `most` is 0."""
    if not most or length <= most:
        return np.arange(length)
    return (places(most) * length).astype(np.int64)


def share(values: npt.NDArray[Any], most: int) -> npt.NDArray[Any]:
    """At most `most` values of every slice along the first axis, as the graph's own statistics take them."""
    if values.ndim < 2 or not most or not values.size:
        return values
    rows = values.reshape(values.shape[0], -1)
    return rows if rows.shape[1] <= most else rows[:, positions(rows.shape[1], most)]


class GraphStatistics:
    """Extends a graph by statistics of some tensors and reads them from a run's outputs.

    Args:
        model: FP32 graph in topological order, with the types of its tensors. Extended in place until `remove`.
        tensors: float32 tensors that nodes of the graph make.
        most: values of each slice along a tensor's first axis to give; 0: extremes only.
    """

    def __init__(self, model: onnx.ModelProto, tensors: Sequence[str], most: int) -> None:
        graph = model.graph
        self._graph = graph
        self._numbers = {tensor: index for index, tensor in enumerate(tensors)}
        self._most = most
        self._shapes = _known_shapes(graph)
        self._nodes = list(graph.node)
        self._before = len(graph.output), len(graph.initializer)
        self.outputs: list[str] = []
        self._extend()

    def remove(self) -> None:
        """Give the graph its own nodes, outputs and initializers back."""
        outputs, initializers = self._before
        del self._graph.node[:], self._graph.output[outputs:], self._graph.initializer[initializers:]
        self._graph.node.extend(self._nodes)

    def read(self, tensor: str, values: Mapping[str, Any]) -> tuple[float, float, npt.NDArray[Any] | None]:
        """Lowest and highest value, and the share: float32 [first axis, `most` or fewer].

        The extremes are NaN if any value is; of a tensor without values inf and -inf.
        """
        number = self._numbers[tensor]
        high, low, witness = (float(values[_name(part, number)]) for part in (*_EXTREMES, _WITNESS))
        if math.isnan(witness):
            low = high = math.nan
        return low, high, values[_name("values", number)] if self._most else None

    def _extend(self) -> None:
        graph, nodes = self._graph, list[onnx.NodeProto]()
        constants: dict[str, npt.NDArray[Any]] = {}
        for node in self._nodes:
            nodes.append(node)
            # Right behind the node that makes the tensor, so that it can be freed soon.
            for tensor in node.output:
                if tensor in self._numbers:
                    nodes.extend(self._statistics(tensor, constants))
        del graph.node[:]
        graph.node.extend(nodes)
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
        for number in self._numbers.values():
            for part in (*_EXTREMES, _WITNESS, *(("values",) if self._most else ())):
                self.outputs.append(_name(part, number))
                graph.output.append(helper.make_tensor_value_info(self.outputs[-1], TensorProto.FLOAT, None))

    def _statistics(self, tensor: str, constants: dict[str, npt.NDArray[Any]]) -> Iterator[onnx.NodeProto]:
        number, shape = self._numbers[tensor], self._shapes.get(tensor)

        def node(op_type: str, inputs: list[str], part: str, **attributes: Any) -> onnx.NodeProto:
            return helper.make_node(op_type, inputs, [_name(part, number)], _name(f"{part}_node", number), **attributes)

        for reduction in (*_EXTREMES, _WITNESS):
            yield node(reduction, [tensor], reduction, keepdims=0)
        if not self._most:
            return
        if not shape:
            # A scalar, or what may be one: Flatten takes none.
            constants[f"{_PREFIX}/last_axis"] = np.array([-1], np.int64)
            yield node("Unsqueeze", [tensor, f"{_PREFIX}/last_axis"], "with_axis")
            tensor = _name("with_axis", number)
        length = _slice_length(shape)
        if length is not None and length <= self._most:
            yield node("Flatten", [tensor], "values", axis=1)
            return
        yield node("Flatten", [tensor], "rows", axis=1)
        if length is not None:
            chosen = f"{_PREFIX}/positions/{length}"
            constants[chosen] = positions(length, self._most)
            yield node("Gather", [_name("rows", number), chosen], "values", axis=1)
            return
        constants[f"{_PREFIX}/places"] = places(self._most)
        constants[f"{_PREFIX}/second"] = np.array([1], np.int64)
        constants[f"{_PREFIX}/more"] = np.array([self._most + 1], np.int64)
        whole = [node("Identity", [_name("rows", number)], "whole")]
        part = [
            node("Cast", [_name("length", number)], "double_length", to=TensorProto.DOUBLE),
            node("Mul", [_name("double_length", number), f"{_PREFIX}/places"], "exact_positions"),
            node("Cast", [_name("exact_positions", number)], "positions", to=TensorProto.INT64),
            node("Gather", [_name("rows", number), _name("positions", number)], "part", axis=1),
        ]
        yield node("Shape", [_name("rows", number)], "shape")
        yield node("Gather", [_name("shape", number), f"{_PREFIX}/second"], "length")
        yield node("Less", [_name("length", number), f"{_PREFIX}/more"], "is_short")
        branches = {"then_branch": _branch(whole), "else_branch": _branch(part)}
        yield node("If", [_name("is_short", number)], "values", **branches)


def _branch(nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
    """A subgraph that gives what the last node makes."""
    name = nodes[-1].output[0]
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])


def _name(part: str, number: int) -> str:
    return f"{_PREFIX}/{part}/{number}"


def _known_shapes(graph: onnx.GraphProto) -> dict[str, _Shape]:
    """The tensors' shapes as far as the graph states them, None for an axis that it leaves open."""
    return {
        value.name: [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.value_info, *graph.output]
        if value.type.tensor_type.HasField("shape")
    }


def _slice_length(shape: _Shape | None) -> int | None:
    """Elements of a slice along the first axis, where the graph fixes them."""
    if shape is None:
        return None
    sizes = [size for size in shape[1:] if size is not None]
    return math.prod(sizes) if len(sizes) == len(shape[1:]) else None
