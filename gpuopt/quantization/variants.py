"""A model with some of its nodes in INT8: what analysis and accuracy budget try out."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx

from gpuopt import onnx_model
from gpuopt.calibration import ranges
from gpuopt.calibration.collectors import TensorRange
from gpuopt.errors import QuantizationError, described
from gpuopt.quantization import placement, qdq
from gpuopt.quantization.placement import Placement
from gpuopt.recipe import QuantizeSection
from gpuopt.stages.context import StageContext

FELL_BACK = "fell back to FP16 to hold the accuracy budget"
_NOT_NOW = "left in floating point for a comparison"


@dataclass(frozen=True)
class Variants:
    """An FP32 graph and all that decides its INT8 form.

    Attributes:
        model: FP32 graph with unique node names.
        settings: of the quantization.
        decisions: of the placement.
        ranges: of every activation that needs a scale.
        fp16: whether every scale has to be an FP16 number.
    """

    model: onnx.ModelProto
    settings: QuantizeSection
    decisions: Sequence[Placement]
    ranges: Mapping[str, TensorRange]
    fp16: bool

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that INT8 is decided for, in the graph's order."""
        return tuple(decision.node for decision in self.decisions if decision.quantized)

    def in_int8(self, nodes: Collection[str]) -> onnx.ModelProto:
        """The graph for ONNX Runtime with these nodes in INT8 and all others in FP32.

        Raises:
            QuantizationError: the quantizer fails.
        """
        wanted = set(nodes) & set(self.nodes)
        if not wanted:
            return self.model
        others = set(self.nodes) - wanted
        decisions = without(self.decisions, others, _NOT_NOW)
        try:
            return qdq.quantize(self.model, self.settings, decisions, self.ranges, self.fp16).runtime
        except Exception as error:  # the quantizer raises ValueError, RuntimeError, AttributeError, ...
            some = ", ".join(sorted(wanted)[:3])
            raise QuantizationError(
                f"quantizing {len(wanted)} of the nodes ({some}) fails: {described(error)}",
                "Exclude the node with --set quantize.nodes_to_exclude=[NAME]; --debug shows where it failed.",
            ) from error


def without(decisions: Sequence[Placement], nodes: Collection[str], reason: str) -> list[Placement]:
    """The decisions with these nodes left in floating point, for this reason."""
    return [dataclasses.replace(d, quantized=False, reason=reason) if d.node in nodes else d for d in decisions]


def of_context(context: StageContext) -> Variants:
    """The variants of a stage's `onnx` and `ranges`.

    Raises:
        QuantizationError: no node can be quantized.
    """
    settings = context.recipe.quantize
    model = onnx_model.load(context.folder("onnx"))
    known = ranges.load(context.folder("ranges") / ranges.RANGES_FILE)
    fp16 = settings.format == "qdq" and context.recipe.cast.remainder == "fp16"
    variants = Variants(model, settings, placement.place(model, settings, known, fp16), known, fp16)
    if not variants.nodes:
        raise QuantizationError(
            "no node can be quantized, so that there is nothing to measure",
            "Use --precision fp16, or relax the quantize section of the recipe.",
        )
    return variants
