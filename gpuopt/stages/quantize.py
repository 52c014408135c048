"""Static INT8: decide for every node, quantize, and say why."""

from __future__ import annotations

from collections import Counter

from gpuopt import onnx_model, reference
from gpuopt.artifact import StageOutcome
from gpuopt.calibration import ranges
from gpuopt.errors import QuantizationError, described
from gpuopt.quantization import macs, placement, qdq, variants
from gpuopt.stages import fallback
from gpuopt.stages.context import StageContext


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
    decisions = variants.without(decisions, fallback.load(context), variants.FELL_BACK)
    chosen = [decision for decision in decisions if decision.quantized]
    if not chosen:
        reasons = Counter(d.reason for d in decisions).most_common(2)
        raise QuantizationError(
            "no node can be quantized: "
            + ("; ".join(r for r, _ in reasons) or "the graph has no Conv, MatMul or Gemm"),
            "Use --precision fp16, or relax the quantize section of the recipe.",
        )
    try:
        graphs = qdq.quantize(model, recipe.quantize, decisions, known, fp16)
    except Exception as error:  # onnxruntime.quantization raises ValueError, RuntimeError, AttributeError, ...
        raise QuantizationError(
            f"onnxruntime's quantizer fails: {described(error)}",
            "Exclude the node with --set quantize.nodes_to_exclude=[NAME]; --debug shows where it failed.",
        ) from error
    if graphs.engine is not None:
        onnx_model.save(graphs.engine, context.made("engine_onnx"))
    onnx_model.save(graphs.runtime, context.made("onnx"))
    stored = reference.load(context.folder("reference")) if "reference" in context.artifacts else None
    work = macs.of_reference(model, stored, context.output / "shapes")
    operators = Counter(node.op_type for node in graphs.runtime.graph.node)
    facts = {
        "format": recipe.quantize.format,
        "quantized_nodes": len(chosen),
        "candidate_nodes": len(decisions),
        "quantized": [decision.node for decision in chosen],
        "kept_in_floating_point": [
            {"node": d.node, "op_type": d.op_type, "reason": d.reason} for d in decisions if not d.quantized
        ],
        "qdq_pairs": operators["DequantizeLinear"],
        "scales_rounded_to_fp16": graphs.scales_rounded,
        "macs": sum(work.values()),
        "int8_macs_share": macs.share(work, [decision.node for decision in chosen]),
    }
    return StageOutcome(facts)
