"""Operators that TensorRT does not take, in terms of operators that it does, with the same numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from gpuopt import onnx_model

TRANSFORM = "/dft"
"""How the name of a matrix product ends that is a Fourier transform."""
MOST_MATRIX_ENTRIES = 2**24
"""Of a Fourier transform's matrix: 64 MiB in FP32, 2048 complex values."""


def lowered(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with such operators of its main graph replaced; the model itself where there are none.

    Col2Im (PyTorch's `fold`) adds up overlapping blocks of an image: a ConvTranspose with one group a channel, whose
    weights hold a single 1 for each place of the block, in the order of ONNX's definition of Col2Im. That needs two
    spatial axes, and constant sizes; other nodes are left as they are.

    DFT (PyTorch's `torch.fft`) is linear: a product with the matrix of what it makes of unit vectors, real and
    imaginary parts beside each other. That needs a constant length, and one that keeps the matrix small. (ONNX
    Runtime's own transform is faster from some hundred values on.)
    """
    if not has_such_operators(model):
        return model
    model = onnx_model.with_types(model)
    graph = _Graph(model)
    for position, node in reversed(list(enumerate(model.graph.node))):
        if node.op_type not in _LOWERINGS or node.domain or node.input[0] not in graph.types:
            continue
        if made := _LOWERINGS[node.op_type](node, graph):
            model.graph.node.remove(node)
            for offset, new in enumerate(made):
                model.graph.node.insert(position + offset, new)
    return model


def has_such_operators(model: onnx.ModelProto) -> bool:
    """Whether there is one that `lowered` knows, in the main graph."""
    return any(node.op_type in _LOWERINGS and not node.domain for node in model.graph.node)


class _Graph:
    """What is known of a graph's tensors, and its initializers to add to."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.initializers = graph.initializer
        values = (*graph.value_info, *graph.input, *graph.output)
        self.types = {value.name: value.type.tensor_type for value in values}
        self.opset = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._constants |= {node.output[0]: node.attribute[0].t for node in graph.node if _is_constant(node)}
        self._names = onnx_model.tensor_names(graph) | {node.name for node in graph.node}

    def base(self, node: onnx.NodeProto) -> str:
        """A beginning for the names of what replaces a node, which no other name has with a stroke behind it."""
        name = node.name or node.output[0]
        tried = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
        base: str = next(one for one in tried if not any(used.startswith(f"{one}/") for used in self._names))
        self._names.add(f"{base}/")
        return base

    def has_constants(self, names: Iterable[str]) -> bool:
        return set(names) <= self._constants.keys()

    def values(self, name: str) -> npt.NDArray[Any]:
        """Of a constant."""
        values: npt.NDArray[Any] = numpy_helper.to_array(self._constants[name])
        return values

    def sizes(self, name: str) -> list[int]:
        """Of a tensor; 0 is an open one."""
        return [dim.dim_value for dim in self.types[name].shape.dim]

    def add(self, name: str, values: npt.NDArray[Any]) -> str:
        self.initializers.append(numpy_helper.from_array(values, name))
        return name


def _is_constant(node: onnx.NodeProto) -> bool:
    return node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].name == "value"


def _col2im(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    data, *sizes = node.input
    if not graph.has_constants(sizes):
        return []
    image, block = (graph.values(name).tolist() for name in sizes)
    shape, kind = graph.sizes(data), graph.types[data].elem_type
    places = int(np.prod(block))
    if not kind or len(image) != 2 or len(shape) != 3 or not shape[1] or shape[1] % places:
        return []
    settings = onnx_model.attributes(node)
    strides, dilations = settings.get("strides", [1, 1]), settings.get("dilations", [1, 1])
    pads = settings.get("pads", [0, 0, 0, 0])
    channels, spans = shape[1] // places, [d * (k - 1) + 1 for d, k in zip(dilations, block, strict=True)]
    rooms = [size + pads[a] + pads[a + 2] - span for a, (size, span) in enumerate(zip(image, spans, strict=True))]
    counts = [room // stride + 1 for room, stride in zip(rooms, strides, strict=True)]
    left = [room % stride for room, stride in zip(rooms, strides, strict=True)]
    weights = np.eye(places, dtype=helper.tensor_dtype_to_np_dtype(kind)).reshape(places, 1, *block)
    base = graph.base(node)
    # 0 is the batch, as it comes.
    grid = graph.add(f"{base}/shape", np.array([0, shape[1], *counts], np.int64))
    kernel = graph.add(f"{base}/weights", np.tile(weights, (channels, 1, 1, 1)))
    return [
        helper.make_node("Reshape", [data, grid], [f"{base}/grid"], name=f"{base}/grid"),
        helper.make_node(
            "ConvTranspose", [f"{base}/grid", kernel], list(node.output), name=node.name, group=channels,
            kernel_shape=list(block), strides=list(strides), dilations=list(dilations), pads=list(pads),
            output_padding=left,
        ),
    ]  # fmt: skip


def _dft(node: onnx.NodeProto, graph: _Graph) -> list[onnx.NodeProto]:
    data, *others = node.input
    settings = onnx_model.attributes(node)
    if not graph.has_constants(name for name in others if name):
        return []
    given = [int(graph.values(name).item()) if name else None for name in others] + [None, None]
    # The axis is an attribute before opset 20, and has another default.
    axis = settings.get("axis", 1) if graph.opset < 20 else -2 if given[1] is None else given[1]
    shape, kind = graph.sizes(data), graph.types[data].elem_type
    # The last axis holds the parts of a value.
    is_signal = axis in range(-len(shape), len(shape) - 1) and axis != -1
    if not kind or not is_signal or not shape[axis] or shape[-1] not in (1, 2):
        return []
    matrix = _dft_matrix(
        shape[axis], shape[-1], given[0], bool(settings.get("inverse")), bool(settings.get("onesided"))
    )
    if matrix is None:
        return []
    made, parts = matrix.shape[1:]
    base, rank = graph.base(node), len(shape)
    order = [a for a in range(rank - 1) if a != axis % rank] + [axis % rank, rank - 1]
    # 0 is a size as it comes.
    flat = graph.add(f"{base}/flat", np.array([0] * (rank - 2) + [matrix.shape[0]], np.int64))
    apart = graph.add(f"{base}/apart", np.array([0] * (rank - 2) + [made, parts], np.int64))
    values = matrix.reshape(len(matrix), -1).astype(helper.tensor_dtype_to_np_dtype(kind))
    product = f"{base}{TRANSFORM}"
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("Reshape", [flat], {}),
        ("MatMul", [graph.add(f"{base}/matrix", values)], {}),
        ("Reshape", [apart], {}),
    ]
    if order != sorted(order):
        steps = [("Transpose", [], {"perm": order}), *steps, ("Transpose", [], {"perm": np.argsort(order).tolist()})]
    nodes, source = [], data
    for number, (op_type, operands, attributes) in enumerate(steps):
        name = product if op_type == "MatMul" else f"{base}/{op_type.lower()}{number}"
        target = node.output[0] if number == len(steps) - 1 else name
        nodes.append(helper.make_node(op_type, [source, *operands], [target], name=name, **attributes))
        source = target
    return nodes


def _dft_matrix(
    size: int, parts: int, length: int | None, inverse: bool, onesided: bool
) -> npt.NDArray[np.float64] | None:
    """What the transform makes of unit vectors, (size * parts, values made, their parts); None where it is too large.

    Args:
        size: values along the axis.
        parts: 1 where they are real, 2 where they are complex.
        length: of the transform; what is missing is zero, what is beyond is ignored.
    """
    real = inverse and onesided
    length = length or (2 * (size - 1) if real else size)
    if (
        length < 1
        or (onesided and not inverse and parts != 1)
        or size * parts * length * (1 if real else 2) > MOST_MATRIX_ENTRIES
    ):
        return None
    units = np.repeat(np.eye(size), parts, axis=0) * np.tile([1, 1j][:parts], size)[:, None]
    if onesided:
        made = np.fft.irfft(units, length) if inverse else np.fft.rfft(units.real, length)
    else:
        made = np.fft.ifft(units, length) if inverse else np.fft.fft(units, length)
    return np.stack([made.real] if real else [made.real, made.imag], axis=-1)


_LOWERINGS: Mapping[str, Callable[[onnx.NodeProto, _Graph], list[onnx.NodeProto]]] = {"Col2Im": _col2im, "DFT": _dft}
