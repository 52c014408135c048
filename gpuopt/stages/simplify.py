"""Constant folding, fusion and shape inference, before quantization and never after."""

from __future__ import annotations

import contextlib
from collections import Counter

import onnx

from gpuopt import environment, onnx_model, reference
from gpuopt.artifact import ONNX_FILE, StageOutcome
from gpuopt.backends.onnxruntime import Session
from gpuopt.comparison import SAME, first_difference
from gpuopt.errors import GpuoptError, described
from gpuopt.lowering import has_such_operators, lowered
from gpuopt.stages.context import StageContext


def run(context: StageContext) -> StageOutcome:
    """Make `onnx`: the simplified graph, or the graph as it came where simplifying fails or changes results.

    Value information is inferred either way: calibration and quantization need every tensor's type.
    """
    model = onnx_model.load(context.folder("onnx"))
    before = len(model.graph.node)
    folder = context.made("onnx")
    warnings: list[str] = []
    if context.recipe.simplify.enabled:
        reason = _simplified(model, context)
        if reason:
            warnings.append(f"the graph was not simplified: {reason}")
    path = folder / ONNX_FILE
    if not path.exists():
        _finish(model, context)
    nodes = Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)
    return StageOutcome(
        {"nodes_before": before, "nodes_after": sum(nodes.values()), "operators": dict(nodes.most_common())},
        tuple(warnings),
    )


def _simplified(model: onnx.ModelProto, context: StageContext) -> str:
    """Write the simplified graph; the reason if it was not possible, nothing if it was."""
    if not environment.has_module("onnxslim"):
        return f"onnxslim is not installed: {environment.install_hint('onnxslim')}"
    import onnxslim

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    path = context.output / "onnx" / ONNX_FILE
    try:
        if has_such_operators(copy):
            # What is folded can be what their constant sizes come from.
            with contextlib.suppress(Exception):
                copy = onnxslim.slim(copy)
            copy = lowered(copy)
        copy = onnxslim.slim(copy)
        onnx_model.zero_biases_dropped(copy)
        onnx_model.spatial_means_pooled(copy)
        _finish(copy, context)
        onnx_model.check(path)
        stored = reference.load(context.folder("reference"))
        difference = first_difference(Session(path), stored, SAME)
    except GpuoptError as error:
        difference = error.message
    except Exception as error:  # onnxslim and the checker raise errors without a common base
        difference = described(error)
    if difference:
        for written in path.parent.iterdir():
            written.unlink()
    return difference


def _finish(model: onnx.ModelProto, context: StageContext) -> None:
    onnx_model.node_names_made_unique(model)
    onnx_model.save(onnx_model.with_types(model), context.output / "onnx")
