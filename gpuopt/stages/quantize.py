"""Static INT8: decide for every node, quantize, and say why; a graph with Q/DQ of its own is checked instead."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import onnx

from gpuopt import onnx_model, reference
from gpuopt.artifact import StageOutcome
from gpuopt.calibration import ranges
from gpuopt.errors import GpuoptError, QuantizationError, described
from gpuopt.quantization import existing, macs, placement, qdq, variants
from gpuopt.quantization.placement import Placement
from gpuopt.recipe import QuantizeSection
from gpuopt.stages import fallback
from gpuopt.stages.context import StageContext
from gpuopt.storage import write_json

PLACEMENT_FILE = "placement.json"
_MADE_BY = {"If": " (torch.cond)", "Loop": " (torch.while_loop)", "Scan": " (torch.scan)"}


def run(context: StageContext) -> StageOutcome:
    """Make `onnx` with INT8 weights, and from Q/DQ `engine_onnx` with floating-point weights behind Q and DQ.

    `placement` gets the decision on every node of the graph.

    Raises:
        QuantizationError: nothing can be quantized, onnxruntime's quantizer fails, or the graph has Q/DQ of its
            own that TensorRT refuses.
    """
    model = onnx_model.load(context.folder("onnx"))
    if existing.holds_quantization(model):
        return _adopt(context, model)
    recipe = context.recipe
    fp16 = recipe.has_fp16_scales
    known = ranges.load(context.folder("ranges") / ranges.RANGES_FILE)
    subject = variants.Variants(model, recipe.quantize, known, fp16)
    decisions = subject.placed(fallback.load(context), variants.FELL_BACK)
    candidates = [decision for decision in decisions if decision.op_type in placement.CANDIDATE_OPERATORS]
    if not any(decision.quantized for decision in candidates):
        reasons = Counter(d.reason for d in candidates).most_common(2)
        raise QuantizationError(
            "no node can be quantized: " + ("; ".join(r for r, _ in reasons) or _no_candidate(model)),
            "Use 'gpuopt compile --precision fp16', or relax the quantize section of the recipe.",
        )
    try:
        graphs = qdq.quantize(model, recipe.quantize, decisions, known, fp16)
    except GpuoptError:
        raise
    except Exception as error:  # onnxruntime.quantization raises ValueError, RuntimeError, AttributeError, ...
        raise QuantizationError(
            f"onnxruntime's quantizer fails: {described(error)}",
            "Exclude the node with --nodes-to-exclude NAME; --debug shows where it failed.",
        ) from error
    _save(context, graphs, placement.explain(model, decisions))
    pairs = sum(node.op_type == "DequantizeLinear" for node in graphs.runtime.graph.node)
    facts = {
        "format": recipe.quantize.format,
        "quantized_before": False,
        **_counts(candidates),
        **_work(context, model, candidates),
        "sharing_a_scale": [d.node for d in decisions if d.quantized and d.op_type in placement.COMMUTING_OPERATORS],
        "qdq_pairs": pairs,
        "scales_rounded_to_fp16": graphs.scales_rounded,
    }
    return StageOutcome(facts, tuple(_without_effect(model, recipe.quantize)))


def _no_candidate(model: onnx.ModelProto) -> str:
    inside = [
        f"{node.op_type} '{node.name}'{_MADE_BY.get(node.op_type, '')}"
        for node in model.graph.node
        if any(
            inner.op_type in placement.CANDIDATE_OPERATORS
            for graph in onnx_model.subgraphs(node)
            for inner in graph.node
        )
    ]
    if inside:
        return f"all Conv, MatMul and Gemm lie inside {', '.join(inside[:3])}, where nothing is quantized"
    return "the graph has no Conv, MatMul or Gemm"


def _without_effect(model: onnx.ModelProto, settings: QuantizeSection) -> Iterator[str]:
    """A warning for every pattern of the recipe that meets nothing in the graph."""
    names = [node.name for node in model.graph.node]
    types = [node.op_type for node in model.graph.node]
    for key, patterns, present in (
        ("nodes_to_exclude", settings.nodes_to_exclude, names),
        ("op_types_to_exclude", settings.op_types_to_exclude, types),
    ):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(one, pattern) for one in present):
                yield f"quantize.{key}: '{pattern}' is nowhere in the graph; gpuopt quantize --explain lists the nodes"


def _adopt(context: StageContext, model: onnx.ModelProto) -> StageOutcome:
    recipe = context.recipe
    if recipe.quantize.format != "qdq":
        raise QuantizationError(
            f"the model holds Q/DQ already, which --quant-format {recipe.quantize.format} cannot take",
            "Use --quant-format qdq.",
        )
    fp16 = recipe.has_fp16_scales
    adopted = existing.adopt(model, fp16)
    graphs = qdq.finished(adopted.model, True, fp16)
    _save(context, graphs, placement.explain(model, adopted.decisions))
    facts = {
        "format": "qdq",
        "quantized_before": True,
        **_counts(adopted.decisions),
        **_work(context, model, adopted.decisions),
        "sharing_a_scale": [],
        "qdq_pairs": adopted.pairs,
        "repaired": list(adopted.repaired),
        "scales_rounded_to_fp16": graphs.scales_rounded,
    }
    return StageOutcome(facts, adopted.warnings)


def _counts(candidates: Sequence[Placement]) -> dict[str, object]:
    return {
        "quantized_nodes": sum(decision.quantized for decision in candidates),
        "candidate_nodes": len(candidates),
        "quantized": [decision.node for decision in candidates if decision.quantized],
        "kept_in_floating_point": [
            {"node": d.node, "op_type": d.op_type, "reason": d.reason} for d in candidates if not d.quantized
        ],
    }


def _work(context: StageContext, model: onnx.ModelProto, decisions: Sequence[Placement]) -> dict[str, object]:
    """How much of the arithmetic is in INT8."""
    stored = reference.load(context.folder("reference")) if "reference" in context.artifacts else None
    work = macs.of_reference(model, stored, context.output / "shapes")
    chosen = [decision.node for decision in decisions if decision.quantized]
    return {"macs": sum(work.values()), "int8_macs_share": macs.share(work, chosen)}


def _save(context: StageContext, graphs: qdq.QuantizedGraphs, decisions: Sequence[Placement]) -> None:
    if graphs.engine is not None:
        onnx_model.save(graphs.engine, context.made("engine_onnx"))
    onnx_model.save(graphs.runtime, context.made("onnx"))
    write_json(context.made("placement") / PLACEMENT_FILE, [asdict(decision) for decision in decisions])
