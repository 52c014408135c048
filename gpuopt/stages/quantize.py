"""Static INT8: Q/DQ pairs (or QOperator nodes) where `placement` wants them, by onnxruntime's graph surgery."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from gpuopt import onnx_model, placement
from gpuopt.artifact import StageOutcome
from gpuopt.calibration import ranges
from gpuopt.calibration.collectors import TensorRange
from gpuopt.errors import QuantizationError, described
from gpuopt.recipe import Recipe
from gpuopt.stages.context import StageContext

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


def run(context: StageContext) -> StageOutcome:
    """Make `onnx` with INT8 weights, and from Q/DQ `engine_onnx` with floating-point weights behind Q and DQ.

    Raises:
        QuantizationError: nothing can be quantized, or onnxruntime's quantizer fails.
    """
    recipe = context.recipe
    model = onnx_model.load(context.folder("onnx"))
    fp16 = recipe.quantize.format == "qdq" and recipe.cast.remainder == "fp16"
    known = ranges.load(context.folder("ranges") / ranges.RANGES_FILE)
    decisions = placement.place(model, recipe.quantize, known, fp16)
    chosen = [decision for decision in decisions if decision.quantized]
    if not chosen:
        reasons = Counter(d.reason for d in decisions).most_common(2)
        raise QuantizationError(
            "no node can be quantized: "
            + ("; ".join(r for r, _ in reasons) or "the graph has no Conv, MatMul or Gemm"),
            "Use --precision fp16, or relax the quantize section of the recipe.",
        )
    try:
        quantized = _quantize(model, recipe, chosen, known)
    except Exception as error:  # onnxruntime.quantization raises ValueError, RuntimeError, AttributeError, ...
        raise QuantizationError(
            f"onnxruntime's quantizer fails: {described(error)}",
            "Exclude the node with --set quantize.nodes_to_exclude=[NAME]; --debug shows where it failed.",
        ) from error
    rounded = 0
    if fp16:
        rounded = _scales_representable_in_fp16(quantized)
    quantized = onnx_model.sort_topologically(quantized)
    if recipe.quantize.format == "qdq":
        onnx_model.save(quantized, context.made("engine_onnx"))
        _fold_weights(quantized)
    onnx_model.save(quantized, context.made("onnx"))
    operators = Counter(node.op_type for node in quantized.graph.node)
    facts = {
        "format": recipe.quantize.format,
        "quantized_nodes": len(chosen),
        "candidate_nodes": len(decisions),
        "quantized": [decision.node for decision in chosen],
        "kept_in_floating_point": [
            {"node": d.node, "op_type": d.op_type, "reason": d.reason} for d in decisions if not d.quantized
        ],
        "qdq_pairs": operators["DequantizeLinear"],
        "scales_rounded_to_fp16": rounded,
    }
    return StageOutcome(facts)


def _quantize(
    model: onnx.ModelProto,
    recipe: Recipe,
    chosen: list[placement.Placement],
    known: dict[str, TensorRange],
) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode

    op_types = sorted({decision.op_type for decision in chosen})
    qdq = recipe.quantize.format == "qdq"
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
            per_channel=recipe.quantize.per_channel,
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
