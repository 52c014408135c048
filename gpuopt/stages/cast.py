"""FP16: the whole graph, or what INT8 leaves of it; inputs and outputs keep their dtypes."""

from __future__ import annotations

import fnmatch
import logging
from collections import Counter
from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper

from gpuopt import onnx_model
from gpuopt.artifact import ONNX_FILE, StageOutcome
from gpuopt.errors import QuantizationError, described
from gpuopt.stages.context import StageContext

_FIRST_WITH_FP16_SCALES = 19
"""The opset from which Q and DQ take FP16."""


def run(context: StageContext) -> StageOutcome:
    """Make `onnx` with FP16 tensors inside, or `engine_onnx` where INT8 leaves one to cast.

    Raises:
        QuantizationError: the converter fails or leaves an invalid graph.
    """
    from onnxruntime.transformers import float16

    settings = context.recipe.cast
    model, warnings = _with_fp16_scales(onnx_model.load(context.engine_graph()))
    # The converter takes every output for a node's.
    onnx_model.constant_outputs_made_by_nodes(model)
    own = {node.name: kind for node in model.graph.node if (kind := _kind_of_cast(node)) is not None}
    keep = [n.name for n in model.graph.node if any(fnmatch.fnmatchcase(n.name, p) for p in settings.nodes_to_keep)]
    path = context.made("engine_onnx" if "engine_onnx" in context.artifacts else "onnx") / ONNX_FILE
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        converted = float16.convert_float_to_float16(
            model,
            keep_io_types=True,
            op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *settings.op_types_to_keep],
            node_block_list=keep,
        )
        converted = onnx_model.sort_topologically(converted)
        _stay_in_fp32(converted, own)
        if context.recipe.build.legacy and "engine_onnx" not in context.artifacts:
            # TensorRT 8 chooses FP16 itself, layer by layer, in a graph that is FP32.
            onnx_model.save(onnx_model.load(context.engine_graph()), context.made("engine_onnx"))
        onnx_model.save(converted, path.parent)
        onnx_model.check(path)
    except Exception as error:  # the converter and the checker raise errors without a common base
        raise QuantizationError(
            f"the graph cannot be cast to FP16: {described(error)}",
            "Keep the operator in FP32: --set cast.op_types_to_keep=[TYPE] or cast.nodes_to_keep=[NAME].",
        ) from error
    finally:
        logging.disable(level)
    casts = Counter(node.op_type for node in converted.graph.node)["Cast"]
    weights = Counter(tensor.data_type for tensor in converted.graph.initializer)
    return StageOutcome(
        {
            "kept_in_fp32": keep,
            "cast_nodes": casts,
            "fp16_weights": weights[TensorProto.FLOAT16],
            "fp32_weights": weights[TensorProto.FLOAT],
        },
        warnings,
    )


def _stay_in_fp32(model: onnx.ModelProto, own: Mapping[str, int]) -> None:
    """Take out what the converter puts between two nodes in FP32: a cast to FP16, which may not hold it, and back.

    Args:
        own: the model's own casts, type by node: a pair of them is meant, and one to FP32 became one to FP16.
    """
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    kinds = onnx_model.element_types(model)
    outputs = {value.name for value in graph.output}
    renamed: dict[str, str] = {}
    for node in graph.node:
        there = makers.get(node.input[0]) if _casts(node, TensorProto.FLOAT) else None
        if there is None or not _casts(there, TensorProto.FLOAT16):
            continue
        if node.name in own and there.name in own:
            continue
        source = renamed.get(there.input[0], there.input[0])
        if kinds.get(source) == TensorProto.FLOAT:
            if node.output[0] in outputs:
                node.CopyFrom(helper.make_node("Identity", [source], list(node.output), name=node.name))
            else:
                renamed[node.output[0]] = source
        elif own.get(there.name) == TensorProto.FLOAT:
            node.input[0] = source
    dropped = set(renamed)
    kept = [node for node in graph.node if not dropped.intersection(node.output)]
    read = set[str]().union(outputs, *map(onnx_model.names_read, kept), renamed.values())
    idle = {node.output[0] for node in kept if _casts(node, TensorProto.FLOAT16)} - read
    nodes = [node for node in kept if not idle.intersection(node.output)]
    values = [value for value in graph.value_info if value.name not in dropped | idle]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.value_info.extend(values)
    onnx_model.rename_tensors(graph, renamed)


def _kind_of_cast(node: onnx.NodeProto) -> int | None:
    """What a Cast makes; None of other nodes."""
    return next((int(a.i) for a in node.attribute if a.name == "to"), None) if node.op_type == "Cast" else None


def _casts(node: onnx.NodeProto, kind: int) -> bool:
    return _kind_of_cast(node) == kind


def _with_fp16_scales(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """A graph with Q/DQ in an opset whose Q and DQ take FP16; and what to tell of it."""
    before = onnx_model.opset(model)
    if before >= _FIRST_WITH_FP16_SCALES or all(node.op_type != "QuantizeLinear" for node in model.graph.node):
        return model, ()
    try:
        raised = onnx.version_converter.convert_version(model, _FIRST_WITH_FP16_SCALES)
    except Exception as error:  # the converter raises RuntimeError and its own kinds
        raise QuantizationError(
            f"Q and DQ take FP16 from opset {_FIRST_WITH_FP16_SCALES}, and opset {before} cannot be converted: "
            f"{described(error)}",
            "Export with a newer opset, or keep FP32 around INT8: --set cast.remainder=fp32.",
        ) from error
    said = f"the engine's graph has opset {_FIRST_WITH_FP16_SCALES} instead of {before}: its FP16 scales need it"
    return raised, (said,)
