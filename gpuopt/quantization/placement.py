"""Where INT8 goes: which operands of which nodes get Q/DQ, with which scale, and the reason for every decision.

The rules are TensorRT's. It fuses Q/DQ on the inputs of convolutions and matrix products. It fuses
a convolution with the Add behind it, and keeps the sum in INT8, when the *other* operand of that
Add, the residual, arrives quantized; Q/DQ between the convolution and the Add would part them.
Where both operands are quantized convolutions, the shortcut's is fused, the longer path the residual,
as TensorRT's own calibrator has it. NVIDIA's quantized ResNets do the opposite: of the seven blocks
in ResNet-50 (batch 32) and ResNet-18 (digits) three then took 6, 11 and 15 % longer for the two
convolutions on an H100 with TensorRT 8.5, the others the same within 2 %.
Operators that only move or select values (Concat, MaxPool, Reshape, ...) commute with Q/DQ: with
one scale on either side they run in INT8. An average does not commute, but has INT8 kernels with a
scale on either side: between INT8 neighbours it saves two changes of format. An average over all
places has its input quantized whatever reads it, since the rounding of its many values evens out:
else the convolution in front and its residual would have to give floating point. INT8 is slower than
FP16 on layers with few channels and on matrix-vector products, with two exceptions: the first
convolution of an image network, which TensorRT fuses with the activation and pooling behind it
(ResNet-50, batch 32, H100, TensorRT 8.5: 60 us instead of 172), and a classifier behind an average,
also with few outputs or a single row, since TensorRT averages INT8 values in INT8 only if what reads
them takes INT8 (ResNet-18, 10 classes, batch 64: both take 13 us in INT8, 21 in floating point).
Products of two activations (attention) lose accuracy for little gain.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from gpuopt import lowering, onnx_model
from gpuopt.calibration.collectors import TensorRange
from gpuopt.recipe import QuantizeSection

WEIGHTED_OPERATORS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
CANDIDATE_OPERATORS = (*WEIGHTED_OPERATORS, "Add")
COMMUTING_OPERATORS = (
    "Concat", "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Split", "Slice", "Identity"
)  # fmt: skip
AVERAGING_OPERATORS = ("AveragePool", "GlobalAveragePool")
INT8_LEVELS = 127
SMALLEST_FP16_SCALE = 2.0**-19
"""Below it FP16 numbers lie more than 1/32 of the scale apart, and rounding it would waste INT8's levels."""

LARGEST_FP16 = 65504.0
MOST_WIDENED = 2.0
"""A tensor does not join a region whose range is wider by more: it would lose over one bit of its eight."""

MOST_IMAGE_CHANNELS = 4
"""An input of the network with at most so many channels is an image."""

_UNKNOWN = onnx.TensorProto.UNDEFINED
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_RESHAPING = ("Flatten", "Reshape", "Squeeze")
_AVERAGES = (*AVERAGING_OPERATORS, "ReduceMean")
_PREPARING = ("Cast", "Transpose", "Sub", "Add", "Mul", "Div")
_FUSED_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu")
_SENSITIVE = (
    "Softmax", "LogSoftmax", "LayerNormalization", "InstanceNormalization", "GroupNormalization",
    "RMSNormalization", "Gelu", "Erf", "Exp", "Log", "Sqrt", "Pow", "Tanh", "Sigmoid",
)  # fmt: skip


@dataclass(frozen=True)
class QuantizedInput:
    """An operand that reaches its node through Q and DQ.

    Attributes:
        index: its place among the node's inputs.
        tensor: its name in the FP32 graph.
        amax: an activation's largest representable magnitude, 127 times its scale; None for a constant weight,
            whose scale comes from its values.
        axis: a weight's output-channel axis, with one scale an entry; None: one scale for the whole tensor.
    """

    index: int
    tensor: str
    amax: float | None = None
    axis: int | None = None


@dataclass(frozen=True)
class Placement:
    """The decision on one node.

    Attributes:
        reason: why it stays in floating point; empty for a node that is quantized.
        note: how it is quantized; empty for a node that is not.
        inputs: the operands that get Q/DQ, activations before weights; empty for a node that stays in floating
            point, and for all of a graph that was quantized before.
    """

    node: str
    op_type: str
    quantized: bool
    reason: str
    note: str = ""
    inputs: tuple[QuantizedInput, ...] = ()


def candidate_tensors(model: onnx.ModelProto, with_outputs: bool = False, min_channels: int = 1) -> list[str]:
    """Activations whose ranges `place` may ask for, in the graph's order; no settings can make it ask for others.

    Args:
        model: FP32 graph with the types and shapes of its tensors as far as they are known.
        with_outputs: both operands of an Add and what the nodes give, too: QOperator has a scale on either side.
        min_channels: inputs of layers with fewer channels on a side are left out.
    """
    graph = _Graph(model)
    regions = _decide(graph, _Rules(min_channels=min_channels, qoperator=with_outputs))
    found: dict[str, None] = {}
    for node in graph.nodes:
        verdict = regions.verdicts.get(node.output[0]) if node.output else None
        if verdict is None or verdict.reason:
            continue
        if node.op_type in (*CANDIDATE_OPERATORS, *AVERAGING_OPERATORS, "Concat"):
            found.update(dict.fromkeys(node.input[index] for index in verdict.operands))
        if with_outputs:
            found.update(dict.fromkeys(node.output))
    return list(found)


def place(
    model: onnx.ModelProto, settings: QuantizeSection, ranges: Mapping[str, TensorRange], fp16: bool
) -> list[Placement]:
    """Decide for every weighted node, every Add, and every commuting operator in front of a quantized node.

    Decisions depend on each other (a residual on its convolution, a Concat on its readers), so to
    keep a node out, name it in `settings.nodes_to_exclude` and decide again.

    Args:
        model: FP32 graph with unique node names, topologically sorted.
        settings: the recipe's section.
        ranges: calibrated range of every activation that has one.
        fp16: whether the remainder, and with it every scale, will be FP16.
    """
    graph = _Graph(model)
    qoperator = settings.format == "qoperator"
    rules = _Rules(settings.min_channels, qoperator, settings, ranges, fp16)
    regions = _decide(graph, rules)
    decisions = []
    for node in graph.nodes:
        verdict = regions.verdicts.get(node.output[0]) if node.output else None
        if verdict is None:
            continue
        if verdict.reason:
            decisions.append(Placement(node.name, node.op_type, False, verdict.reason))
            continue
        inputs = [QuantizedInput(i, node.input[i], amax=regions.amax(node.input[i])) for i in verdict.operands]
        if node.op_type in WEIGHTED_OPERATORS:
            axis = _weight_axis(node, graph.constants[node.input[1]]) if settings.per_channel else None
            inputs.append(QuantizedInput(1, node.input[1], axis=axis))
        note = _note(graph, regions, node, verdict, inputs)
        decisions.append(Placement(node.name, node.op_type, True, "", note, tuple(inputs)))
    return decisions


def explain(model: onnx.ModelProto, decisions: Sequence[Placement]) -> list[Placement]:
    """One decision for every node of the graph but Q and DQ, in its order: those given, and why others have none."""
    known = {decision.node: decision for decision in decisions}
    return [
        known.get(node.name) or Placement(node.name, node.op_type, False, _why_no_candidate(node.op_type))
        for node in model.graph.node
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear")
    ]


def _why_no_candidate(op_type: str) -> str:
    if op_type in COMMUTING_OPERATORS:
        return "moves values, and no quantized node reads them"
    if op_type in _AVERAGES:
        return "an average does not commute with Q/DQ, and not all that makes and reads its tensors is in INT8"
    if op_type in _SENSITIVE:
        return f"{op_type} needs the range or the precision of floating point"
    return f"no weights: TensorRT fuses {op_type} with its neighbours or runs it in floating point"


# What the graph looks like ------------------------------------------------------------------------


class _Graph:
    """Look-ups on a graph: who makes and who reads a tensor, what is constant, shapes, depths."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.constants = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        self.inputs = {value.name for value in model.graph.input} - self.constants.keys()
        self.outputs = {value.name for value in model.graph.output}
        self.producers: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        self.shapes: dict[str, tuple[int | None, ...]] = {}
        self.types: dict[str, int] = {}
        self.depths: dict[str, int] = {}
        """Nodes on the longest path from an input of the graph to a tensor."""
        for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
            self.types[value.name] = value.type.tensor_type.elem_type
            if value.type.tensor_type.HasField("shape"):
                dims = value.type.tensor_type.shape.dim
                self.shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                self.constants[node.output[0]] = tuple(node.attribute[0].t.dims)
            depth = 1 + max((self.depths.get(name, 0) for name in node.input), default=0)
            for name in node.output:
                self.producers[name] = node
                self.depths[name] = depth
            for index, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, index))
            for name in onnx_model.names_read(node) - set(node.input):
                self.readers.setdefault(name, []).append((node, -1))

    def only_reader(self, name: str, node: onnx.NodeProto) -> bool:
        """Whether this node reads the tensor once and nothing else sees it."""
        return name not in self.outputs and [reader for reader, _ in self.readers.get(name, ())] == [node]


@dataclass
class _Verdict:
    """Why a node stays out, or which of its inputs are quantized activations."""

    reason: str
    operands: tuple[int, ...] = ()
    about: str = ""


@dataclass(frozen=True)
class _Rules:
    """What the recipe and the ranges say; without them only the structure of the graph decides."""

    min_channels: int
    qoperator: bool
    settings: QuantizeSection | None = None
    ranges: Mapping[str, TensorRange] | None = None
    fp16: bool = False

    def refused_by_choice(self, node: onnx.NodeProto) -> str:
        if self.settings is None:
            return ""
        if node.op_type not in self.settings.op_types:
            return f"{node.op_type} is not among quantize.op_types"
        if _matches(node.op_type, self.settings.op_types_to_exclude):
            return f"{node.op_type} is excluded by quantize.op_types_to_exclude"
        if _matches(node.name, self.settings.nodes_to_exclude):
            return "excluded by quantize.nodes_to_exclude"
        return ""

    def refused_as_qoperator(self, node: onnx.NodeProto, weight: tuple[int, ...]) -> str:
        per_channel = self.settings is not None and self.settings.per_channel
        if self.qoperator and per_channel and node.op_type == "MatMul" and len(weight) > 2:
            return "QLinearMatMul takes no scale a column for a stack of matrices; quantize.per_channel=false allows it"
        return ""

    def refused_by_range(self, names: Iterable[str], zero_is_fine: bool = False) -> str:
        if self.ranges is None:
            return ""
        for name in names:
            if name not in self.ranges:
                return f"'{name}' has no calibrated range"
            amax = self.ranges[name].amax
            if zero_is_fine and amax == 0:
                continue
            if amax == 0:
                return f"'{name}' is zero on all calibration data"
            if self.fp16 and amax / INT8_LEVELS < SMALLEST_FP16_SCALE and not zero_is_fine:
                return f"'{name}' is too small for an FP16 scale (largest value {amax:.1e})"
            if self.fp16 and amax / INT8_LEVELS > LARGEST_FP16:
                return f"'{name}' is too large for an FP16 scale (largest value {amax:.1e})"
        return ""


@dataclass
class _Regions:
    """Verdicts by a node's first output, and tensors that share a scale."""

    ranges: Mapping[str, TensorRange]
    verdicts: dict[str, _Verdict] = field(default_factory=dict)
    groups: dict[str, set[str]] = field(default_factory=dict)
    measured: set[str] = field(default_factory=set)
    """Tensors whose own range counts: operands of weighted nodes and residuals, branches of a Concat."""
    decisive: set[str] = field(default_factory=set)
    """Those of them that a weighted node or a residual Add reads: their resolution is what accuracy depends on."""

    def group(self, name: str) -> set[str]:
        return self.groups.setdefault(name, {name})

    def amax(self, name: str) -> float:
        """Largest range of the region that a tensor belongs to."""
        return max(self.ranges[member].amax for member in self.group(name) & self.measured)

    def reads_int8(self, node: onnx.NodeProto, index: int) -> bool:
        verdict = self.verdicts.get(node.output[0]) if node.output else None
        return verdict is not None and not verdict.reason and index in verdict.operands

    def join(self, names: Iterable[str]) -> None:
        merged = set[str]().union(*map(self.group, names))
        for member in merged:
            self.groups[member] = merged

    def refused_join(self, names: Sequence[str]) -> str:
        """Why tensors cannot share a scale: one that is computed with would become too coarse."""
        merged = set[str]().union(*map(self.group, names)) & self.measured
        widest = max(merged, key=lambda name: (self.ranges[name].amax, name))
        for name in sorted(merged & self.decisive):
            if self.ranges[widest].amax > MOST_WIDENED * self.ranges[name].amax:
                return (
                    f"one scale would cost '{name}' (largest value {self.ranges[name].amax:.3g}) over a bit: "
                    f"'{widest}' reaches {self.ranges[widest].amax:.3g}"
                )
        return ""


# The decisions ------------------------------------------------------------------------------------


def _decide(graph: _Graph, rules: _Rules) -> _Regions:
    regions = _Regions(rules.ranges or {})
    for node in graph.nodes:
        if node.op_type in WEIGHTED_OPERATORS:
            verdict = _weighted(graph, rules, regions, node)
        elif node.op_type == "Add":
            verdict = _residual(graph, rules, regions, node)
        else:
            continue
        regions.verdicts[node.output[0]] = verdict
        if not verdict.reason:
            operands = {node.input[index] for index in verdict.operands}
            regions.decisive |= operands
            regions.measured |= operands
    if not rules.qoperator:
        # Backwards: an operator's readers are decided before it.
        for node in reversed(graph.nodes):
            found = None
            if node.op_type in COMMUTING_OPERATORS and node.input:
                found = _commuting(graph, rules, regions, node)
            elif node.op_type in AVERAGING_OPERATORS:
                found = _average(graph, rules, regions, node)
            if found is not None:
                regions.verdicts[node.output[0]] = found
    return regions


def _weighted(graph: _Graph, rules: _Rules, regions: _Regions, node: onnx.NodeProto) -> _Verdict:
    outputs = node.output if rules.qoperator else ()
    reason = (
        rules.refused_by_choice(node)
        or _refused_by_kind(graph, node, rules.min_channels, _reads_an_int8_average(graph, rules, regions, node))
        or rules.refused_as_qoperator(node, graph.constants[node.input[1]])
        or rules.refused_by_range([node.input[0], *outputs])
    )
    return _Verdict(reason, (0,))


def _refused_by_kind(graph: _Graph, node: onnx.NodeProto, min_channels: int, is_classifier: bool) -> str:
    """Why this kind of node stays out.

    Args:
        is_classifier: whether it reads an average of INT8 values: only its input channels count against
            `min_channels`, and it may have a single row.
    """
    activation, operand = node.input[:2]
    weight = graph.constants.get(operand)
    kind = graph.types.get(activation, _UNKNOWN)
    if kind not in (_UNKNOWN, onnx.TensorProto.FLOAT):
        return f"'{activation}' is {onnx.TensorProto.DataType.Name(kind)}: only FP32 is quantized"
    if activation in graph.constants:
        return (
            "both operands are constants"
            if weight is not None
            else "the weight is the first operand: TensorRT fuses Q and DQ for the second"
        )
    if weight is None:
        return "both operands are activations: attention and the like stay in floating point"
    if node.op_type == "MatMul" and node.name.endswith(lowering.TRANSFORM):
        return "a Fourier transform: a few of its values are far larger than the others, which one scale would lose"
    if len(weight) < 2:
        return "a matrix times a vector: memory-bound, INT8 brings nothing"
    channels = _channels(node, weight)
    sides: Sequence[int] = channels
    if is_classifier:
        sides = channels[:1]
    elif _reads_an_image(graph, node, channels[0]):
        sides = channels[1:]
    narrow = min(sides)
    if narrow < min_channels:
        return f"{narrow} channels on a side, fewer than quantize.min_channels {min_channels}"
    is_product = node.op_type in ("MatMul", "Gemm")
    if is_product and not is_classifier and _rows(node, graph.shapes.get(activation)) == 1:
        return "a vector times a matrix, always one row: memory-bound, INT8 brings nothing"
    return ""


def _reads_an_int8_average(graph: _Graph, rules: _Rules, regions: _Regions, node: onnx.NodeProto) -> bool:
    """Whether it is a matrix product and the only reader of an average that can take INT8 values: a classifier."""
    if node.op_type not in ("MatMul", "Gemm"):
        return False
    reader, name = node, node.input[0]
    while graph.only_reader(name, reader) and name in graph.producers:
        reader = graph.producers[name]
        name = reader.input[0] if reader.input else ""
        if reader.op_type in AVERAGING_OPERATORS:
            int8 = not rules.qoperator and graph.only_reader(name, reader) and _gives_int8(graph, regions, name)
            return int8 and not (rules.refused_by_choice(reader) or rules.refused_by_range([name]))
        if reader.op_type not in _RESHAPING or rules.refused_by_choice(reader):
            break
    return False


def _reads_an_image(graph: _Graph, node: onnx.NodeProto, channels: int) -> bool:
    """Whether it is a network's first convolution over an image."""
    if node.op_type != "Conv" or _groups(node) != 1 or channels > MOST_IMAGE_CHANNELS:
        return False
    name = node.input[0]
    while name not in graph.inputs:
        # A Transpose and the normalisation of bytes may stand before it.
        maker = graph.producers.get(name)
        sources = [source for source in maker.input if source not in graph.constants] if maker is not None else []
        if maker is None or maker.op_type not in _PREPARING or len(sources) != 1:
            return False
        name = sources[0]
    return True


def _channels(node: onnx.NodeProto, weight: tuple[int, ...]) -> tuple[int, int]:
    """Input and output channels of the whole node, groups counted together."""
    if node.op_type == "Gemm" and onnx_model.attributes(node).get("transB", 0):
        return weight[1], weight[0]
    if node.op_type in ("MatMul", "Gemm"):
        return weight[-2], weight[-1]
    groups = _groups(node)
    if node.op_type == "Conv":
        return weight[1] * groups, weight[0]
    return weight[0], weight[1] * groups


def _groups(node: onnx.NodeProto) -> int:
    return int(onnx_model.attributes(node).get("group", 1))


def _rows(node: onnx.NodeProto, shape: tuple[int | None, ...] | None) -> int | None:
    """Rows of the activation's matrix, leading dimensions counted as rows; None where they are not fixed."""
    if shape is None:
        return None
    if node.op_type == "Gemm" and onnx_model.attributes(node).get("transA", 0):
        shape = shape[::-1]
    rows = 1
    for size in shape[:-1]:
        if size is None:
            return None
        rows *= size
    return rows


def _residual(graph: _Graph, rules: _Rules, regions: _Regions, node: onnx.NodeProto) -> _Verdict:
    """An Add: its residual is quantized where the other operand is a quantized convolution that nothing else reads."""
    if reason := rules.refused_by_choice(node):
        return _Verdict(reason)
    if any(name in graph.constants for name in node.input):
        return _Verdict("adds a constant, which TensorRT folds into the layer before it")
    fusible = [
        index
        for index, name in enumerate(node.input)
        if name in graph.producers
        and graph.producers[name].op_type in _CONVOLUTIONS
        and graph.only_reader(name, node)
        and _same_shape(graph, name, node.output[0])
    ]
    if not fusible:
        behind = [graph.producers[n].op_type for n in node.input if n in graph.producers]
        if any(op_type in _CONVOLUTIONS for op_type in behind):
            return _Verdict(
                "the convolution's output is broadcast or read elsewhere, too: it is not fused with the Add"
            )
        return _Verdict("no convolution directly behind it: TensorRT fuses a quantized residual with convolutions only")
    in_int8 = [index for index in fusible if not regions.verdicts[node.input[index]].reason]
    # min gives the first of equals.
    fused = min(in_int8 or fusible, key=lambda index: graph.depths[node.input[index]])
    convolution = graph.producers[node.input[fused]]
    residual = 1 - fused
    if not _same_shape(graph, node.input[residual], node.output[0]):
        return _Verdict("the other operand is broadcast: TensorRT fuses residuals of the output's shape")
    if not in_int8:
        return _Verdict(f"{convolution.op_type} '{convolution.name}' behind it stays in floating point")
    operands: tuple[int, ...] = (0, 1) if rules.qoperator else (residual,)
    if rules.settings is None and not rules.qoperator:
        # Settings may keep either convolution out.
        operands = tuple(sorted(1 - index for index in in_int8))
    outputs = node.output if rules.qoperator else ()
    if reason := rules.refused_by_range([*(node.input[index] for index in operands), *outputs]):
        return _Verdict(reason)
    return _Verdict("", operands, f"residual branch of the Add behind {convolution.op_type} '{convolution.name}'")


def _same_shape(graph: _Graph, one: str, other: str) -> bool:
    """False only where the shapes are known to differ."""
    first, second = graph.shapes.get(one), graph.shapes.get(other)
    if first is None or second is None:
        return True
    known = zip(first, second, strict=False)
    return len(first) == len(second) and all(a == b or a is None or b is None for a, b in known)


def _commuting(graph: _Graph, rules: _Rules, regions: _Regions, node: onnx.NodeProto) -> _Verdict | None:
    """An operator that moves values; None where no quantized node reads it."""
    readers = [(name, reader, index) for name in node.output for reader, index in graph.readers.get(name, ())]
    if not any(regions.reads_int8(reader, index) for _, reader, index in readers):
        return None
    if reason := rules.refused_by_choice(node):
        return _Verdict(reason)
    for name in node.output:
        if name in graph.outputs:
            return _Verdict(f"'{name}' is an output of the graph, too")
    for name, reader, index in readers:
        if not regions.reads_int8(reader, index):
            return _Verdict(f"'{name}' feeds {reader.op_type} '{reader.name}', too, which takes it in floating point")
    operands = range(len(node.input)) if node.op_type == "Concat" else range(1)
    inputs = [node.input[index] for index in operands]
    if any(name in graph.constants for name in inputs):
        return _Verdict("an operand is a constant")
    # A branch of zeros, or a small one, is served by the others' scale.
    if node.op_type == "Concat" and (reason := rules.refused_by_range(inputs, zero_is_fine=True)):
        return _Verdict(reason)
    made = [name for name in node.output if graph.readers.get(name)]
    before = set(regions.measured)
    if node.op_type == "Concat":
        regions.measured.update(inputs)
    if rules.ranges is not None and (reason := regions.refused_join([*inputs, *made])):
        regions.measured = before
        return _Verdict(reason)
    regions.join([*inputs, *made])
    return _Verdict("", tuple(operands))


def _average(graph: _Graph, rules: _Rules, regions: _Regions, node: onnx.NodeProto) -> _Verdict | None:
    """An average behind a layer that can give INT8: over all places, or with readers that all take it; else None."""
    source, output = node.input[0], node.output[0]
    readers = graph.readers.get(output, [])
    is_output = output in graph.outputs
    if not (readers or is_output) or source in graph.constants:
        return None
    between = not is_output and all(regions.reads_int8(reader, index) for reader, index in readers)
    if not between and node.op_type != "GlobalAveragePool":
        return None
    if source in graph.inputs or not graph.only_reader(source, node) or not _gives_int8(graph, regions, source):
        return None
    if reason := rules.refused_by_choice(node) or rules.refused_by_range([source]):
        return _Verdict(reason)
    regions.measured.add(source)
    regions.decisive.add(source)
    about = "an average between INT8 layers" if between else "the average of INT8 values, in floating point"
    return _Verdict("", (0,), about)


def _gives_int8(graph: _Graph, regions: _Regions, name: str) -> bool:
    """Whether a tensor comes from a quantized layer, by way of activations that are fused with it."""
    node = graph.producers.get(name)
    while node is not None and node.op_type in _FUSED_ACTIVATIONS and graph.only_reader(node.input[0], node):
        node = graph.producers.get(node.input[0])
    verdict = regions.verdicts.get(node.output[0]) if node is not None else None
    return verdict is not None and not verdict.reason


def _weight_axis(node: onnx.NodeProto, weight: tuple[int, ...]) -> int | None:
    """The output-channel axis of a constant weight; None where no single axis is it.

    Conv has (out, in / groups, ...), ConvTranspose (in, out / groups, ...): with groups the entries
    of its axis 1 each stand for several output channels. Gemm has (in, out) or, with transB, (out, in),
    MatMul (..., in, out): a stack of matrices has one scale, since ONNX Runtime's integer product takes no more.
    """
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if _groups(node) == 1 else None
    if node.op_type == "Gemm":
        return 0 if onnx_model.attributes(node).get("transB", 0) else 1
    return 1 if len(weight) == 2 else None


def _note(
    graph: _Graph, regions: _Regions, node: onnx.NodeProto, verdict: _Verdict, inputs: Sequence[QuantizedInput]
) -> str:
    activation = inputs[0]
    scale = f"{(activation.amax or 0.0) / INT8_LEVELS:.3g}"
    group = regions.group(activation.tensor)
    if node.op_type in COMMUTING_OPERATORS:
        return f"moves INT8 values: scale {scale} shared by {_listed(sorted(group))}"
    source = regions.ranges[activation.tensor].method
    if len(group) > 1:
        source = f"{source}, shared by {_listed(sorted(group))}"
    said = f"input '{activation.tensor}' scale {scale} from {source}"
    if verdict.about:
        return f"{verdict.about}, {said}"
    weight = inputs[1]
    parts = [f"weights per {'tensor' if weight.axis is None else 'channel'}", said]
    groups = _groups(node) if node.op_type in _CONVOLUTIONS else 1
    if groups > 1:
        depthwise = groups == graph.constants[weight.tensor][0]
        parts.append(f"{'depthwise' if depthwise else f'{groups} groups'}: TensorRT has INT8 kernels for it")
    return ", ".join(parts)


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
