"""Q/DQ pairs (or QOperator nodes) where `placement` wants them, by onnxruntime's graph surgery."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from gpuopt import onnx_model
from gpuopt.calibration.collectors import TensorRange
from gpuopt.quantization.placement import Placement
from gpuopt.recipe import QuantizeSection

# TensorRT's ONNX parser: symmetric INT8, no INT32 bias behind a DequantizeLinear, weights as
# float -> Q -> DQ so that the builder folds them itself.
_TENSORRT_OPTIONS = {
    "QuantizeBias": False,
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "AddQDQPairToWeight": True,
    "DedicatedQDQPair": False,
    "ForceQuantizeNoInputCheck": True,
    "QDQDisableWeightAdjustForInt32Bias": True,
}
_SMALLEST_FP16 = np.float16(2.0**-24)


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
        decisions: `placement.place`'s; those with `quantized` are carried out.
        ranges: of every activation that needs a scale.
        fp16: whether the remainder of the engine's graph will be FP16, and with it every scale.

    Raises:
        Exception: onnxruntime's quantizer raises ValueError, RuntimeError, AttributeError, ...
    """
    chosen = [decision for decision in decisions if decision.quantized]
    quantized = _quantize(copy.deepcopy(model), settings, chosen, ranges)
    rounded = _scales_representable_in_fp16(quantized) if fp16 else 0
    quantized = onnx_model.sort_topologically(quantized)
    if settings.format != "qdq":
        return QuantizedGraphs(None, quantized, rounded)
    runtime = copy.deepcopy(quantized)
    _fold_weights(runtime)
    return QuantizedGraphs(quantized, runtime, rounded)


def _quantize(
    model: onnx.ModelProto,
    settings: QuantizeSection,
    chosen: Sequence[Placement],
    known: Mapping[str, TensorRange],
) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode

    op_types = sorted({decision.op_type for decision in chosen})
    qdq = settings.format == "qdq"
    options: dict[str, Any] = {"ActivationSymmetric": True, "WeightSymmetric": True}
    if qdq:
        options = {**_TENSORRT_OPTIONS, "OpTypesToExcludeOutputQuantization": op_types}
    by_tensor = {
        name: TensorData(lowest=np.float32(-max(r.amax, 0.0)), highest=np.float32(r.amax)) for name, r in known.items()
    }
    quiet = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        quantizer = (QDQQuantizer if qdq else ONNXQuantizer)(
            model,
            per_channel=settings.per_channel,
            reduce_range=False,
            **({} if qdq else {"mode": QuantizationMode.QLinearOps, "static": True}),
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, by_tensor),
            nodes_to_quantize=[decision.node for decision in chosen],
            nodes_to_exclude=[],
            op_types_to_quantize=op_types,
            extra_options=options,
        )
        quantizer.quantize_model()
    finally:
        logging.getLogger().setLevel(quiet)
    result: onnx.ModelProto = quantizer.model.model
    return result


def _scales_representable_in_fp16(model: onnx.ModelProto) -> int:
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


def _fold_weights(model: onnx.ModelProto) -> None:
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
    used = onnx_model.tensors_used(model.graph)
    for tensor in [t for t in model.graph.initializer if t.name not in used]:
        model.graph.initializer.remove(tensor)


def _scale_names(nodes: Iterable[onnx.NodeProto]) -> list[str]:
    names = {node.input[1] for node in nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    return sorted(names)
