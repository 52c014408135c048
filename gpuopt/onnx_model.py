"""Reading, checking and writing ONNX graphs; what ONNX Runtime and TensorRT both accept."""

from __future__ import annotations

import heapq
import itertools
import math
import string
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from gpuopt.artifact import ENGINE_ONNX_FILE, ONNX_FILE
from gpuopt.errors import ModelError, StorageError, one_line
from gpuopt.shapes import DTYPES, TensorSpec

IR_VERSION = 10
"""Highest IR version that ONNX Runtime 1.22, TensorRT 10 and TensorRT-RTX all read."""

_MOST_VALUES_OF_A_SHAPE = 64
_POOLED_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16)
"""ONNX Runtime's CPU provider has no GlobalAveragePool of others."""
_MAX_PROTOBUF_BYTES = (1 << 31) - (1 << 20)

_INFERENCE_ERRORS = (onnx.shape_inference.InferenceError, ValueError, RuntimeError, MemoryError)
"""Beside its own error, onnx hands out those of the C++ library: `vector::reserve` for a size of 2^62, say."""


def load(folder: Path) -> onnx.ModelProto:
    """The graph of an ONNX artifact, external data included."""
    return onnx.load(str(folder / ONNX_FILE))


def load_untrusted(path: Path) -> onnx.ModelProto:
    """A graph from the user.

    Raises:
        ModelError: it is no ONNX file, or its external data is missing or leaves its folder.
    """
    try:
        # Without the format onnx goes by the file's suffix.
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ModelError(f"{path} is not a whole ONNX file: {error}", "Save or download the model again.") from error
    folder = path.parent.resolve()
    try:
        for tensor in _external_tensors(model):
            _check_external(tensor, path, folder)
        onnx.load_external_data_for_model(model, str(folder))
    except (onnx.checker.ValidationError, ValueError, TypeError, RuntimeError, OSError) as error:
        # A name that is too long or no text, and offsets beyond the file.
        raise ModelError(f"{path}: external data cannot be read: {one_line(error)}", "Save the model again.") from error
    return model


def _check_external(tensor: TensorProto, path: Path, folder: Path) -> None:
    location = next((e.value for e in tensor.external_data if e.key == "location"), "")
    data = (folder / location.partition("\0")[0]).resolve()
    if not location or "\0" in location or not data.is_relative_to(folder):
        raise ModelError(
            f"{path}: external data '{location[:100]}' of '{tensor.name}' leaves the model's folder",
            "Store the weights beside the model.",
        )
    if not data.is_file():
        raise ModelError(
            f"{path}: external data '{location[:100]}' is missing", "Copy the weights file beside the model."
        )


def external_files(path: Path) -> list[Path]:
    """Files beside an ONNX file that hold its external data, sorted; none if it cannot be read."""
    try:
        return sorted(p for p in (path.parent / name for name in _locations(path)) if p.is_file())
    except (DecodeError, ValueError, TypeError, OSError):
        return []


def bundled_external_files(path: Path, bundled: Container[str]) -> list[Path]:
    """`external_files` of a bundle's graph, which have to be files of the bundle: a location can lead anywhere.

    Args:
        path: of the graph; the bundle's folder is its parent.
        bundled: names of the bundle's files, as its manifest has them: none of them leaves the folder.

    Raises:
        StorageError: the graph cannot be read, or names another file.
    """
    try:
        locations = sorted(_locations(path))
    except (DecodeError, ValueError) as error:
        raise StorageError(f"{path} is not a whole ONNX file: {one_line(error)}", "Copy the bundle again.") from error
    for location in locations:
        if location not in bundled:
            raise StorageError(
                f"{path}: external data '{location[:100]}' is no file of the bundle",
                "gpuopt writes no such graph: do not trust the bundle. Compile the model again.",
            )
    return [path.parent / location for location in locations]


def _locations(path: Path) -> set[str]:
    model = onnx.load(str(path), format="protobuf", load_external_data=False)
    return {e.value for t in _external_tensors(model) for e in t.external_data if e.key == "location"}


def _external_tensors(model: onnx.ModelProto) -> Iterable[TensorProto]:
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        yield from (t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    graphs.append(attribute.g)
                graphs.extend(attribute.graphs)
                tensors = [attribute.t] if attribute.HasField("t") else []
                yield from (t for t in [*tensors, *attribute.tensors] if t.data_location == TensorProto.EXTERNAL)


def save(model: onnx.ModelProto, folder: Path) -> Path:
    """Write an ONNX artifact; weights of models near protobuf's 2 GiB limit go beside the graph.

    Their file has the name that it keeps in a bundle, where several graphs lie side by side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ONNX_FILE
    model.ir_version = min(model.ir_version, IR_VERSION)
    if model.ByteSize() <= _MAX_PROTOBUF_BYTES:
        onnx.save(model, str(path))
        return path
    graph = ENGINE_ONNX_FILE if folder.name == "engine_onnx" else ONNX_FILE
    onnx.save(model, str(path), save_as_external_data=True, location=f"{graph}.data")
    # Saving moved the weights out of the model in memory.
    onnx.load_external_data_for_model(model, str(folder))
    return path


def check(path: Path) -> None:
    """Full check with shape inference, by path so that models above 2 GiB work too.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: what is wrong.
    """
    onnx.checker.check_model(str(path), full_check=True)


def opset(model: onnx.ModelProto) -> int:
    """Version of the default operator set."""
    return next((int(i.version) for i in model.opset_import if i.domain in ("", "ai.onnx")), 0)


def inputs_of_artifact(folder: Path) -> list[TensorSpec]:
    """The inputs of an ONNX artifact's graph, whose external data are left alone."""
    return input_specs(onnx.load(str(folder / ONNX_FILE), load_external_data=False))


def input_specs(model: onnx.ModelProto) -> list[TensorSpec]:
    """The graph's inputs without those that have an initializer."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return [_spec(value) for value in model.graph.input if value.name not in constants]


def output_specs(model: onnx.ModelProto) -> list[TensorSpec]:
    """The graph's outputs."""
    return [_spec(value) for value in model.graph.output]


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        raise ModelError(
            f"'{value.name}' has no shape in the graph", "Export the model with the shapes of its inputs and outputs."
        )
    shape = tuple(
        int(dim.dim_value) if dim.dim_value > 0 else (dim.dim_param or f"dim{axis}")
        for axis, dim in enumerate(tensor.shape.dim)
    )
    try:
        dtype = str(np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
    except KeyError:
        dtype = ""
    if dtype not in DTYPES:
        known = tensor.elem_type in TensorProto.DataType.values()
        name = TensorProto.DataType.Name(tensor.elem_type) if known else f"number {tensor.elem_type}"
        raise ModelError(
            f"'{value.name}' is of the type {name}", f"gpuopt takes {', '.join(DTYPES)} as inputs and outputs."
        )
    return TensorSpec(value.name, dtype, shape)


def name_dimensions(model: onnx.ModelProto, inputs: Sequence[TensorSpec]) -> None:
    """Give the graph inputs' dynamic dimensions the names in `inputs`, everywhere in the graph."""
    wanted = {spec.name: spec.shape for spec in inputs}
    renamed: dict[str, str] = {}
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            name = wanted.get(value.name, ())[axis : axis + 1]
            if dim.HasField("dim_value") or not name or not isinstance(name[0], str):
                continue
            dim.dim_param = dim.dim_param or name[0]
            renamed.setdefault(dim.dim_param, name[0])
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = renamed.get(dim.dim_param, dim.dim_param)
    del model.graph.value_info[:]


def rename_interface(model: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give the graph's inputs and outputs these names, in order; an inner tensor that has one of them steps aside.

    An output that is an input, or another output, passed through gets a tensor of its own.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    given = [value.name for value in model.graph.input if value.name not in constants]
    used = tensor_names(model.graph) | set(inputs) | set(outputs)
    bound = {value.name for value in model.graph.input}
    for value in model.graph.output:
        if value.name in bound:
            copy = free_name(value.name, used)
            model.graph.node.append(helper.make_node("Identity", [value.name], [copy], name=copy))
            value.name = copy
        bound.add(value.name)
    wanted = dict(zip([*given, *(v.name for v in model.graph.output)], [*inputs, *outputs], strict=True))
    taken = sorted(set(wanted.values()) - set(wanted))
    renamed = {**{name: free_name(f"{name}_inner", used) for name in taken}, **wanted}
    rename_tensors(model.graph, {old: new for old, new in renamed.items() if old != new})


def tensors_used(graph: onnx.GraphProto) -> set[str]:
    """Names that the graph's nodes, those of its subgraphs and its outputs read."""
    used = {value.name for value in graph.output}
    return used.union(*map(names_read, graph.node))


def drop_unused_initializers(graph: onnx.GraphProto) -> None:
    """Remove initializers that no node, subgraph or output reads, also from the inputs where they stand as defaults."""
    used = tensors_used(graph)
    unused = [tensor for tensor in graph.initializer if tensor.name not in used]
    names = {tensor.name for tensor in unused}
    for tensor in unused:
        graph.initializer.remove(tensor)
    for value in [value for value in graph.input if value.name in names]:
        graph.input.remove(value)


def names_read(node: onnx.NodeProto) -> set[str]:
    """Names that a node and its subgraphs read; those of a subgraph's own tensors are among them."""
    return set(node.input).union(*map(tensors_used, subgraphs(node)))


def tensor_names(graph: onnx.GraphProto) -> set[str]:
    """Every name that stands for a tensor, in the graph and in its subgraphs."""
    names = {value.name for value in [*graph.input, *graph.output, *graph.value_info, *graph.initializer]}
    for node in graph.node:
        names.update(node.input, node.output)
        for inner in subgraphs(node):
            names |= tensor_names(inner)
    return names


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name, as Python's values; texts are bytes."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def subgraphs(node: onnx.NodeProto) -> Iterable[onnx.GraphProto]:
    """The bodies of a branch or loop."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def constant_outputs_made_by_nodes(model: onnx.ModelProto) -> None:
    """Every output that is an initializer becomes a node's: what reads the initializer reads it by another name."""
    constants = {tensor.name for tensor in model.graph.initializer}
    used = tensor_names(model.graph)
    for value in model.graph.output:
        if value.name in constants:
            name, inner = value.name, free_name(f"{value.name}_inner", used)
            rename_tensors(model.graph, {name: inner})
            value.name = name
            model.graph.node.append(helper.make_node("Identity", [inner], [name], name=name))


def free_name(name: str, used: set[str]) -> str:
    """The name, or with a number behind it that makes it new; it counts as used from then on."""
    free = next(n for n in itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1))) if n not in used)
    used.add(free)
    return free


def rename_tensors(graph: onnx.GraphProto, renamed: dict[str, str]) -> None:
    """Give tensors other names everywhere, in subgraphs, inputs and outputs, too."""
    for value in [*graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        value.name = renamed.get(value.name, value.name)
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = renamed.get(name, name)
        for inner in subgraphs(node):
            rename_tensors(inner, renamed)


def static_axes(model: onnx.ModelProto, dynamic: dict[str, tuple[int, ...]]) -> list[str]:
    """Input axes that ought to be dynamic and are fixed in the graph, as `name[axis]`."""
    return [
        f"{spec.name}[{axis}]"
        for spec in input_specs(model)
        for axis in dynamic.get(spec.name, ())
        if isinstance(spec.shape[axis], int)
    ]


def node_names_made_unique(model: onnx.ModelProto) -> None:
    """Every node gets a name, and no two the same: placement and fallback speak of nodes by name."""
    seen: set[str] = set()
    for index, node in enumerate(model.graph.node):
        name = node.name or f"{node.op_type}_{index}"
        node.name = free_name(name if name not in seen else f"{name}_{index}", seen)


def sort_topologically(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, its nodes put in an order in which every tensor is made before it is read, also by a subgraph.

    Nodes that need not move stay in their order.
    """
    nodes = list(model.graph.node)
    producers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    needs = [{producers[name] for name in names_read(node) if name in producers} for node in nodes]
    users: list[list[int]] = [[] for _ in nodes]
    for index, needed in enumerate(needs):
        for producer in needed:
            users[producer].append(index)
    ready = [index for index, needed in enumerate(needs) if not needed]
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for user in users[index]:
            needs[user].remove(index)
            if not needs[user]:
                heapq.heappush(ready, user)
    if len(order) != len(nodes):
        raise ValueError("the graph has a cycle")
    del model.graph.node[:]
    model.graph.node.extend(nodes[index] for index in order)
    return model


def with_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the type and shape of every tensor inferred where onnx can.

    Raises:
        ModelError: what the graph states contradicts itself.
    """
    if model.ByteSize() > _MAX_PROTOBUF_BYTES:
        return model
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except _INFERENCE_ERRORS:
        try:
            return onnx.shape_inference.infer_shapes(model)
        except _INFERENCE_ERRORS as error:
            raise ModelError(
                f"the types and shapes of the graph contradict each other: {one_line(error)}", "Export the model again."
            ) from error


def watching(model: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """A copy whose outputs are the model's and these tensors; names that no node makes are left out.

    A tensor whose type the graph does not state is taken for float32.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    made = {name for node in model.graph.node for name in node.output} | {value.name for value in model.graph.input}
    known = {value.name: value for value in [*model.graph.value_info, *model.graph.input]}
    outputs = {value.name for value in model.graph.output}
    for name in dict.fromkeys(tensors):
        if name in made and name not in outputs:
            untyped = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            copy.graph.output.append(known.get(name, untyped))
    return copy


def float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of the tensors known to be float32, initializers left out."""
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    constants = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name
        for value in values
        if value.type.tensor_type.elem_type == TensorProto.FLOAT and value.name not in constants
    }


def concrete_shapes(model: onnx.ModelProto, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors when the graph's inputs have these shapes, where onnx can infer them.

    The weights' values are not looked at, but those that may state shapes, sizes or scales are.
    """
    inferred = _inferred_without_weights(model, inputs)
    if inferred is None:
        return {}
    found = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in [*inferred.value_info, *inferred.input, *inferred.output]:
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            found[value.name] = tuple(dim.dim_value for dim in dims)
    return found


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """The ONNX data type of every tensor of the main graph that is stated or that onnx can infer."""
    found = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    inferred = _inferred_without_weights(model, {})
    for value in [*inferred.value_info, *inferred.input, *inferred.output] if inferred is not None else []:
        found[value.name] = value.type.tensor_type.elem_type
    found.update({tensor.name: tensor.data_type for tensor in model.graph.initializer})
    return {name: kind for name, kind in found.items() if kind != TensorProto.UNDEFINED}


def _inferred_without_weights(model: onnx.ModelProto, inputs: Mapping[str, tuple[int, ...]]) -> onnx.GraphProto | None:
    graph = onnx.GraphProto(name=model.graph.name, node=model.graph.node)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _MOST_VALUES_OF_A_SHAPE:
            graph.initializer.append(tensor)
        else:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name in inputs:
            dtype = value.type.tensor_type.elem_type
            graph.input.append(helper.make_tensor_value_info(value.name, dtype, list(inputs[value.name])))
        elif value.name not in constants:
            graph.input.append(value)
    graph.output.extend(helper.make_empty_tensor_value_info(value.name) for value in model.graph.output)
    small = helper.make_model(graph, opset_imports=model.opset_import, functions=model.functions)
    small.ir_version = model.ir_version
    try:
        return onnx.shape_inference.infer_shapes(small, data_prop=True).graph
    except _INFERENCE_ERRORS:
        return None


def einsum_labels_lowered(model: onnx.ModelProto) -> None:
    """Write the equations of Einsum in small letters: TensorRT takes no others, and torch's exporter keeps capitals."""
    graphs = [model.graph]
    while graphs:
        for node in graphs.pop().node:
            graphs.extend(subgraphs(node))
            for attribute in node.attribute if node.op_type == "Einsum" else ():
                labels = dict.fromkeys(c for c in attribute.s.decode() if c.isalpha())
                if attribute.name == "equation" and len(labels) <= len(string.ascii_lowercase):
                    table = str.maketrans(dict(zip(labels, string.ascii_lowercase, strict=False)))
                    attribute.s = attribute.s.decode().translate(table).encode()


def resizes_asymmetric(model: onnx.ModelProto) -> None:
    """Let every Resize take its points as Upsample, and Resize of opset 10, do: onnx's converter leaves that out."""
    graphs = [model.graph]
    while graphs:
        for node in graphs.pop().node:
            graphs.extend(subgraphs(node))
            if node.op_type == "Resize":
                node.attribute.append(helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
                node.attribute.append(helper.make_attribute("nearest_mode", "floor"))


def zero_biases_dropped(model: onnx.ModelProto) -> None:
    """Remove constant biases that are 0 from convolutions and, from opset 11 on, Gemm, where they are optional.

    Those of layers in front of a fresh BatchNorm are, once the two are one. ONNX Runtime's CUDA provider adds a bias
    in a pass of its own over the output, unless `fuse_conv_bias` is set (ResNet-50, batch 1, FP16, channels last, on an
    H100: 0.57 ms with such a pass, 0.43 ms without biases).
    """
    inputs = {value.name for value in model.graph.input}
    zero = {
        tensor.name for tensor in model.graph.initializer
        if tensor.name not in inputs and len(tensor.dims) == 1 and not numpy_helper.to_array(tensor).any()
    }  # fmt: skip
    has_optional_bias = ("Conv", "ConvTranspose", *(("Gemm",) if opset(model) >= 11 else ()))
    for node in model.graph.node:
        is_own = node.domain in ("", "ai.onnx") and node.op_type in has_optional_bias
        if is_own and len(node.input) == 3 and node.input[2] in zero:
            del node.input[2]
    drop_unused_initializers(model.graph)


def spatial_means_pooled(model: onnx.ModelProto) -> None:
    """Write means over all places of images and volumes as GlobalAveragePool, which INT8 is placed around.

    torch's newer exporter writes ReduceMean over the axes behind (N, C), some models do themselves. Where the axes are
    dropped a Squeeze does that.

    Args:
        model: with the types and shapes of its tensors, as far as they are known.
    """
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim) for value in values
        if value.type.tensor_type.HasField("shape") and value.type.tensor_type.elem_type in _POOLED_TYPES
    }  # fmt: skip
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    used = tensor_names(model.graph)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type != "ReduceMean" or node.domain not in ("", "ai.onnx"):
            continue
        told, rank = attributes(node), ranks.get(node.input[0], 0)
        stated = constants.get(node.input[1]) if len(node.input) > 1 else None
        axes = numpy_helper.to_array(stated).tolist() if stated is not None else told.get("axes", ())
        places = list(range(2, rank))
        if rank not in (4, 5) or sorted(axis % rank for axis in axes) != places:
            continue
        node.op_type = "GlobalAveragePool"
        del node.input[1:]
        del node.attribute[:]
        if not told.get("keepdims", 1):
            output = node.output[0]
            node.output[0] = free_name(f"{output}_pooled", used)
            dropped = helper.make_node("Squeeze", [node.output[0]], [output], f"{node.name}_dropped")
            if opset(model) >= 13:
                dropped.input.append(free_name(f"{output}_places", used))
                model.graph.initializer.append(numpy_helper.from_array(np.array(places, np.int64), dropped.input[1]))
            else:
                dropped.attribute.append(helper.make_attribute("axes", places))
            nodes.append(dropped)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    drop_unused_initializers(model.graph)


def kernel_shapes_stated(model: onnx.ModelProto) -> None:
    """State the size of kernels that only the weights tell: TensorRT asks for it where weights have Q/DQ."""
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose") or node.input[1] not in weights:
            continue
        if not any(attribute.name == "kernel_shape" for attribute in node.attribute):
            node.attribute.append(helper.make_attribute("kernel_shape", list(weights[node.input[1]][2:])))
