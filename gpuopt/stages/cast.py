"""FP16: the whole graph, or what INT8 leaves of it; inputs and outputs keep their dtypes."""

from __future__ import annotations

import fnmatch
import logging
from collections import Counter

import onnx

from gpuopt import onnx_model
from gpuopt.artifact import ONNX_FILE, StageOutcome
from gpuopt.errors import QuantizationError, described
from gpuopt.stages.context import StageContext


def run(context: StageContext) -> StageOutcome:
    """Make `onnx` with FP16 tensors inside, or `engine_onnx` where INT8 leaves one to cast.

    Raises:
        QuantizationError: the converter fails or leaves an invalid graph.
    """
    from onnxruntime.transformers import float16

    settings = context.recipe.cast
    model = onnx_model.load(context.engine_graph())
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
            "fp16_weights": weights[onnx.TensorProto.FLOAT16],
            "fp32_weights": weights[onnx.TensorProto.FLOAT],
        }
    )
