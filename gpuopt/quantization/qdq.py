"""Q/DQ pairs where `placement` wants them; QOperator nodes by onnxruntime's graph surgery."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from gpuopt import onnx_model
from gpuopt.calibration.collectors import TensorRange
from gpuopt.errors import QuantizationError
from gpuopt.quantization.placement import INT8_LEVELS, Placement, QuantizedInput
from gpuopt.recipe import QuantizeSection

_SMALLEST_FP16 = np.float16(2.0**-24)
_SMALLEST_SCALE = np.finfo(np.float32).tiny
"""Denormal scales are zero where a processor flushes them, and Q divides by the scale."""


@dataclass(frozen=True)
class QuantizedGraphs:
    """What quantization makes of an FP32 graph.

    Attributes:
        engine: for TensorRT's builder: floating-point weights, then Q and DQ; None for QOperator.
        runtime: for ONNX Runtime: the same numbers, INT8 weights folded, then DQ.
        scales_rounded: how many scale tensors were rounded up to FP16 numbers.
    """

    engine: onnx.ModelProto | None
    runtime: onnx.ModelProto
    scales_rounded: int


def quantize(
    model: onnx.ModelProto,
    settings: QuantizeSection,
    decisions: Sequence[Placement],
    ranges: Mapping[str, TensorRange],
    fp16: bool,
) -> QuantizedGraphs:
    """Quantize the nodes that were decided for.

    Args:
        model: FP32 graph with unique node names; left as it is.
        settings: format and granularity.
        decisions: `placement.place`'s; those with `quantized` are carried out. For `qdq` they hold everything:
            operands, the activations' scales, the weights' axes.
        ranges: of every activation that needs a scale; `qoperator` alone reads them.
        fp16: whether the remainder of the engine's graph will be FP16, and with it every scale.

    Raises:
        QuantizationError: a decision was made for another graph, or a weight holds NaN or infinity.
        Exception: onnxruntime's quantizer (`qoperator`) raises ValueError, RuntimeError, AttributeError, ...
    """
    chosen = [decision for decision in decisions if decision.quantized]
    quantized = copy.deepcopy(model)
    if settings.format == "qdq":
        insert_pairs(quantized, chosen)
    else:
        quantized = _with_integer_operators(quantized, settings, chosen, ranges)
    return finished(quantized, settings.format == "qdq", fp16)


def finished(quantized: onnx.ModelProto, qdq: bool, fp16: bool) -> QuantizedGraphs:
    """Both graphs of one whose weights are floating point behind Q and DQ; it may be changed.

    Args:
        qdq: whether it holds Q/DQ; QOperator has no graph for engines.
        fp16: as in `quantize`.
    """
    rounded = scales_representable_in_fp16(quantized) if fp16 else 0
    quantized = onnx_model.sort_topologically(quantized)
    if not qdq:
        return QuantizedGraphs(None, quantized, rounded)
    runtime = copy.deepcopy(quantized)
    fold_weights(runtime)
    return QuantizedGraphs(quantized, runtime, rounded)


def activation_scale(amax: float) -> npt.NDArray[np.float32]:
    """Scale (0-dimensional) that maps magnitudes up to `amax` onto -127..127."""
    return np.asarray(max(np.float32(amax / INT8_LEVELS), _SMALLEST_SCALE), np.float32)


def weight_scale(weight: npt.NDArray[Any], axis: int | None) -> npt.NDArray[np.float32]:
    """Scales that map a weight onto -127..127: of shape (weight.shape[axis],), or () if `axis` is None.

    A channel of zeros has the scale 1: any will do but zero, by which Q would divide.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis) if axis is not None else None
    amax = np.max(np.abs(weight.astype(np.float64)), axis=others, initial=0.0)
    scale = np.maximum((amax / INT8_LEVELS).astype(np.float32), _SMALLEST_SCALE)
    return np.asarray(np.where(amax == 0, np.float32(1), scale), np.float32)


def insert_pairs(model: onnx.ModelProto, chosen: Sequence[Placement]) -> None:
    """Put Q and DQ in front of the operands that the decisions name, in place; nodes come out unsorted.

    Operands with the same tensor and scale share one pair. Whoever else reads the tensor, an output of
    the graph included, keeps it in floating point.
    """
    graph = model.graph
    nodes = {node.name: node for node in graph.node}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            weights[node.output[0]] = node.attribute[0].t
    used = onnx_model.tensor_names(graph) | set(nodes)
    pairs: dict[tuple[str, float | None, int | None], str] = {}
    for decision in chosen:
        node = nodes.get(decision.node)
        for operand in decision.inputs:
            if node is None or len(node.input) <= operand.index or node.input[operand.index] != operand.tensor:
                raise QuantizationError(
                    f"the decision on '{decision.node}' is of another graph: it has no input '{operand.tensor}'",
                    "Decide again after changing the graph.",
                )
            key = (operand.tensor, operand.amax, operand.axis)
            if key not in pairs:
                scale = _scale(operand, weights, decision.node)
                pairs[key] = _add_pair(graph, operand, scale, used)
            node.input[operand.index] = pairs[key]


def _scale(operand: QuantizedInput, weights: Mapping[str, onnx.TensorProto], node: str) -> npt.NDArray[np.float32]:
    if operand.amax is not None:
        return activation_scale(operand.amax)
    if operand.tensor not in weights:
        raise QuantizationError(f"'{operand.tensor}' of '{node}' is no constant", "Give the decision its range.")
    scale = weight_scale(numpy_helper.to_array(weights[operand.tensor]), operand.axis)
    if not np.all(np.isfinite(scale)):
        raise QuantizationError(
            f"the weight '{operand.tensor}' of '{node}' holds NaN or infinity", "Train or save the model again."
        )
    return scale


def _add_pair(graph: onnx.GraphProto, operand: QuantizedInput, scale: npt.NDArray[np.float32], used: set[str]) -> str:
    """Add initializers and nodes of a pair; the name of what its DQ gives."""
    scale_name, zero_name, quantized, dequantized = (
        onnx_model.free_name(f"{operand.tensor}_{part}", used)
        for part in ("scale", "zero_point", "quantized", "dequantized")
    )
    zero = np.zeros(scale.shape, np.int8)
    graph.initializer.extend([numpy_helper.from_array(scale, scale_name), numpy_helper.from_array(zero, zero_name)])
    axis = {} if operand.axis is None else {"axis": operand.axis}
    for op_type, source, result in (
        ("QuantizeLinear", operand.tensor, quantized),
        ("DequantizeLinear", quantized, dequantized),
    ):
        name = onnx_model.free_name(f"{operand.tensor}_{op_type}", used)
        graph.node.append(helper.make_node(op_type, [source, scale_name, zero_name], [result], name=name, **axis))
    return dequantized


def _with_integer_operators(
    model: onnx.ModelProto,
    settings: QuantizeSection,
    chosen: Sequence[Placement],
    known: Mapping[str, TensorRange],
) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode

    by_tensor = {
        name: TensorData(lowest=np.float32(-max(r.amax, 0.0)), highest=np.float32(r.amax)) for name, r in known.items()
    }
    quiet = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        quantizer = ONNXQuantizer(
            model,
            per_channel=settings.per_channel,
            reduce_range=False,
            mode=QuantizationMode.QLinearOps,
            static=True,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, by_tensor),
            nodes_to_quantize=[decision.node for decision in chosen],
            nodes_to_exclude=[],
            op_types_to_quantize=sorted({decision.op_type for decision in chosen}),
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )
        quantizer.quantize_model()
    finally:
        logging.getLogger().setLevel(quiet)
    result: onnx.ModelProto = quantizer.model.model
    return result


def scales_representable_in_fp16(model: onnx.ModelProto) -> int:
    """Round every scale up to an FP16 number; gives how many changed.

    Casting the scales later would make Q and DQ disagree with the grid that was chosen here, and
    a scale below 2**-24 would become zero: a division by it gives infinity.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    changed = 0
    for name in _scale_names(model.graph.node):
        tensor = initializers.get(name)
        if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        scale = numpy_helper.to_array(tensor)
        half = np.asarray(np.maximum(scale.astype(np.float16), _SMALLEST_FP16))
        np.nextafter(half, np.float16(np.inf), out=half, where=half.astype(np.float32) < scale)
        tensor.CopyFrom(numpy_helper.from_array(half.astype(np.float32), name))
        changed += int(not np.array_equal(half.astype(np.float32), scale))
    return changed


def fold_weights(model: onnx.ModelProto) -> None:
    """Replace every weight behind a QuantizeLinear by its INT8 numbers, as ONNX's definition computes them."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    folded = []
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or not {node.input[0], node.input[1]} <= initializers.keys():
            continue
        weight = numpy_helper.to_array(initializers[node.input[0]])
        scale = numpy_helper.to_array(initializers[node.input[1]])
        if scale.ndim:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            scale = scale.reshape([-1 if i == axis % weight.ndim else 1 for i in range(weight.ndim)])
        numbers = np.clip(np.rint(weight / scale), -128, 127).astype(np.int8)
        model.graph.initializer.append(numpy_helper.from_array(numbers, node.output[0]))
        folded.append(node)
    for node in folded:
        model.graph.node.remove(node)
    onnx_model.drop_unused_initializers(model.graph)


def _scale_names(nodes: Iterable[onnx.NodeProto]) -> list[str]:
    names = {node.input[1] for node in nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    return sorted(names)
