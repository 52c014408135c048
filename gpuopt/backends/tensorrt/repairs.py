"""What is tried where the builder stops: a node goes back to FP32, or the workspace shrinks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from gpuopt import onnx_model

SMALLEST_WORKSPACE = 64 << 20
MOST_NODE_REPAIRS = 8
MOST_WORKSPACE_REPAIRS = 3
_MOST_NODES_AT_ONCE = 256

_REGION = re.compile(r"ForeignNode\[(.+)\]")
_NOT_COMPUTING = ("QuantizeLinear", "DequantizeLinear", "Cast", "Constant")


@dataclass(frozen=True)
class NodeRepair:
    """A graph whose named nodes compute in FP32."""

    model: onnx.ModelProto
    nodes: tuple[str, ...]


def smaller_workspace(limit: int | None, free: int | None) -> int | None:
    """The limit of scratch memory to try next, bytes: half; None if it cannot shrink further.

    Args:
        limit: of the build that failed; None: all of the GPU.
        free: memory that is free on the GPU, bytes; None: not known.
    """
    known = [size for size in (limit, free) if size is not None]
    if not known:
        return None
    wanted = min(known) // 2
    return wanted if wanted >= SMALLEST_WORKSPACE else None


def with_nodes_in_fp32(model: onnx.ModelProto, words: str) -> NodeRepair | None:
    """A copy of the graph in which the nodes that a builder names compute in FP32.

    Their Q/DQ are dropped; where they read or make FP16, Casts are inserted.

    Args:
        model: left as it is.
        words: the builder's, as `conv1 + relu1` or `{ForeignNode[a...b]}`.

    Returns:
        None if nothing would change: the nodes are not known, too many, or in FP32 already.
    """
    names = nodes_named(words, model)
    if not names or len(names) > _MOST_NODES_AT_ONCE:
        return None
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    changed = _to_fp32(copy, set(names))
    if not changed:
        return None
    onnx_model.drop_unused_initializers(copy.graph)
    return NodeRepair(onnx_model.sort_topologically(copy), tuple(name for name in names if name in changed))


def nodes_named(words: str, model: onnx.ModelProto) -> list[str]:
    """Names of the computing ONNX nodes that a builder's words for a failing layer stand for, in the graph's order.

    A fused layer is written as its nodes' names with ` + ` between, and a region that was compiled as a whole as
    `{ForeignNode[FIRST...LAST]}`, where both are names of nodes, weights or tensors.
    """
    graph = model.graph
    by_name = {node.name: index for index, node in enumerate(graph.node) if node.name}
    found: set[int] = set()
    region = _REGION.search(words)
    if region:
        first, _, last = region[1].partition("...")
        ends = [_index_of(text, graph, by_name) for text in (first, last)]
        if ends[0] is not None and ends[1] is not None:
            found = _between(graph, ends[0], ends[1])
        elif only := [end for end in ends if end is not None]:
            found = set(only)
    else:
        for text in re.split(r" \+ |, ?|\|\|", words):
            index = _index_of(text, graph, by_name)
            if index is not None:
                found.add(index)
    return [graph.node[i].name for i in sorted(found) if graph.node[i].op_type not in _NOT_COMPUTING]


def _index_of(text: str, graph: onnx.GraphProto, by_name: dict[str, int]) -> int | None:
    for word in reversed([w.strip("{}() ") for w in text.replace("PWN(", "").split(" + ")]):
        if word in by_name:
            return by_name[word]
        for index, node in enumerate(graph.node):
            if word in node.output or word in node.input:
                return index
        # Layers that the builder adds to a node's carry its name and a word of their own behind it.
        near = [name for name in by_name if len(name) > 2 and word.startswith(name) and word[len(name) :].isalpha()]
        if near:
            return by_name[max(near, key=len)]
    return None


def _between(graph: onnx.GraphProto, first: int, last: int) -> set[int]:
    """Indices of the nodes on the ways from one node to another, with both."""
    producers = {name: index for index, node in enumerate(graph.node) for name in node.output}
    needs = [{producers[name] for name in onnx_model.names_read(node) if name in producers} for node in graph.node]
    before, todo = {last}, [last]
    while todo:
        for index in needs[todo.pop()] - before:
            before.add(index)
            todo.append(index)
    after = {first}
    for index in range(len(graph.node)):
        if needs[index] & after:
            after.add(index)
    return (before & after) | {first, last}


def _to_fp32(model: onnx.ModelProto, names: set[str]) -> set[str]:
    """Change the named nodes in place; those that changed."""
    graph = model.graph
    inferred = onnx_model.with_types(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*inferred.value_info, *inferred.input, *inferred.output]}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    types |= {name: tensor.data_type for name, tensor in constants.items()}
    producers = {name: node for node in graph.node for name in node.output}
    used = onnx_model.tensor_names(graph) | {node.name for node in graph.node}
    added: list[onnx.NodeProto] = []
    casts: dict[str, str] = {}
    changed: set[str] = set()

    def in_fp32(name: str) -> str:
        """The FP32 form of an FP16 tensor."""
        if name not in casts:
            casts[name] = onnx_model.free_name(f"{name}_fp32", used)
            if name in constants:
                value = numpy_helper.to_array(constants[name]).astype(np.float32)
                graph.initializer.append(numpy_helper.from_array(value, casts[name]))
            else:
                cast = onnx_model.free_name(f"{name}_to_fp32", used)
                added.append(helper.make_node("Cast", [name], [casts[name]], cast, to=TensorProto.FLOAT))
        return casts[name]

    for node in graph.node:
        if node.name not in names:
            continue
        for position, name in enumerate(node.input):
            source = _without_pair(name, producers, constants, graph, used)
            if source != name:
                node.input[position] = source
                types.setdefault(source, TensorProto.FLOAT)
                constants.update({tensor.name: tensor for tensor in graph.initializer})
                types |= {source: constants[source].data_type} if source in constants else {}
                changed.add(node.name)
            if types.get(node.input[position]) == TensorProto.FLOAT16:
                node.input[position] = in_fp32(node.input[position])
                changed.add(node.name)
        if node.name not in changed:
            continue
        for position, name in enumerate(node.output):
            if types.get(name) == TensorProto.FLOAT16:
                made = onnx_model.free_name(f"{name}_in_fp32", used)
                node.output[position] = made
                cast = onnx_model.free_name(f"{made}_to_fp16", used)
                added.append(helper.make_node("Cast", [made], [name], cast, to=TensorProto.FLOAT16))
    graph.node.extend(added)
    _drop_unread_pairs(graph)
    del graph.value_info[:]
    return changed


def _without_pair(
    name: str,
    producers: dict[str, onnx.NodeProto],
    constants: dict[str, TensorProto],
    graph: onnx.GraphProto,
    used: set[str],
) -> str:
    """The floating-point tensor behind Q and DQ, or behind DQ alone where INT8 weights are stored; else the name."""
    dequantize = producers.get(name)
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return name
    quantize = producers.get(dequantize.input[0])
    if quantize is not None and quantize.op_type == "QuantizeLinear":
        return str(quantize.input[0])
    weight, scale = constants.get(dequantize.input[0]), constants.get(dequantize.input[1])
    if weight is None or scale is None:
        return name
    axis = next((attribute.i for attribute in dequantize.attribute if attribute.name == "axis"), 1)
    value = _dequantized(numpy_helper.to_array(weight), numpy_helper.to_array(scale), axis)
    free = onnx_model.free_name(f"{name}_value", used)
    graph.initializer.append(numpy_helper.from_array(value, free))
    return free


def _dequantized(weight: npt.NDArray[np.int8], scale: npt.NDArray[np.floating], axis: int) -> npt.NDArray[np.float32]:
    """Weight times scale, of the weight's shape; scales of shape (weight.shape[axis],) or ()."""
    if scale.size > 1:
        shape = [1] * weight.ndim
        shape[axis] = scale.size
        scale = scale.reshape(shape)
    return np.asarray(weight.astype(np.float32) * scale.astype(np.float32), np.float32)


def _drop_unread_pairs(graph: onnx.GraphProto) -> None:
    """Remove DQ and Q that nothing reads any more."""
    while True:
        read = onnx_model.tensors_used(graph)
        unread = [
            node
            for node in graph.node
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not read.intersection(node.output)
        ]
        if not unread:
            return
        for node in unread:
            graph.node.remove(node)


def with_io_dtypes(model: onnx.ModelProto, dtypes: Sequence[tuple[str, str]]) -> onnx.ModelProto:
    """A copy whose floating-point inputs and outputs have other dtypes, with Casts behind and before them.

    Args:
        model: left as it is.
        dtypes: name of an input or output, and `fp16` or `fp32`; other names and dtypes are left out.
    """
    wanted_types = {"fp16": TensorProto.FLOAT16, "fp32": TensorProto.FLOAT}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    used = onnx_model.tensor_names(graph) | {node.name for node in graph.node}
    for name, dtype in dtypes:
        wanted = wanted_types.get(dtype)
        is_input = any(value.name == name for value in graph.input)
        value = next((v for v in [*graph.input, *graph.output] if v.name == name), None)
        if wanted is None or value is None or value.type.tensor_type.elem_type not in wanted_types.values():
            continue
        before = value.type.tensor_type.elem_type
        if before == wanted:
            continue
        inner = onnx_model.free_name(f"{name}_inner", used)
        cast = onnx_model.free_name(f"{name}_cast", used)
        for node in graph.node:
            for position, other in enumerate(node.input):
                if other == name:
                    node.input[position] = inner
            for position, other in enumerate(node.output):
                if other == name:
                    node.output[position] = inner
        ends = ([name], [inner]) if is_input else ([inner], [name])
        graph.node.append(helper.make_node("Cast", *ends, cast, to=before if is_input else wanted))
        value.type.tensor_type.elem_type = wanted
    del graph.value_info[:]
    return onnx_model.sort_topologically(copy)
