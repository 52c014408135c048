"""Where INT8 goes: which nodes get Q/DQ on their inputs, and the reason for every node that does not.

The rules are TensorRT's: it fuses Q/DQ on the inputs of convolutions and matrix products, and on
the residual branch of an Add behind a convolution; INT8 is slower than FP16 on layers with few
channels; products of two activations (attention) lose accuracy for little gain.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from gpuopt.recipe import QuantizeSection

WEIGHTED_OPERATORS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
CANDIDATE_OPERATORS = (*WEIGHTED_OPERATORS, "Add")


@dataclass(frozen=True)
class Placement:
    """The decision on one node; `reason` is empty for a node that is quantized."""

    node: str
    op_type: str
    quantized: bool
    reason: str


def candidate_tensors(model: onnx.ModelProto) -> list[str]:
    """Activations that feed a candidate node: the tensors whose ranges quantization may need."""
    constants = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, None] = {}
    for node in model.graph.node:
        if node.op_type in CANDIDATE_OPERATORS:
            inputs = node.input if node.op_type == "Add" else node.input[:2]
            found.update({name: None for name in inputs if name and name not in constants})
    return list(found)


def place(model: onnx.ModelProto, settings: QuantizeSection, calibrated: set[str]) -> list[Placement]:
    """Decide for every candidate node.

    Args:
        model: FP32 graph with unique node names.
        settings: the recipe's section.
        calibrated: tensors that have a range.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    decisions = []
    for node in model.graph.node:
        if node.op_type not in CANDIDATE_OPERATORS:
            continue
        reason = (
            _by_choice(node, settings)
            or _by_kind(node, shapes, producers, settings.min_channels)
            or _by_range(node, shapes, calibrated)
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
        behind = [producers[name].op_type for name in node.input if name in producers]
        if any(name in shapes for name in node.input) or not {"Conv", "ConvTranspose"} & set(behind):
            return "not the residual Add of a convolution"
        return ""
    weight = shapes.get(node.input[1])
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


def _by_range(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]], calibrated: set[str]) -> str:
    inputs = node.input if node.op_type == "Add" else node.input[:1]
    missing = [name for name in inputs if name not in shapes and name not in calibrated]
    return f"no calibrated range for {', '.join(missing)}" if missing else ""


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
