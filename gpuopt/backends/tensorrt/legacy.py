"""Operators that TensorRT 8.5 does not know, in terms of those that it does."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from gpuopt import onnx_model

FIRST_WITH_LAYER_NORMALIZATION = (8, 6)


def without_layer_normalization(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy with LayerNormalization as mean, variance, division, scale and bias.

    The function body of the operator in ONNX's specification (LayerNormalization-17), in the graph's own dtype.

    Args:
        model: left as it is; ReduceMean has its axes as an attribute (opset 17 or less).

    Returns:
        None if there is nothing to replace.
    """
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    replaced = [node for node in model.graph.node if _is_replaced(node, ranks)]
    if not replaced:
        return None
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    used = onnx_model.tensor_names(copy.graph) | {node.name for node in copy.graph.node}
    kept = [node for node in copy.graph.node if not _is_replaced(node, ranks)]
    for node in replaced:
        kept += _spelled_out(node, ranks, used, copy.graph)
    del copy.graph.node[:]
    copy.graph.node.extend(kept)
    return onnx_model.sort_topologically(copy)


def _is_replaced(node: onnx.NodeProto, ranks: dict[str, int]) -> bool:
    """Whether it normalises by a constant scale, and gives nothing but the result."""
    is_plain = node.op_type == "LayerNormalization" and not any(node.output[1:])
    return is_plain and node.input[1] in ranks


def _spelled_out(
    node: onnx.NodeProto, ranks: dict[str, int], used: set[str], graph: onnx.GraphProto
) -> list[onnx.NodeProto]:
    attributes = onnx_model.attributes(node)
    axis = attributes.get("axis", -1)
    # The scale has the shape of what is normalised: its rank tells the axes where they are counted from the front.
    axes = list(range(axis if axis < 0 else -ranks[node.input[1]], 0))
    made: list[onnx.NodeProto] = []

    def tensor(name: str) -> str:
        return onnx_model.free_name(f"{node.output[0]}_{name}", used)

    def add(op_type: str, inputs: list[str], output: str, **given: object) -> str:
        made.append(helper.make_node(op_type, inputs, [output], f"{node.name or node.output[0]}/{op_type}", **given))
        made[-1].name = onnx_model.free_name(made[-1].name, used)
        return output

    dtype = next((t.data_type for t in graph.initializer if t.name == node.input[1]), onnx.TensorProto.FLOAT)
    epsilon = tensor("epsilon")
    value = np.asarray(attributes.get("epsilon", 1e-5), helper.tensor_dtype_to_np_dtype(dtype))
    graph.initializer.append(numpy_helper.from_array(value, epsilon))
    source = node.input[0]
    mean = add("ReduceMean", [source], tensor("mean"), axes=axes, keepdims=1)
    centred = add("Sub", [source, mean], tensor("centred"))
    squares = add("Mul", [centred, centred], tensor("squares"))
    variance = add("ReduceMean", [squares], tensor("variance"), axes=axes, keepdims=1)
    shifted = add("Add", [variance, epsilon], tensor("shifted"))
    deviation = add("Sqrt", [shifted], tensor("deviation"))
    has_bias = len(node.input) > 2 and node.input[2]
    normal = add("Div", [centred, deviation], tensor("normal"))
    scaled = add("Mul", [normal, node.input[1]], tensor("scaled") if has_bias else node.output[0])
    if has_bias:
        add("Add", [scaled, node.input[2]], node.output[0])
    return made
