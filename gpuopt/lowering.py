"""Operators that TensorRT does not take, in terms of operators that it does, with the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from gpuopt import onnx_model


def lowered(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with such operators of its main graph replaced; the model itself where there are none.

    Col2Im (PyTorch's `fold`) adds up overlapping blocks of an image: a ConvTranspose with one group a channel, whose
    weights hold a single 1 for each place of the block, in the order of ONNX's definition of Col2Im. That needs two
    spatial axes, and constant sizes; other nodes are left as they are.
    """
    if all(node.op_type != "Col2Im" for node in model.graph.node):
        return model
    model = onnx_model.with_types(model)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in graph.node if _is_constant(node)}
    types = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.input)}
    for position, node in reversed(list(enumerate(graph.node))):
        if node.op_type != "Col2Im" or node.domain:
            continue
        data, *sizes = node.input
        if data not in types or not set(sizes) <= constants.keys():
            continue
        image, block = (numpy_helper.to_array(constants[name]).tolist() for name in sizes)
        made = _col2im(node, image, block, types[data], graph)
        if made:
            graph.node.remove(node)
            for offset, new in enumerate(made):
                graph.node.insert(position + offset, new)
    return model


def _is_constant(node: onnx.NodeProto) -> bool:
    return node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].name == "value"


def _col2im(
    node: onnx.NodeProto,
    image: Sequence[int],
    block: Sequence[int],
    data: onnx.TypeProto.Tensor,
    graph: onnx.GraphProto,
) -> list[onnx.NodeProto]:
    # 0 is an open size.
    shape = [dim.dim_value for dim in data.shape.dim]
    places = int(np.prod(block))
    if not data.elem_type or len(image) != 2 or len(shape) != 3 or not shape[1] or shape[1] % places:
        return []
    settings = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    strides, dilations = settings.get("strides", [1, 1]), settings.get("dilations", [1, 1])
    pads = settings.get("pads", [0, 0, 0, 0])
    channels, spans = shape[1] // places, [d * (k - 1) + 1 for d, k in zip(dilations, block, strict=True)]
    rooms = [size + pads[a] + pads[a + 2] - span for a, (size, span) in enumerate(zip(image, spans, strict=True))]
    counts = [room // stride + 1 for room, stride in zip(rooms, strides, strict=True)]
    left = [room % stride for room, stride in zip(rooms, strides, strict=True)]
    dtype = helper.tensor_dtype_to_np_dtype(data.elem_type)
    weights = np.tile(np.eye(places, dtype=dtype).reshape(places, 1, *block), (channels, 1, 1, 1))
    names = {part: f"{node.name or node.output[0]}/{part}" for part in ("grid", "shape", "weights")}
    # 0 is the batch, as it comes.
    new_shape = np.array([0, shape[1], *counts], np.int64)
    graph.initializer.extend(
        [numpy_helper.from_array(new_shape, names["shape"]), numpy_helper.from_array(weights, names["weights"])]
    )
    return [
        helper.make_node("Reshape", [node.input[0], names["shape"]], [names["grid"]], name=names["grid"]),
        helper.make_node(
            "ConvTranspose", [names["grid"], names["weights"]], list(node.output), name=node.name, group=channels,
            kernel_shape=list(block), strides=list(strides), dilations=list(dilations), pads=list(pads),
            output_padding=left,
        ),
    ]  # fmt: skip
