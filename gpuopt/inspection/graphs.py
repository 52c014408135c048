"""An ONNX graph: interface, weights, operators, and how much of its arithmetic is INT8."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from pydantic import ValidationError

from gpuopt import onnx_model
from gpuopt.errors import ModelError, one_line
from gpuopt.inspection import loading
from gpuopt.inspection.home import Home
from gpuopt.inspection.model import FileFacts, GraphFacts, TensorFacts, WeightFacts
from gpuopt.inspection.runtime_limits import Operator
from gpuopt.quantization import macs
from gpuopt.shapes import Shape, format_shape, tuned_shapes
from gpuopt.storage import sha256_file, storage_errors

_PRECISIONS: Mapping[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.DOUBLE: "fp64",
}
_INTEGERS = (TensorProto.INT8, TensorProto.UINT8)
_MOVING_WEIGHTS = ("Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze")
"""What may stand between a weight's DequantizeLinear and the node that multiplies by it."""


def describe(path: Path, home: Home | None, with_origin: bool) -> GraphFacts:
    """What an ONNX file holds.

    Args:
        home: the bundle that it lies in.
        with_origin: whether the bundle's origin is told, too.

    Raises:
        StorageError: it cannot be read.
        ModelError: it is no whole ONNX file, is damaged, or its external data is missing or leaves its folder.
    """
    model = onnx_model.load_untrusted(path)
    try:
        return _describe(path, model, home, with_origin)
    except (UnicodeError, ValidationError, TypeError) as error:
        # Names that are no UTF-8 come as bytes; protobuf lets them pass.
        raise ModelError(
            f"{path} is a damaged ONNX file: {one_line(error)}", "Save or download the model again."
        ) from error


def _describe(path: Path, model: onnx.ModelProto, home: Home | None, with_origin: bool) -> GraphFacts:
    nodes = list(_nodes(model.graph))
    shapes = _input_shapes(model, home)
    precisions = _Precisions(model)
    computing = [node for node in model.graph.node if _computes(node)]
    found = {id(node): precisions.of(node) for node in computing}
    inferred = onnx_model.concrete_shapes(model, shapes) if computing else {}
    counts = [macs.of_node(node, inferred) for node in computing]
    known = [count for count in counts if count is not None]
    total = sum(known) if computing and len(known) == len(counts) else None
    int8 = sum(count or 0 for node, count in zip(computing, counts, strict=True) if found[id(node)] == "int8")
    return GraphFacts(
        file=_file(path, path.name, home),
        external=tuple(
            _file(data, str(data.relative_to(path.parent)), home) for data in onnx_model.external_files(path)
        ),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        ir_version=model.ir_version,
        opsets={entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        inputs=tuple(map(_tensor, _inputs(model))),
        outputs=tuple(map(_tensor, model.graph.output)),
        profiles=home.profile_facts() if home is not None else (),
        weights=_weights(model.graph),
        operators=dict(Counter(_operator(node) for node in nodes).most_common()),
        computing_nodes=dict(Counter(found[id(node)] for node in computing).most_common()),
        qdq_pairs=precisions.pairs(),
        dequantized_weights=precisions.dequantized_weights(),
        macs=total,
        int8_macs_share=int8 / total if total else None,
        macs_shapes={name: format_shape(shape) for name, shape in shapes.items()} if total is not None else {},
        loading=loading.of_graph(model.ir_version, _opsets(model.opset_import), _needed_operators(model)),
        origin=home.origin() if home is not None and with_origin else None,
    )


class _Precisions:
    """Which precision a node of the main graph multiplies in."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._types = onnx_model.element_types(model)
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._constants = {tensor.name for tensor in model.graph.initializer}
        self._dequantize = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]

    def of(self, node: onnx.NodeProto) -> str:
        """`int8`: both factors are; else the type of the result."""
        if node.op_type in macs.INTEGER_OPERATORS:
            return "int8"
        if len(node.input) > 1 and all(map(self._is_integer, node.input[:2])):
            return "int8"
        kind = next((self._types[name] for name in (*node.output, *node.input[:2]) if name in self._types), None)
        return _PRECISIONS.get(kind, "other") if kind is not None else "unknown"

    def pairs(self) -> int:
        """Tensors with Q and DQ in sequence."""
        return sum(self._made_by(node.input[0], "QuantizeLinear") for node in self._dequantize)

    def dequantized_weights(self) -> int:
        """Constants with a DQ alone, biases included."""
        return sum(node.input[0] in self._constants for node in self._dequantize)

    def _is_integer(self, name: str) -> bool:
        maker = self._makers.get(name)
        # A damaged graph may go in circles.
        passed: set[str] = set()
        while maker is not None and maker.op_type in _MOVING_WEIGHTS and maker.input and name not in passed:
            passed.add(name)
            name = maker.input[0]
            maker = self._makers.get(name)
        if maker is None or maker.op_type != "DequantizeLinear":
            return False
        stored = self._types.get(maker.input[0])
        if stored is None and len(maker.input) > 2:
            stored = self._types.get(maker.input[2])
        # A quantizer without a zero point makes UINT8.
        return stored in _INTEGERS or (stored is None and self._made_by(maker.input[0], "QuantizeLinear"))

    def _made_by(self, name: str, operator: str) -> bool:
        maker = self._makers.get(name)
        return maker is not None and maker.op_type == operator


def _computes(node: onnx.NodeProto) -> bool:
    return node.op_type in macs.COUNTED_OPERATORS or node.op_type in macs.INTEGER_OPERATORS


def _file(path: Path, name: str, home: Home | None) -> FileFacts:
    with storage_errors("read", path):
        size, sha256 = path.stat().st_size, sha256_file(path)
    fits = home.hash_fits(name, sha256) if home is not None else None
    return FileFacts(name=name, size_bytes=size, sha256=sha256, matches_manifest=fits)


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    """Version by domain, ai.onnx's under its other name, the empty one."""
    return {_domain(entry.domain): entry.version for entry in imports}


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _needed_operators(model: onnx.ModelProto) -> set[Operator]:
    """Every operator that the file does not define itself."""
    own = {(_domain(function.domain), function.name) for function in model.functions}
    found = set()
    for part in (model.graph, *model.functions):
        opsets = _opsets((model if part is model.graph else part).opset_import)
        for node in _nodes(part):
            domain = _domain(node.domain)
            if (domain, node.op_type) not in own:
                found.add((domain, node.op_type, opsets.get(domain, 1)))
    return found


def _nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for inner in onnx_model.subgraphs(node):
            yield from _nodes(inner)


def _operator(node: onnx.NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else str(node.op_type)


def _inputs(model: onnx.ModelProto) -> Iterable[onnx.ValueInfoProto]:
    constants = {tensor.name for tensor in model.graph.initializer}
    return (value for value in model.graph.input if value.name not in constants)


def _input_shapes(model: onnx.ModelProto, home: Home | None) -> dict[str, Shape]:
    """Those that the first profile is tuned for; without one as the graph has them, 1 for what it leaves open."""
    tuned = tuned_shapes(home.profiles) if home and home.profiles else {}
    found: dict[str, Shape] = {}
    for value in _inputs(model):
        shape = _shape(value)
        if value.name in tuned and shape is not None and len(tuned[value.name]) == len(shape):
            found[value.name] = tuned[value.name]
        elif shape is not None:
            found[value.name] = tuple(size if isinstance(size, int) else 1 for size in shape)
    return found


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(
        int(dim.dim_value) if dim.HasField("dim_value") and dim.dim_value >= 0 else (dim.dim_param or f"dim{axis}")
        for axis, dim in enumerate(tensor.shape.dim)
    )


def _tensor(value: onnx.ValueInfoProto) -> TensorFacts:
    if not value.type.HasField("tensor_type"):
        return TensorFacts(name=value.name, dtype=(value.type.WhichOneof("value") or "unknown")[:-5], shape=None)
    return TensorFacts(name=value.name, dtype=_dtype(value.type.tensor_type.elem_type), shape=_shape(value))


def _dtype(kind: int) -> str:
    """numpy's name, else ONNX's."""
    try:
        return str(np.dtype(helper.tensor_dtype_to_np_dtype(kind)))
    except (KeyError, TypeError, ValueError):
        return str(TensorProto.DataType.Name(kind)).lower() if kind in TensorProto.DataType.values() else "unknown"


def _weights(graph: onnx.GraphProto) -> dict[str, WeightFacts]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in _initializers(graph):
        dtype = _dtype(tensor.data_type)
        counts[dtype] += 1
        sizes[dtype] += _size_bytes(tensor)
    ordered = sorted(counts, key=lambda dtype: (-sizes[dtype], dtype))
    return {dtype: WeightFacts(tensors=counts[dtype], size_bytes=sizes[dtype]) for dtype in ordered}


def _initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for inner in onnx_model.subgraphs(node):
            yield from _initializers(inner)


def _size_bytes(tensor: onnx.TensorProto) -> int:
    if tensor.raw_data:
        return len(tensor.raw_data)
    try:
        size: int = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError, ValueError, AttributeError):
        return 0
    return size
