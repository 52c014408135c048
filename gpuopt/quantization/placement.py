"""Where INT8 goes: which nodes get Q/DQ on their inputs, and the reason for every node that does not.

The rules are TensorRT's: it fuses Q/DQ on the inputs of convolutions and matrix products, and on
the residual branch of an Add behind a convolution; INT8 is slower than FP16 on layers with few
channels; products of two activations (attention) lose accuracy for little gain.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import onnx

from gpuopt.calibration.collectors import TensorRange
from gpuopt.recipe import QuantizeSection

WEIGHTED_OPERATORS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
CANDIDATE_OPERATORS = (*WEIGHTED_OPERATORS, "Add")
INT8_LEVELS = 127
SMALLEST_FP16_SCALE = 2.0**-19
"""Below it FP16 numbers lie more than 1/32 of the scale apart, and rounding it would waste INT8's levels."""


LARGEST_FP16 = 65504.0


@dataclass(frozen=True)
class Placement:
    """The decision on one node; `reason` is empty for a node that is quantized."""

    node: str
    op_type: str
    quantized: bool
    reason: str


def candidate_tensors(model: onnx.ModelProto, with_outputs: bool = False) -> list[str]:
    """Activations that feed a candidate node: the tensors whose ranges quantization may need.

    Args:
        with_outputs: what those nodes give, too: QOperator nodes have a scale on either side.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    producers = _producers(model)
    found: dict[str, None] = {}
    for node in model.graph.node:
        if node.op_type in WEIGHTED_OPERATORS or _is_residual_add(node, constants, producers):
            found.update({name: None for name in node.input[:2] if name not in constants})
            found.update({name: None for name in node.output if with_outputs})
    return list(found)


def place(
    model: onnx.ModelProto, settings: QuantizeSection, ranges: Mapping[str, TensorRange], fp16: bool
) -> list[Placement]:
    """Decide for every candidate node.

    Args:
        model: FP32 graph with unique node names.
        settings: the recipe's section.
        ranges: calibrated range of every activation that has one.
        fp16: whether the remainder, and with it every scale, will be FP16.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    producers = _producers(model)
    decisions = []
    for node in model.graph.node:
        if node.op_type not in CANDIDATE_OPERATORS:
            continue
        reason = (
            _by_choice(node, settings)
            or _by_kind(node, shapes, producers, settings.min_channels)
            or _by_range(node, shapes, ranges, fp16, settings.format == "qoperator")
        )
        decisions.append(Placement(node.name, node.op_type, not reason, reason))
    return decisions


def _by_choice(node: onnx.NodeProto, settings: QuantizeSection) -> str:
    if node.op_type not in settings.op_types:
        return f"{node.op_type} is not among quantize.op_types"
    if _matches(node.op_type, settings.op_types_to_exclude):
        return f"{node.op_type} is excluded by quantize.op_types_to_exclude"
    if _matches(node.name, settings.nodes_to_exclude):
        return "excluded by quantize.nodes_to_exclude"
    return ""


def _by_kind(
    node: onnx.NodeProto,
    shapes: dict[str, tuple[int, ...]],
    producers: dict[str, onnx.NodeProto],
    min_channels: int,
) -> str:
    if node.op_type == "Add":
        return "" if _is_residual_add(node, shapes, producers) else "not the residual Add of a convolution"
    weight = shapes.get(node.input[1])
    if weight is None and node.input[0] in shapes:
        return "the weight is the first operand: TensorRT fuses Q and DQ for the second"
    if weight is None:
        return "both operands are activations: attention and the like stay in floating point"
    if len(weight) < 2:
        return "a matrix times a vector: memory-bound, INT8 brings nothing"
    narrow = min(_channels(node, weight))
    if narrow < min_channels:
        return f"{narrow} channels on a side, fewer than quantize.min_channels {min_channels}"
    return ""


def _channels(node: onnx.NodeProto, weight: tuple[int, ...]) -> tuple[int, int]:
    """Input and output channels of the whole node, groups counted together."""
    if node.op_type in ("MatMul", "Gemm"):
        return weight[-2], weight[-1]
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    if node.op_type == "Conv":
        return weight[1] * groups, weight[0]
    return weight[0], weight[1] * groups


def _by_range(
    node: onnx.NodeProto, shapes: Container[str], ranges: Mapping[str, TensorRange], fp16: bool, with_outputs: bool
) -> str:
    inputs = node.input if node.op_type == "Add" else node.input[:1]
    for name in [*inputs, *(node.output if with_outputs else ())]:
        if name in shapes:
            continue
        if name not in ranges:
            return f"'{name}' has no calibrated range"
        if ranges[name].amax == 0:
            return f"'{name}' is zero on all calibration data"
        if fp16 and ranges[name].amax / INT8_LEVELS < SMALLEST_FP16_SCALE:
            return f"'{name}' is too small for an FP16 scale (largest value {ranges[name].amax:.1e})"
        if fp16 and ranges[name].amax / INT8_LEVELS > LARGEST_FP16:
            return f"'{name}' is too large for an FP16 scale (largest value {ranges[name].amax:.1e})"
    return ""


def _is_residual_add(node: onnx.NodeProto, constants: Container[str], producers: Mapping[str, onnx.NodeProto]) -> bool:
    if node.op_type != "Add" or any(name in constants for name in node.input):
        return False
    return any(producers[name].op_type in ("Conv", "ConvTranspose") for name in node.input if name in producers)


def _producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
