"""Removing the mean error that INT8 leaves in the outputs of convolutions and matrix products.

Rounding weights and clipping activations shifts a layer's outputs by a constant for each channel on
average; that constant belongs into the bias (Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", ICCV 2019, section 4.2, the empirical form).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gpuopt import onnx_model
from gpuopt.quantization.measurement import Mean, Reals
from gpuopt.quantization.placement import WEIGHTED_OPERATORS

_PAIR = ("QuantizeLinear", "DequantizeLinear")
_PREFIX = "int8/"


@dataclass(frozen=True)
class SideBySide:
    """The FP32 graph with each quantized node once more beside its original, on the same FP32 input.

    Attributes:
        model: the graph; the quantized nodes' outputs lead nowhere.
        pairs: by node name: the exact output, the quantized one, the channel axis (1 or -1).
    """

    model: onnx.ModelProto
    pairs: dict[str, tuple[str, str, int]]


def side_by_side(exact: onnx.ModelProto, quantized: onnx.ModelProto) -> SideBySide:
    """Every quantized Conv, ConvTranspose, Gemm and MatMul on the inputs that it has in the FP32 graph.

    So a layer's own error is measured, and the corrections of all layers fit together after one pass. Errors
    measured in the quantized graph hold those of the layers before, and correcting both counts them twice.

    Args:
        exact: the FP32 graph that was quantized, in topological order; names of nodes and activations are the same.
        quantized: the Q/DQ graph; nodes whose weight comes from no DequantizeLinear are left out.
    """
    model = onnx.ModelProto()
    model.CopyFrom(exact)
    del model.graph.node[:]
    made = {name: node for node in quantized.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in quantized.graph.initializer}
    counterparts = {node.name: node for node in quantized.graph.node if node.op_type in WEIGHTED_OPERATORS}
    copied: dict[str, str] = {}

    def brought(name: str) -> str:
        """The name, in the new graph, of what a quantized node reads: through Q and DQ back to an FP32 tensor."""
        if not name or name in copied:
            return copied.get(name, "")
        source = made.get(name)
        copied[name] = name
        if name in constants:
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(constants[name])
            tensor.name = copied[name] = f"{_PREFIX}{name}"
        elif source is not None and source.op_type in _PAIR:
            node = onnx.NodeProto()
            node.CopyFrom(source)
            node.name = f"{_PREFIX}{source.name}"
            node.input[:] = [brought(part) for part in source.input]
            node.output[:] = [f"{_PREFIX}{name}"]
            copied[name] = node.output[0]
            model.graph.node.append(node)
        return copied[name]

    pairs = {}
    for original in exact.graph.node:
        model.graph.node.append(original)
        node = counterparts.get(original.name)
        if node is None or original.op_type != node.op_type:
            continue
        weight = made.get(node.input[1])
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        # Right behind the original, so that what both read can be freed soon.
        twin = onnx.NodeProto()
        twin.CopyFrom(node)
        twin.name = f"{_PREFIX}{node.name}"
        twin.input[:] = [brought(name) for name in node.input]
        twin.output[:] = [f"{_PREFIX}output/{node.name}"]
        model.graph.node.append(twin)
        axis = 1 if node.op_type in ("Conv", "ConvTranspose") else -1
        pairs[node.name] = (original.output[0], twin.output[0], axis)
    return SideBySide(model, pairs)


def corrections(means: Mapping[str, Mean]) -> dict[str, Reals]:
    """What to add to each channel: the mean error, shrunk by what chance alone would make of it.

    m (1 - e^2 / m^2) where that is positive, else 0, with e the standard error of m: the factor with the least
    expected squared error for a true mean of squared size m^2 - e^2.
    """
    found = {}
    for name, mean in means.items():
        squared = mean.value**2
        noise = np.divide(mean.squared_error, squared, out=np.ones_like(squared), where=squared > 0)
        found[name] = mean.value * np.maximum(0.0, 1.0 - noise)
    return found


def correct(model: onnx.ModelProto, shifts: Mapping[str, Reals]) -> onnx.ModelProto:
    """A new graph with a constant added to each output channel of some nodes.

    It goes into the constant bias where there is one: the node's own, or the Add behind a MatMul.
    Conv and Gemm without a bias get one; a MatMul, and a bias that is computed, get an Add.

    Args:
        model: Q/DQ graph, engine's or runtime's; left as it is.
        shifts: by node name, float64, (channels,); names that are not in the graph are left out.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = _Graph(result)
    for node in list(result.graph.node):
        if node.name in shifts:
            if node.op_type == "MatMul":
                graph.correct_product(node, shifts[node.name])
            else:
                graph.correct_bias(node, shifts[node.name])
    onnx_model.drop_unused_initializers(result.graph)
    return onnx_model.sort_topologically(result)


class _Graph:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._constants = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
        self._used = onnx_model.tensor_names(model.graph) | {node.name for node in model.graph.node}
        self._shown = {value.name for value in model.graph.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in [*node.input, *(onnx_model.names_read(node) - set(node.input))]:
                self._readers.setdefault(name, []).append(node)

    def correct_bias(self, node: onnx.NodeProto, shift: Reals) -> None:
        """Of a Conv, ConvTranspose or Gemm: y = x W + beta b."""
        beta = next((a for a in node.attribute if node.op_type == "Gemm" and a.name == "beta"), None)
        if beta is not None and beta.f == 0:
            node.attribute.remove(beta)
            del node.input[2:]
            beta = None
        shift = shift / beta.f if beta is not None else shift
        old = node.input[2] if len(node.input) > 2 else ""
        if old and old not in self._constants:
            node.input[2] = self._add(node.name, old, self._constant(node.name, shift))
        elif old:
            node.input[2] = self._constant(node.name, self._value(old) + shift)
        else:
            del node.input[2:]
            node.input.append(self._constant(node.name, shift))

    def correct_product(self, node: onnx.NodeProto, shift: Reals) -> None:
        """Of a MatMul: its bias is the constant of an Add that alone reads it."""
        out = node.output[0]
        behind = self._readers.get(out, [])
        if len(behind) == 1 and behind[0].op_type == "Add" and out not in self._shown:
            position = 1 - list(behind[0].input).index(out)
            old = behind[0].input[position]
            if old in self._constants:
                behind[0].input[position] = self._constant(node.name, self._value(old) + shift)
                return
        node.output[0] = onnx_model.free_name(f"{out}_uncorrected", self._used)
        self._add(node.name, node.output[0], self._constant(node.name, shift), out)

    def _value(self, name: str) -> Reals:
        value: Reals = numpy_helper.to_array(self._constants[name]).astype(np.float64)
        return value

    def _constant(self, node: str, value: Reals) -> str:
        name = onnx_model.free_name(f"{node}_corrected_bias", self._used)
        self._model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
        return name

    def _add(self, node: str, one: str, other: str, out: str = "") -> str:
        out = out or onnx_model.free_name(f"{node}_bias_sum", self._used)
        self._model.graph.node.append(
            helper.make_node("Add", [one, other], [out], name=onnx_model.free_name(f"{node}_correction", self._used))
        )
        return out
