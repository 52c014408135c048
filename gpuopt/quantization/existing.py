"""Graphs that hold Q/DQ already, from quantization-aware training, torchao or another quantizer.

They keep their scales. What TensorRT's ONNX parser refuses (anything but symmetric INT8, constant
scales, one scale a tensor for activations, no INT32 behind DQ) is repaired where the numbers stay
the same, else refused by name; what is only slow is a warning.
"""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from gpuopt import onnx_model
from gpuopt.errors import QuantizationError
from gpuopt.model_file import ModelKind
from gpuopt.quantization.placement import (
    LARGEST_FP16,
    SMALLEST_FP16_SCALE,
    WEIGHTED_OPERATORS,
    Placement,
)

_Array = npt.NDArray[Any]

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_INTEGER_OPERATORS = (
    "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear",
    "QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearAveragePool", "QLinearGlobalAveragePool",
    "QLinearConcat", "QGemm", "QAttention", "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat",
)  # fmt: skip
_CHANNEL_AXIS = {"Conv": 0, "ConvTranspose": 1}
_MOVING = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
_MARKS = (b"quantized_decomposed", b"fake_quant", b"torchao.")
"""What stands in the program of an exported model that quantizes."""

_MOST_MEMBER_BYTES = 1 << 28
_AGAIN = "Quantize the model again: symmetric INT8, zero points 0, per-tensor activations (QuantFormat.QDQ, QInt8);\n"
_HINT = _AGAIN + "or give gpuopt the model before quantization and calibration data."


@dataclass(frozen=True)
class AdoptedGraph:
    """A graph with Q/DQ of its own, made fit for TensorRT.

    Attributes:
        model: weights in floating point behind Q and DQ, whichever way they came.
        pairs: Q/DQ pairs, weights and activations.
        repaired: one line for each kind of repair; no number of the graph changed.
        warnings: one line for each kind of thing that costs time or accuracy.
        decisions: which weighted nodes run in INT8, and why the others do not.
    """

    model: onnx.ModelProto
    pairs: int
    repaired: tuple[str, ...]
    warnings: tuple[str, ...]
    decisions: tuple[Placement, ...]


def holds_quantization(model: onnx.ModelProto) -> bool:
    """Whether the graph has Q/DQ or integer operators."""
    quantizing = {_QUANTIZE, _DEQUANTIZE, *_INTEGER_OPERATORS}
    return any(node.op_type in quantizing for node in model.graph.node)


def file_holds_quantization(path: Path, kind: ModelKind) -> bool:
    """Whether a model file shows, before it is loaded, that it quantizes: ONNX and torch's program archives do."""
    if kind is ModelKind.ONNX:
        try:
            return holds_quantization(onnx.load(str(path), format="protobuf", load_external_data=False))
        except (DecodeError, ValueError, OSError):
            return False
    if kind not in (ModelKind.EXPORTED_PROGRAM, ModelKind.TORCHSCRIPT):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            programs = [
                member.filename
                for member in archive.infolist()
                if member.filename.endswith((".json", ".py")) and member.file_size <= _MOST_MEMBER_BYTES
            ]
            return any(mark in archive.read(name) for name in programs for mark in _MARKS)
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError):
        return False


def adopt(model: onnx.ModelProto, fp16: bool) -> AdoptedGraph:
    """Check and repair a graph that holds Q/DQ; `model` is left as it is.

    Args:
        fp16: whether the remainder, and with it every scale, will be FP16.

    Raises:
        QuantizationError: TensorRT would refuse the graph; names the first node and counts the others.
    """
    model = copy.deepcopy(model)
    check = _Check(model, fp16)
    check.run()
    if check.problems:
        more = f" (and {len(check.problems) - 1} more)" if len(check.problems) > 1 else ""
        raise QuantizationError(f"the model's own Q/DQ do not fit TensorRT: {check.problems[0]}{more}", _HINT)
    check.write()
    decisions = _decisions(model)
    return AdoptedGraph(
        model,
        sum(node.op_type == _DEQUANTIZE for node in model.graph.node),
        tuple(_summed(check.repairs)),
        tuple(_summed(_oddities(model, decisions, check.small_scales))),
        tuple(decisions),
    )


@dataclass
class _Check:
    """One pass over the Q/DQ of a graph: problems are collected, repairs carried out by `write`."""

    model: onnx.ModelProto
    fp16: bool
    problems: list[str] = field(default_factory=list)
    repairs: list[tuple[str, str]] = field(default_factory=list)
    """What was repaired, and where."""
    small_scales: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        graph = self.model.graph
        _constants_as_initializers(graph)
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in onnx_model.names_read(node):
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}
        self.added: dict[str, TensorProto] = {}
        self.removed: list[onnx.NodeProto] = []
        self.used = onnx_model.tensor_names(graph) | {node.name for node in graph.node}

    def run(self) -> None:
        for node in self.model.graph.node:
            if node.op_type in _INTEGER_OPERATORS:
                self._problem(node, "an integer operator, where TensorRT reads Q/DQ only")
        if self.problems:
            # The Q/DQ around them would be told as faulty, too.
            return
        for node in self.model.graph.node:
            if any(
                inner.op_type in (_QUANTIZE, _DEQUANTIZE) for body in onnx_model.subgraphs(node) for inner in body.node
            ):
                self._problem(node, "Q/DQ inside a branch or loop")
            elif node.op_type == _QUANTIZE:
                self._quantize(node)
            elif node.op_type == _DEQUANTIZE:
                self._dequantize(node)
            elif node.op_type in _CHANNEL_AXIS:
                self._channel_axis(node)

    def write(self) -> None:
        """Carry out what `run` decided, and unfold INT8 weights; initializers nobody reads go."""
        graph = self.model.graph
        for node in self.removed:
            graph.node.remove(node)
        # What is known of the integers between Q and DQ may be wrong now.
        stale = {name for node in graph.node if node.op_type == _QUANTIZE for name in node.output}
        stale |= {name for node in self.removed for name in node.output}
        for value in [value for value in graph.value_info if value.name in stale]:
            graph.value_info.remove(value)
        graph.initializer.extend(self.added.values())
        self._unfold()
        onnx_model.drop_unused_initializers(graph)
        onnx_model.sort_topologically(self.model)

    # Nodes

    def _quantize(self, node: onnx.NodeProto) -> None:
        readers = self.readers.get(node.output[0], [])
        stray = [reader for reader in readers if reader.op_type != _DEQUANTIZE]
        if stray:
            return self._problem(node, f"{stray[0].op_type} '{stray[0].name}' reads it, where only a DQ may")
        if node.output[0] in self.outputs or not readers:
            return self._problem(node, "no DQ behind it")
        if not self._scale_fits(node, node.input[0] in self.constants):
            return None
        kind = self._type_of_quantize(node)
        if not self._zero_point_fits(node, kind):
            return None
        for reader in readers:
            if not self._same_grid(node, reader):
                return self._problem(reader, f"its scale or zero point is another than that of '{node.name}'")
        for one in (node, *readers):
            self._make_symmetric(one, kind)
        return None

    def _dequantize(self, node: onnx.NodeProto) -> None:
        source = node.input[0]
        producer = self.producers.get(source)
        if producer is not None and producer.op_type == _QUANTIZE:
            return None
        if source not in self.constants:
            return self._problem(node, f"'{source}' is neither a constant nor behind a Q")
        kind = self.constants[source].data_type
        if not self._scale_fits(node, True):
            return None
        if kind == TensorProto.INT32:
            return self._fold(node)
        if not self._zero_point_fits(node, kind):
            return None
        if kind == TensorProto.UINT8:
            values = numpy_helper.to_array(self.constants[source]).astype(np.int16) - 128
            node.input[0] = self._constant(f"{source}_int8", values.astype(np.int8))
        self._make_symmetric(node, kind)
        return None

    def _fold(self, node: onnx.NodeProto) -> None:
        """INT32 numbers behind DQ, as quantizers write biases, become the floating-point numbers they stand for."""
        array = numpy_helper.to_array(self.constants[node.input[0]])
        zero = self._zero(node)
        if zero is not None:
            array = array - _along(zero.astype(np.int64), node, array.ndim)
        scale = self._value(node.input[1])
        assert scale is not None
        # In FP16 the integers alone would be infinite.
        folded = array.astype(np.float64) * _along(scale.astype(np.float64), node, array.ndim)
        self.added[node.output[0]] = numpy_helper.from_array(folded.astype(scale.dtype), node.output[0])
        self.removed.append(node)
        self.repairs.append(("INT32 behind DQ became floating point", node.input[0]))

    def _channel_axis(self, node: onnx.NodeProto) -> None:
        pair = self.producers.get(node.input[1])
        scale = self._value(pair.input[1]) if pair is not None and pair.op_type == _DEQUANTIZE else None
        if pair is not None and scale is not None and scale.size > 1 and _axis(pair) != _CHANNEL_AXIS[node.op_type]:
            self._problem(
                pair, f"a scale for each index of axis {_axis(pair)}, not the output channels of '{node.name}'"
            )

    # Scales, zero points and types

    def _scale_fits(self, node: onnx.NodeProto, constant: bool) -> bool:
        scale = self._value(node.input[1])
        if scale is None:
            self._problem(node, "its scale is computed, not a constant")
        elif any(a.name == "block_size" and a.i for a in node.attribute):
            self._problem(node, "it has one scale a block of values")
        elif scale.dtype not in (np.float32, np.float16):
            self._problem(node, f"its scale is of the type {scale.dtype}")
        elif not (np.all(np.isfinite(scale)) and np.all(scale > 0)):
            self._problem(node, "a scale is zero, negative or not finite")
        elif self.fp16 and np.any(scale > LARGEST_FP16):
            self._problem(node, "a scale is too large for FP16; --set cast.remainder=fp32 keeps FP32")
        elif scale.size != 1 and not constant:
            self._problem(node, f"an activation with {scale.size} scales, where TensorRT takes one")
        else:
            if self.fp16 and not constant and np.any(scale < SMALLEST_FP16_SCALE):
                self.small_scales.append(node.name)
            return True
        return False

    def _type_of_quantize(self, node: onnx.NodeProto) -> int:
        zero = self.constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if zero is not None:
            return int(zero.data_type)
        stated = next((int(a.i) for a in node.attribute if a.name == "output_dtype"), 0)
        return stated or TensorProto.UINT8

    def _zero_point_fits(self, node: onnx.NodeProto, kind: int) -> bool:
        if kind not in (TensorProto.INT8, TensorProto.UINT8):
            self._problem(node, f"it is of the type {TensorProto.DataType.Name(kind)}, not INT8")
            return False
        if len(node.input) > 2 and node.input[2] and self._value(node.input[2]) is None:
            self._problem(node, "its zero point is computed, not a constant")
            return False
        zero = self._zero(node)
        wanted = 0 if kind == TensorProto.INT8 else 128
        if (wanted != 0 and zero is None) or (zero is not None and not np.all(zero == wanted)):
            found = 0 if zero is None else int(zero.reshape(-1)[np.argmax(zero.reshape(-1) != wanted)])
            name = TensorProto.DataType.Name(kind)
            self._problem(node, f"asymmetric: {name} with the zero point {found}, where {wanted} is symmetric")
            return False
        return True

    def _same_grid(self, one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
        first, second = self._value(one.input[1]), self._value(other.input[1])
        if first is None or second is None or not np.array_equal(first.reshape(-1), second.reshape(-1)):
            return False
        zeros = [0 if zero is None else zero for zero in (self._zero(one), self._zero(other))]
        axes = [_axis(node) for node in (one, other)]
        return bool(np.all(zeros[0] == zeros[1])) and (first.size == 1 or axes[0] == axes[1])

    def _make_symmetric(self, node: onnx.NodeProto, kind: int) -> None:
        """INT8, zero point 0, a scalar where there is one scale: with UINT8 and 128 every number is the same."""
        scale = self._value(node.input[1])
        assert scale is not None
        if scale.ndim and scale.size == 1:
            scale = scale.reshape(())
            node.input[1] = self._constant(f"{node.input[1]}_scalar", scale)
        zero = self._zero(node)
        if kind == TensorProto.UINT8 or zero is None or zero.shape != scale.shape:
            name = self._constant("zero_point_int8", np.zeros(scale.shape, np.int8))
            del node.input[2:]
            node.input.append(name)
        # The zero point states the type, and a scalar scale has no axis.
        idle = {"output_dtype"} if scale.ndim else {"output_dtype", "axis"}
        kept = [a for a in node.attribute if a.name not in idle]
        del node.attribute[:]
        node.attribute.extend(kept)
        if kind == TensorProto.UINT8:
            self.repairs.append(("UINT8 with the zero point 128 became INT8 with 0", node.name))

    def _unfold(self) -> None:
        """Every INT8 weight behind a DQ becomes floating point behind Q and DQ: q * scale quantizes to q again."""
        graph = self.model.graph
        constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in [n for n in graph.node if n.op_type == _DEQUANTIZE and n.input[0] in constants]:
            numbers = numpy_helper.to_array(constants[node.input[0]])
            scale = numpy_helper.to_array(constants[node.input[1]])
            values = numbers.astype(scale.dtype) * _along(scale, node, numbers.ndim)
            source = onnx_model.free_name(f"{node.input[0]}_float", self.used)
            quantized = onnx_model.free_name(f"{node.input[0]}_quantized", self.used)
            graph.initializer.append(numpy_helper.from_array(values.astype(scale.dtype), source))
            pair = helper.make_node(_QUANTIZE, [source, *node.input[1:]], [quantized])
            pair.name = onnx_model.free_name(f"{node.name}_{_QUANTIZE}", self.used)
            pair.attribute.extend(a for a in node.attribute if a.name == "axis")
            graph.node.append(pair)
            node.input[0] = quantized

    # Small things

    def _problem(self, node: onnx.NodeProto, said: str) -> None:
        self.problems.append(f"{node.op_type} '{node.name}': {said}")

    def _value(self, name: str) -> _Array | None:
        tensor = self.constants.get(name) or self.added.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def _zero(self, node: onnx.NodeProto) -> _Array | None:
        return self._value(node.input[2]) if len(node.input) > 2 and node.input[2] else None

    def _constant(self, name: str, value: _Array) -> str:
        name = onnx_model.free_name(name, self.used)
        self.added[name] = numpy_helper.from_array(value, name)
        return name


def _constants_as_initializers(graph: onnx.GraphProto) -> None:
    """Constant nodes become initializers, and Identity of one is looked through: exporters write scales so."""
    constants = {tensor.name for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    same: dict[str, str] = {}
    for node in list(graph.node):
        for index, name in enumerate(node.input):
            node.input[index] = same.get(name, name)
        if node.op_type == "Constant" and node.attribute[0].HasField("t") and node.output[0] not in outputs:
            tensor = TensorProto()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
            constants.add(tensor.name)
            graph.node.remove(node)
        elif node.op_type == "Identity" and node.input[0] in constants and node.output[0] not in outputs:
            same[node.output[0]] = node.input[0]


def _axis(node: onnx.NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 1)


def _along(values: _Array, node: onnx.NodeProto, rank: int) -> _Array:
    """Per-channel values in a shape that broadcasts along the node's axis."""
    if values.size == 1:
        return values.reshape(())
    axis = _axis(node) % rank
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])


def _decisions(model: onnx.ModelProto) -> list[Placement]:
    """What the model's own Q/DQ make of its weighted nodes."""
    producers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}

    def pair_of(name: str) -> onnx.NodeProto | None:
        node = producers.get(name)
        while node is not None and node.op_type in _MOVING:
            node = producers.get(node.input[0])
        return node if node is not None and node.op_type == _DEQUANTIZE else None

    found = []
    for node in model.graph.node:
        if node.op_type not in WEIGHTED_OPERATORS:
            continue
        behind = [pair_of(name) for name in node.input[:2]]
        missing = [name for name, pair in zip(node.input, behind, strict=False) if pair is None]
        if not missing:
            note = "Q/DQ of the model itself"
            found.append(Placement(node.name, node.op_type, True, "", note))
        elif len(missing) == 2:
            found.append(Placement(node.name, node.op_type, False, "the model quantizes none of its operands"))
        else:
            kind = "weight" if missing[0] in constants else "operand"
            reason = f"the model does not quantize its {kind} '{missing[0]}'"
            found.append(Placement(node.name, node.op_type, False, reason))
    return found


def _oddities(
    model: onnx.ModelProto, decisions: Sequence[Placement], small_scales: Sequence[str]
) -> Iterable[tuple[str, str]]:
    """What TensorRT takes but runs slowly, or what costs accuracy, each with the node."""
    producers = {name: node for node in model.graph.node for name in node.output}

    def made_by(name: str) -> str:
        return producers[name].op_type if name in producers else ""

    for decision in decisions:
        if decision.reason.startswith("the model does not quantize its"):
            yield "half quantized: only one operand has Q/DQ, so it runs in floating point", decision.node
    for value in model.graph.output:
        if made_by(value.name) == _DEQUANTIZE:
            yield "Q/DQ on an output cost accuracy and bring nothing", value.name
    for node in model.graph.node:
        if node.op_type == "Add" and all(made_by(name) == _DEQUANTIZE for name in node.input):
            before = [
                producers[producers[name].input[0]] for name in node.input if producers[name].input[0] in producers
            ]
            if any(made_by(pair.input[0]) in ("Conv", "ConvTranspose") for pair in before):
                yield "Q/DQ between a convolution and its Add keep TensorRT from fusing them", node.name
    for name in small_scales:
        yield "a scale so small that FP16 rounds it by over 3 %; --set cast.remainder=fp32 avoids it", name


def _summed(found: Iterable[tuple[str, str]]) -> list[str]:
    """One line a kind: what, how many, the first names."""
    by_kind: dict[str, list[str]] = {}
    for kind, name in found:
        by_kind.setdefault(kind, []).append(name)
    return [
        f"{kind}: {', '.join(dict.fromkeys(names[:3]))}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for kind, names in by_kind.items()
    ]
