"""A model with some of its nodes in INT8: what analysis and accuracy budget try out."""

from __future__ import annotations

import dataclasses
import functools
import glob
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import external_data_helper

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
        ranges: of every activation that needs a scale.
        fp16: whether every scale has to be an FP16 number.
    """

    model: onnx.ModelProto
    settings: QuantizeSection
    ranges: Mapping[str, TensorRange]
    fp16: bool

    @functools.cached_property
    def decisions(self) -> list[Placement]:
        """The placement where nothing falls back."""
        return self.placed((), "")

    @property
    def nodes(self) -> tuple[str, ...]:
        """The computing nodes that INT8 is decided for, in the graph's order."""
        return _computing(self.decisions)

    def left_without(self, out: Collection[str]) -> tuple[str, ...]:
        """The computing nodes that stay in INT8 where these, and what depends on them, do not."""
        return _computing(self.placed(out, ""))

    def placed(self, out: Collection[str], reason: str) -> list[Placement]:
        """The placement with these nodes left in floating point for this reason, and what depends on them for its own.

        A residual whose convolution falls back falls back with it, and regions that share a scale form anew.
        """
        excluded = (*self.settings.nodes_to_exclude, *map(glob.escape, out))
        settings = self.settings.model_copy(update={"nodes_to_exclude": excluded})
        decisions = placement.place(self.model, settings, self.ranges, self.fp16)
        return [dataclasses.replace(d, reason=reason) if d.node in out else d for d in decisions]

    def in_int8(self, nodes: Collection[str]) -> onnx.ModelProto:
        """The graph for ONNX Runtime with these nodes in INT8 and all others in FP32.

        Raises:
            QuantizationError: the quantizer fails.
        """
        return self._quantized(self.placed(set(self.nodes) - set(nodes), _NOT_NOW), self.model)

    def alone(self, node: str, weights: WeightsFile | None = None) -> onnx.ModelProto:
        """The graph for ONNX Runtime with this node in INT8 as it will be among others, and all others in FP32.

        Args:
            weights: of `model`; the graph then has the node's own weights only, and is to be saved beside the others.

        Raises:
            QuantizationError: the quantizer fails.
        """
        # onnxruntime's quantizer, which makes QOperator, also reads weights of other nodes.
        model = self.model if weights is None or self.settings.format != "qdq" else weights.graph_with(node)
        return self._quantized([d for d in self.decisions if d.node == node], model)

    def _quantized(self, decisions: Sequence[Placement], model: onnx.ModelProto) -> onnx.ModelProto:
        wanted = [decision.node for decision in decisions if decision.quantized]
        if not wanted:
            return model
        try:
            return qdq.quantize(model, self.settings, decisions, self.ranges, self.fp16).runtime
        except Exception as error:  # the quantizer raises ValueError, RuntimeError, AttributeError, ...
            raise QuantizationError(
                f"quantizing {len(wanted)} of the nodes ({', '.join(wanted[:3])}) fails: {described(error)}",
                "Exclude the node with --nodes-to-exclude NAME; --debug shows where it failed.",
            ) from error


def _computing(decisions: Sequence[Placement]) -> tuple[str, ...]:
    return tuple(d.node for d in decisions if d.quantized and d.op_type in placement.CANDIDATE_OPERATORS)


class WeightsFile:
    """A graph's weights in a file beside which variants of the graph are saved: written once, not for every variant."""

    _SMALL = 1024
    """Bytes of a weight that stays in the graph."""

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        """Write the file into the folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        self._nodes = {node.name: node for node in model.graph.node}
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._light = onnx.ModelProto()
        self._light.CopyFrom(model)
        external_data_helper.convert_model_to_external_data(self._light, True, "weights", self._SMALL)
        external_data_helper.write_external_data_tensors(self._light, str(folder))

    def graph_with(self, node: str) -> onnx.ModelProto:
        """A copy of the graph that holds the weights of one node, and the place of all others."""
        copy = onnx.ModelProto()
        copy.CopyFrom(self._light)
        own = set(self._nodes[node].input)
        for tensor in copy.graph.initializer:
            if tensor.name in own:
                tensor.CopyFrom(self._weights[tensor.name])
        return copy


def of_context(context: StageContext) -> Variants:
    """The variants of a stage's `onnx` and `ranges`.

    Raises:
        QuantizationError: no node can be quantized, or the model comes with Q/DQ of its own.
    """
    settings = context.recipe.quantize
    if "ranges" not in context.artifacts:
        raise QuantizationError(
            "the model holds Q/DQ of its own: no node can be taken out of INT8, or put in alone",
            "Leave out --max-accuracy-drop; analyze and budget are for models that gpuopt quantizes.",
        )
    model = onnx_model.load(context.folder("onnx"))
    known = ranges.load(context.folder("ranges") / ranges.RANGES_FILE)
    fp16 = context.recipe.has_fp16_scales
    variants = Variants(model, settings, known, fp16)
    if not variants.nodes:
        raise QuantizationError(
            "no node can be quantized, so that there is nothing to measure",
            "Use 'gpuopt compile --precision fp16', or relax the quantize section of the recipe.",
        )
    return variants
