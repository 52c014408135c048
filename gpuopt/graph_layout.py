"""The deployed form in an ONNX graph: Transposes and normalisation at its ends, and what can be taken away again.

An input becomes `Cast (bytes) -> Transpose (channels last) -> Sub -> Mul`, an output gets a Transpose behind it.
The Cast comes first since TensorRT lets nothing else read bytes; arithmetic comes behind the Transpose, where a
constant a channel is broadcast over whole rows.

Where every reader of the input is a Conv with constant weights, the factor scale / std goes into those weights. The
centre mean / scale goes into their biases only if no Conv pads: with padding, the zeros around the normalised image
stand for the centre, which differs from channel to channel, and no bias can say so.

INT8 without zero point wants values around zero: of 0 to 255 it leaves half its levels unused. So in front of INT8 a
padding Conv gets the bytes less their centre, another one the bytes less 128, which with the scale 1 are INT8 without
any loss, and the rest of the centre in its bias. SQNR of the logits of networks trained on digits, the first layer
alone in INT8: raw bytes 23.7 to 49.8 dB, centred 29.8 to 52.1 (as normalised and not folded), less 128 30.1 to 59.3.

Transposes are moved and cancelled by ONNX Runtime's own transpose optimizer, everything else in it switched off. What
it gives is taken only if no other node has changed and Transposes have become fewer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from gpuopt import onnx_model
from gpuopt.deployed_form import Normalization, TensorForm
from gpuopt.errors import described

PREFIX = "gpuopt"
"""First part of the names of nodes that stand for the deployed form."""

_OTHER_OPTIMIZERS = (
    "CastChainElimination",
    "CastFloat16Transformer",
    "CommonSubexpressionElimination",
    "ConstantFolding",
    "ConstantFoldingDQ",
    "ConstantSharing",
    "DoubleQDQPairsRemover",
    "EnsureUniqueDQForNodeUnit",
    "FreeDimensionOverrideTransformer",
    "FuseFp16InitializerToFp32NodeTransformer",
    "GatherSliceToSplitFusion",
    "GatherToSliceFusion",
    "GeluFusionL1",
    "LayerNormFusionL1",
    "Level1_RuleBasedTransformer",
    "MatMulAddFusion",
    "PreShapeNodeElimination",
    "QDQPropagationTransformer",
    "RemoveDuplicateCastTransformer",
    "ReshapeFusion",
    "RocmBlasAltImpl",
    "SliceConcatToSpaceToDepthFusion",
    "WeightBiasQuantization",
)
"""Of ONNX Runtime's first level, all but `TransposeOptimizer`."""
MIDDLE = 128.0
"""What bytes are less by to be INT8."""
_MOVES = {"Transpose", "Squeeze", "Unsqueeze", "Reshape", "Gather", "Identity"}
"""Operators that the transpose optimizer adds."""

_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Normalized:
    """Where the normalisation of an input went.

    Attributes:
        factor: `weights`, `Mul` (a node), or empty where it is 1.
        center: `bias`, `Sub` (a node), `Sub, bias` (128 and the rest), or empty where it is 0.
        reason: why it is not all in the weights; empty if it is.
    """

    factor: str
    center: str
    reason: str

    def to_json(self) -> dict[str, str]:
        """For the report."""
        return {"factor": self.factor, "center": self.center, "reason": self.reason}


@dataclass(frozen=True)
class Transposes:
    """How many there are.

    Attributes:
        own: in the original graph.
        inserted: at inputs and outputs.
        left: in the end.
        reason: why none was moved; empty if they were tried.
    """

    own: int
    inserted: int
    left: int
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        cancelled = self.own + self.inserted - self.left
        return {"own": self.own, "inserted": self.inserted, "cancelled": cancelled, "left": self.left,
                "reason": self.reason}  # fmt: skip


def set_form(
    model: onnx.ModelProto, inputs: Mapping[str, TensorForm], outputs: Mapping[str, TensorForm], for_int8: bool
) -> dict[str, Normalized]:
    """Give a graph's inputs and outputs the deployed form; the names stay.

    Args:
        model: changed in place; its inputs and outputs are in the original's form.
        for_int8: what Convs read has to lie around zero.

    Returns:
        Where the normalisation of each input of bytes went.
    """
    graph = model.graph
    used = onnx_model.tensor_names(graph)
    onnx_model.constant_outputs_made_by_nodes(model)
    found = {}
    for name, form in inputs.items():
        if form.changes:
            inner = onnx_model.free_name(f"{name}_original", used)
            value = next(value for value in graph.input if value.name == name)
            onnx_model.rename_tensors(graph, {name: inner})
            value.name = name
            for output in graph.output:
                if output.name == inner:  # an input passed through
                    output.name = name
            front = _Front(model, name, inner, value.type.tensor_type.elem_type, used)
            normalized = front.build(form, for_int8)
            if normalized is not None:
                found[name] = normalized
            _set_shape(value, form)
            if form.normalization:
                value.type.tensor_type.elem_type = TensorProto.UINT8
    for name, form in outputs.items():
        if form.changes:
            value = next(value for value in graph.output if value.name == name)
            inner = onnx_model.free_name(f"{name}_original", used)
            shape = value.type.tensor_type.shape
            rank = len(shape.dim)
            onnx_model.rename_tensors(graph, {name: inner})
            value.name = name
            perm = [0, *range(2, rank), 1]
            graph.node.append(
                helper.make_node("Transpose", [inner], [name], name=f"{PREFIX}/{name}/channels_last", perm=perm)
            )
            _set_shape(value, form)
    del graph.value_info[:]
    onnx_model.drop_unused_initializers(graph)
    onnx_model.sort_topologically(model)
    onnx_model.node_names_made_unique(model)
    return found


def _set_shape(value: onnx.ValueInfoProto, form: TensorForm) -> None:
    dims = [onnx.TensorShapeProto.Dimension() for _ in value.type.tensor_type.shape.dim]
    for copy, dim in zip(dims, value.type.tensor_type.shape.dim, strict=True):
        copy.CopyFrom(dim)
    del value.type.tensor_type.shape.dim[:]
    value.type.tensor_type.shape.dim.extend(form.shape(dims))


class _Front:
    """The nodes between a deployed input and what was the original's."""

    def __init__(self, model: onnx.ModelProto, name: str, inner: str, dtype: int, used: set[str]) -> None:
        self._graph = model.graph
        self._name, self._inner, self._dtype, self._used = name, inner, dtype, used
        value = next(value for value in model.graph.input if value.name == name)
        self._rank = len(value.type.tensor_type.shape.dim)

    def build(self, form: TensorForm, for_int8: bool) -> Normalized | None:
        steps: list[tuple[str, str, dict[str, Any], _Array | None]] = []
        normalized = None
        if form.normalization:
            steps.append(("Cast", "to_float", {"to": self._dtype}, None))
        if form.channels_last:
            last = self._rank - 1
            steps.append(("Transpose", "channels_first", {"perm": [0, last, *range(1, last)]}, None))
        if form.normalization:
            normalized, constants = self._normalize(form.normalization, for_int8)
            steps += [(op_type, op_type.lower(), {}, value) for op_type, value in constants]
        self._append(steps)
        return normalized

    def _append(self, steps: list[tuple[str, str, dict[str, Any], _Array | None]]) -> None:
        at = self._name
        for index, (op_type, label, attributes, constant) in enumerate(steps):
            is_last = index == len(steps) - 1
            output = self._inner if is_last else onnx_model.free_name(f"{self._name}_{label}", self._used)
            operands = [at]
            if constant is not None:
                operands.append(onnx_model.free_name(f"{self._name}_{label}_constant", self._used))
                dtype = helper.tensor_dtype_to_np_dtype(self._dtype)
                shaped = constant.reshape(-1, *[1] * (self._rank - 2)).astype(dtype)
                self._graph.initializer.append(numpy_helper.from_array(shaped, operands[1]))
            node = helper.make_node(op_type, operands, [output], name=f"{PREFIX}/{self._name}/{label}", **attributes)
            self._graph.node.insert(index, node)
            at = output

    def _normalize(self, asked: Normalization, for_int8: bool) -> tuple[Normalized, list[tuple[str, _Array]]]:
        """Fold what can be folded; what is left as nodes, by operator."""
        factor, center = asked.factor(), asked.center()
        convs, reason = self._readers()
        padded = next((conv.name for conv in convs if _pads(conv)), None)
        left: list[tuple[str, _Array]] = []
        has_factor, has_center = bool(np.any(factor != 1)), bool(np.any(center))
        for conv in convs:
            self._scale_weights(conv, factor)
        if convs and padded is None and (has_center or for_int8):
            subtracted = np.full_like(center, MIDDLE if for_int8 else 0.0)
            for conv in convs:
                self._shift_bias(conv, center - subtracted)
            if for_int8:
                left.append(("Sub", subtracted))
            where = "Sub, bias" if for_int8 else "bias"
            reason = "INT8 wants values around zero: of bytes less 128 it loses nothing" if for_int8 else ""
        elif has_center:
            left.append(("Sub", center))
            where = "Sub"
            reason = f"'{padded}' pads with the zeros of the normalised image" if padded is not None else reason
        else:
            where = ""
        if has_factor and not convs:
            left.append(("Mul", factor))
        elif not has_factor and not has_center and not left:
            reason = ""
        return Normalized("weights" if has_factor and convs else "Mul" if has_factor else "", where, reason), left

    def _readers(self) -> tuple[list[onnx.NodeProto], str]:
        """The Convs that read the input, if nothing else does; else none, and why."""
        constants = {tensor.name: tensor for tensor in self._graph.initializer}
        readers = [node for node in self._graph.node if self._inner in onnx_model.names_read(node)]
        reads = Counter(name for node in self._graph.node for name in onnx_model.names_read(node))
        if any(value.name == self._inner for value in self._graph.output):
            return [], f"'{self._name}' is an output, too"
        for node in readers:
            if node.op_type != "Conv" or node.input[0] != self._inner or self._inner in node.input[1:]:
                return [], f"{node.op_type} '{node.name}' reads '{self._name}', not a Conv alone"
            if any(name not in constants for name in node.input[1:] if name):
                return [], f"the weights of '{node.name}' are no constants"
            if any(reads[name] > 1 for name in node.input[1:] if name):
                return [], f"the weights of '{node.name}' are another node's, too"
            if constants[node.input[1]].data_type not in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16):
                return [], f"the weights of '{node.name}' are no floating-point numbers"
        return readers, "" if readers else f"nothing reads '{self._name}'"

    def _scale_weights(self, conv: onnx.NodeProto, factor: _Array) -> None:
        weight = self._constant(conv.input[1])
        self._replace(conv.input[1], weight * _by_weight(weight, conv, factor))

    def _shift_bias(self, conv: onnx.NodeProto, center: _Array) -> None:
        """Conv(x - c) = Conv(x) - the sum of the weights times c, where nothing is padded."""
        weight = self._constant(conv.input[1])
        shift = (weight * _by_weight(weight, conv, center)).reshape(weight.shape[0], -1).sum(axis=1)
        if len(conv.input) > 2 and conv.input[2]:
            self._replace(conv.input[2], self._constant(conv.input[2]) - shift)
            return
        name = onnx_model.free_name(f"{conv.name}_bias", self._used)
        dtype = helper.tensor_dtype_to_np_dtype(self._dtype)
        self._graph.initializer.append(numpy_helper.from_array((-shift).astype(dtype), name))
        del conv.input[2:]
        conv.input.append(name)

    def _constant(self, name: str) -> npt.NDArray[np.float64]:
        tensor = next(tensor for tensor in self._graph.initializer if tensor.name == name)
        return np.asarray(numpy_helper.to_array(tensor), np.float64)

    def _replace(self, name: str, value: _Array) -> None:
        tensor = next(tensor for tensor in self._graph.initializer if tensor.name == name)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(value, dtype), name))


def _by_weight(weight: _Array, conv: onnx.NodeProto, numbers: _Array) -> _Array:
    """A number for each input channel, or one for all, as it is broadcast to a Conv's weights."""
    if numbers.size == 1:
        return numbers.reshape([1] * weight.ndim)
    outputs, per_group = weight.shape[:2]
    groups = next((int(a.i) for a in conv.attribute if a.name == "group"), 1)
    channel = np.arange(outputs)[:, None] // (outputs // groups) * per_group + np.arange(per_group)
    return np.asarray(numbers.reshape(-1)[channel].reshape(outputs, per_group, *[1] * (weight.ndim - 2)))


def _pads(conv: onnx.NodeProto) -> bool:
    attributes = onnx_model.attributes(conv)
    automatic = attributes.get("auto_pad", b"NOTSET")
    return automatic not in (b"NOTSET", b"VALID") or any(attributes.get("pads", ()))


def exact_int8_tensors(model: onnx.ModelProto) -> list[str]:
    """Tensors that are bytes less 128: with the scale 1 they are INT8 without any loss."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    casts = {
        node.output[0] for node in model.graph.node if node.name.startswith(f"{PREFIX}/") and node.op_type == "Cast"
    }
    moved = {n.output[0] for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in casts}
    return [
        node.output[0]
        for node in model.graph.node
        if node.op_type == "Sub"
        and node.input[0] in casts | moved
        and node.input[1] in constants
        and bool(np.all(numpy_helper.to_array(constants[node.input[1]]) == MIDDLE))
    ]


def transposes(model: onnx.ModelProto) -> int:
    """How many Transposes the main graph has."""
    return sum(node.op_type == "Transpose" for node in model.graph.node)


def without_needless_transposes(model: onnx.ModelProto, scratch: Path) -> tuple[onnx.ModelProto, str]:
    """The graph with its Transposes moved and cancelled; only data movement changes.

    Args:
        scratch: a folder for files.

    Returns:
        The graph, and why it is as it was; empty if Transposes have become fewer.
    """
    try:
        moved = _moved(model, scratch)
    except Exception as error:  # ONNX Runtime's errors share no base class below Exception
        return model, f"ONNX Runtime's transpose optimizer fails: {described(error)}"
    if found := _other_change(model, moved):
        return model, f"ONNX Runtime's transpose optimizer changes {found}"
    if transposes(moved) >= transposes(model):
        return model, "none can be cancelled"
    return moved, ""


def _moved(model: onnx.ModelProto, scratch: Path) -> onnx.ModelProto:
    import onnxruntime as ort

    path = onnx_model.save(model, scratch / "before")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(scratch / "after.onnx")
    options.log_severity_level = 4
    if model.ByteSize() > 1 << 30:
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "after.data")
    ort.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(_OTHER_OPTIMIZERS)
    )
    moved = onnx.load(str(scratch / "after.onnx"))
    used = {node.domain for node in moved.graph.node} | {"", "ai.onnx"}
    kept = [entry for entry in moved.opset_import if entry.domain in used]
    del moved.opset_import[:]
    moved.opset_import.extend(kept)
    moved.ir_version = model.ir_version
    # ONNX Runtime infers shapes anew and with other names for dynamic sizes.
    for values, originals in ((moved.graph.input, model.graph.input), (moved.graph.output, model.graph.output)):
        by_name = {value.name: value for value in originals}
        for value in values:
            value.CopyFrom(by_name[value.name])
    del moved.graph.value_info[:]
    onnx_model.node_names_made_unique(moved)
    return moved


def _other_change(before: onnx.ModelProto, after: onnx.ModelProto) -> str:
    """What differs beside nodes that move data; empty if nothing does."""
    kinds = {node.name: (node.domain, node.op_type) for node in before.graph.node}
    seen = set()
    for node in after.graph.node:
        known = kinds.get(node.name)
        if known is not None:
            seen.add(node.name)
            if known[1] != node.op_type:
                return f"'{node.name}' from {known[1]} to {node.op_type}"
            if known[0] != node.domain:
                return f"the domain of '{node.name}' to {node.domain}"
        elif node.op_type not in _MOVES or node.domain not in ("", "ai.onnx"):
            return f"more than Transposes: it adds a {node.op_type}"
    for name, (_, op_type) in kinds.items():
        if name not in seen and op_type not in _MOVES | {"Constant"}:
            return f"more than Transposes: it drops {op_type} '{name}'"
    return ""
