"""The deployed form of a graph: numerics over many graphs, what is folded, what is moved and cancelled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from gpuopt import graph_layout, onnx_model
from gpuopt.backends.onnxruntime import Session
from gpuopt.deployed_form import Normalization, TensorForm

LAST = TensorForm(channels_last=True)
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1 / 255)


class Graph:
    """A graph that grows node by node; `now` is the newest tensor, of shape N, C, spatial axes."""

    def __init__(self, shape: Sequence[int], seed: int, opset: int = 20) -> None:
        self.shape = list(shape)
        self.generator = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.now = "x"
        self.opset = opset
        self.input_shape = list(shape)

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(self, op_type: str, operands: Sequence[str], **attributes: Any) -> str:
        name = f"/block{len(self.nodes)}/{op_type}"
        output = f"{name}_output"
        self.nodes.append(helper.make_node(op_type, list(operands), [output], name=name, **attributes))
        return output

    def weights(self, *shape: int) -> str:
        return self.constant(self.generator.standard_normal(shape))

    # What a block may be -------------------------------------------------------------------------

    def convolution(self, source: str | None = None, channels: int = 0) -> str:
        rank = len(self.shape) - 2
        out = channels or self.shape[1]
        weight = self.weights(out, self.shape[1], *[3] * rank)
        return self.add("Conv", [source or self.now, weight], pads=[1] * 2 * rank, kernel_shape=[3] * rank)

    def conv(self) -> None:
        channels = int(self.generator.integers(2, 7))
        self.now = self.convolution(channels=channels)
        self.shape[1] = channels

    def relu(self) -> None:
        self.now = self.add("Relu", [self.now])

    def residual(self) -> None:
        self.now = self.add("Add", [self.now, self.convolution(self.add("Relu", [self.now]))])

    def concat(self) -> None:
        if self.shape[1] > 16:
            return
        self.now = self.add("Concat", [self.now, self.convolution(), self.now], axis=1)
        self.shape[1] *= 3

    def split(self) -> None:
        if self.shape[1] < 2:
            return
        one = self.add("Slice", [self.now, *(self.constant([n], np.int64) for n in (1, self.shape[1], 1))])
        self.now, self.shape[1] = one, self.shape[1] - 1

    def scale_channels(self) -> None:
        self.now = self.add("Mul", [self.now, self.weights(self.shape[1], *[1] * (len(self.shape) - 2))])

    def scale_columns(self) -> None:
        self.now = self.add("Add", [self.now, self.weights(self.shape[-1])])

    def scale_scalar(self) -> None:
        self.now = self.add("Sub", [self.now, self.constant(0.25)])

    def squeeze_and_excite(self) -> None:
        axes = self.constant(range(2, len(self.shape)), np.int64)
        mean = self.add("ReduceMean", [self.now, axes], keepdims=1)
        self.now = self.add("Mul", [self.now, self.add("Sigmoid", [mean])])

    def reduce_channels(self) -> None:
        highest = self.add("ReduceMax", [self.now, self.constant([1], np.int64)], keepdims=0)
        self.now = self.add("Add", [self.now, self.add("Unsqueeze", [highest, self.constant([1], np.int64)])])

    def softmax(self) -> None:
        self.now = self.add("Softmax", [self.now], axis=1)

    def pad(self) -> None:
        rank = len(self.shape)
        amounts = [0] * rank + [0] * rank
        amounts[2], amounts[2 * rank - 1], amounts[1] = 1, 2, 1
        self.now = self.add("Pad", [self.now, self.constant(amounts, np.int64), self.constant(0.5)])
        self.shape[1] += 1
        self.shape[2] += 1
        self.shape[-1] += 2

    def resize(self) -> None:
        if max(self.shape[2:]) > 24:
            return
        scales = [1.0, 1.0, *[2.0] * (len(self.shape) - 2)]
        self.now = self.add(
            "Resize", [self.now, "", self.constant(scales)], mode="nearest",
            coordinate_transformation_mode="asymmetric", nearest_mode="floor",
        )  # fmt: skip
        self.shape[2:] = [2 * size for size in self.shape[2:]]

    def pool(self) -> None:
        rank = len(self.shape) - 2
        if min(self.shape[2:]) >= 2:
            self.now = self.add("MaxPool", [self.now], kernel_shape=[2] * rank)
            self.shape[2:] = [size - 1 for size in self.shape[2:]]

    def shuffle(self) -> None:
        """Channels in another order, by Reshapes that depend on it."""
        channels, rest = self.shape[1], self.shape[2:]
        if channels % 2:
            return
        grouped = self.add("Reshape", [self.now, self.constant([0, 2, channels // 2, *rest], np.int64)])
        swapped = self.add("Transpose", [grouped], perm=[0, 2, 1, *range(3, 3 + len(rest))])
        self.now = self.add("Reshape", [swapped, self.constant([0, channels, *rest], np.int64)])

    def norm(self) -> None:
        self.now = self.add(
            "InstanceNormalization", [self.now, self.weights(self.shape[1]), self.weights(self.shape[1])]
        )

    def attention(self) -> None:
        """Tokens channels last, mixed by a MatMul, and back."""
        channels, rest = self.shape[1], self.shape[2:]
        tokens = self.add("Reshape", [self.now, self.constant([0, channels, -1], np.int64)])
        last = self.add("Transpose", [tokens], perm=[0, 2, 1])
        mixed = self.add("MatMul", [last, self.weights(channels, channels)])
        first = self.add("Transpose", [mixed], perm=[0, 2, 1])
        self.now = self.add("Reshape", [first, self.constant([0, channels, *rest], np.int64)])

    def channels_last_block(self) -> None:
        """What exporters make of a model that permutes by itself."""
        rank = len(self.shape)
        last = self.add("Transpose", [self.now], perm=[0, *range(2, rank), 1])
        scaled = self.add("Mul", [last, self.weights(self.shape[1])])
        self.now = self.add("Transpose", [self.add("Relu", [scaled])], perm=[0, rank - 1, *range(1, rank - 1)])

    BLOCKS = (
        "conv", "relu", "residual", "concat", "split", "scale_channels", "scale_columns", "scale_scalar",
        "squeeze_and_excite", "reduce_channels", "softmax", "pad", "resize", "pool", "shuffle", "norm", "attention",
        "channels_last_block",
    )  # fmt: skip

    def finished(self, ending: str, dynamic: bool) -> onnx.ModelProto:
        outputs = [self.now]
        if ending == "flatten":
            outputs.append(self.add("Flatten", [self.now]))
        elif ending == "twice":
            outputs.append(self.add("Relu", [self.now]))
        named = [("y", "z")[index] for index in range(len(outputs))]
        self.nodes += [
            helper.make_node("Identity", [inner], [name], name=f"/{name}/Identity")
            for inner, name in zip(outputs, named, strict=True)
        ]
        shape: list[Any] = list(self.input_shape)
        if dynamic:
            shape[0] = "batch"
        made = helper.make_graph(
            self.nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in named], self.constants,
        )  # fmt: skip
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model, data_prop=True)


def ran(model: onnx.ModelProto, feed: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Outputs, node by node as the graph is written."""
    return Session(onnx_model.save(model, folder), optimization="none").run(feed)


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


graphs = st.tuples(
    st.lists(st.sampled_from(Graph.BLOCKS), min_size=1, max_size=6),
    st.sampled_from([(2, 4, 7), (1, 3, 6, 5), (2, 6, 5, 6), (1, 2, 3, 4, 3)]),
    st.sampled_from(["plain", "flatten", "twice"]),
    st.booleans(),
    st.integers(0, 1000),
)


@settings(max_examples=200, deadline=None)
@given(graphs)
def test_a_graph_in_another_layout_gives_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[list[str], tuple[int, ...], str, bool, int]
) -> None:
    blocks, shape, ending, dynamic, seed = drawn
    graph = Graph(shape, seed)
    for block in blocks:
        getattr(graph, block)()
    model = graph.finished(ending, dynamic)
    folder = tmp_path_factory.mktemp("graph")
    value = graph.generator.standard_normal(shape).astype(np.float32)
    expected = ran(model, {"x": value}, folder / "original")
    outputs = {"y": LAST, **({"z": TensorForm() if ending == "flatten" else LAST} if ending != "plain" else {})}
    own = graph_layout.transposes(model)
    deployed = copied(model)
    graph_layout.set_form(deployed, {"x": LAST}, outputs, for_int8=False)
    onnx.checker.check_model(deployed, full_check=True)
    feed = {"x": LAST.deployed(value)}
    inserted = ran(deployed, feed, folder / "inserted")
    moved, reason = graph_layout.without_needless_transposes(deployed, folder)
    onnx.checker.check_model(moved, full_check=True)
    found = ran(moved, feed, folder / "moved")
    for name, wanted in expected.items():
        wanted = outputs[name].deployed(wanted)
        assert np.array_equal(inserted[name], wanted)
        # ONNX Runtime's ReduceMean sums in another order where the axes lie otherwise in memory.
        if "squeeze_and_excite" in blocks:
            np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-5 * float(np.abs(wanted).max()))
        else:
            assert np.array_equal(found[name], wanted), reason
    assert graph_layout.transposes(moved) <= graph_layout.transposes(deployed)
    assert own + 1 + list(outputs.values()).count(LAST) == graph_layout.transposes(deployed)
    kept = {node.name for node in model.graph.node if node.op_type not in graph_layout._MOVES}
    assert kept <= {node.name for node in moved.graph.node}
    assert {node.domain for node in moved.graph.node} <= {"", "ai.onnx"}


def test_transposes_of_the_model_s_own_cancel_those_at_its_ends(tmp_path: Path) -> None:
    """A model that takes channels last, wrapped to take them first, gets its own form back."""
    graph = Graph((1, 3, 6, 5), 0)
    last = graph.add("Transpose", ["x"], perm=[0, 2, 3, 1])
    scaled = graph.add("Mul", [last, graph.weights(3)])
    graph.now = graph.add("Transpose", [graph.add("Relu", [scaled])], perm=[0, 3, 1, 2])
    model = graph.finished("plain", True)
    value = graph.generator.standard_normal((2, 3, 6, 5)).astype(np.float32)
    expected = ran(model, {"x": value}, tmp_path / "a")["y"]
    graph_layout.set_form(model, {"x": LAST}, {"y": LAST}, for_int8=False)
    moved, reason = graph_layout.without_needless_transposes(model, tmp_path)
    assert (graph_layout.transposes(model), graph_layout.transposes(moved), reason) == (4, 0, "")
    found = ran(moved, {"x": LAST.deployed(value)}, tmp_path / "b")["y"]
    assert np.array_equal(found, LAST.deployed(expected))
    assert [dim.dim_param or dim.dim_value for dim in moved.graph.input[0].type.tensor_type.shape.dim] == [
        "batch", 6, 5, 3,
    ]  # fmt: skip


def convolutional(pads: int, channels: int = 3, groups: int = 1, bias: bool = True) -> onnx.ModelProto:
    generator = np.random.default_rng(3)
    constants = [numpy_helper.from_array(generator.standard_normal((12, channels // groups, 3, 3)).astype("f"), "w")]
    operands = ["x", "w"]
    if bias:
        constants.append(numpy_helper.from_array(generator.standard_normal(12).astype("f"), "b"))
        operands.append("b")
    node = helper.make_node("Conv", operands, ["y"], name="/conv", pads=[pads] * 4, kernel_shape=[3, 3], group=groups)
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size, "h", "w"])
        for name, size in (("x", channels), ("y", 12))
    ]
    made = helper.make_graph([node], "g", values[:1], values[1:], constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("for_int8", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("pads", "groups"), [(0, 1), (1, 1), (0, 3), (1, 3)])
def test_bytes_are_normalised_within_the_bound(
    pads: int, groups: int, bias: bool, for_int8: bool, last: bool, tmp_path: Path
) -> None:
    model = convolutional(pads, groups=groups, bias=bias)
    raw = np.random.default_rng(0).integers(0, 256, (2, 3, 9, 8)).astype(np.uint8)
    raw[0, :, :4] = 0
    raw[1, :, 4:] = 255
    expected = ran(model, {"x": IMAGENET.apply(raw)}, tmp_path / "a")["y"]
    weights = np.abs(numpy_helper.to_array(model.graph.initializer[0]).astype(np.float64))
    form = TensorForm(last, IMAGENET)
    found = graph_layout.set_form(model, {"x": form}, {"y": TensorForm()}, for_int8)["x"]
    onnx.checker.check_model(model, full_check=True)
    assert found.factor == "weights"
    assert found.center == ("Sub" if pads else "Sub, bias" if for_int8 else "bias")
    assert ("pads" in found.reason) == bool(pads)
    names = {node.op_type for node in model.graph.node}
    assert names == {"Cast", "Conv"} | ({"Transpose"} if last else set()) | (
        {"Sub"} if "Sub" in found.center else set()
    )
    assert model.graph.node[0].op_type == "Cast"  # TensorRT lets nothing else read bytes
    assert bool(graph_layout.exact_int8_tensors(model)) == (for_int8 and not pads)
    got = ran(model, {"x": np.moveaxis(raw, 1, -1) if last else raw}, tmp_path / "b")["y"]
    # The documented bound: 2^-22 * terms * sum |w| * (|byte| + mean / scale) * scale / std, and the bias's rounding.
    largest = (255 + IMAGENET.center()) * IMAGENET.factor()
    per_output = largest.reshape(3, 1)[: weights.shape[1]] if groups == 1 else largest.max() * np.ones((1, 1))
    sums = (weights.reshape(12, weights.shape[1], -1) * per_output[None]).sum(axis=(1, 2))
    bound = 2.0**-22 * weights[0].size * sums
    assert np.all(np.abs(got - expected) <= bound.reshape(1, 12, 1, 1))
    assert float(np.abs(got - expected).max()) < 1e-4 * float(np.abs(expected).max())


def test_raw_zeros_at_the_border_would_be_wrong(tmp_path: Path) -> None:
    """What the rule guards against: with padding, the centre in the bias changes the border and nothing else."""
    raw = np.random.default_rng(0).integers(0, 256, (1, 3, 9, 8)).astype(np.uint8)
    expected = ran(convolutional(1), {"x": IMAGENET.apply(raw)}, tmp_path / "a")["y"]
    padless = convolutional(0)
    graph_layout.set_form(padless, {"x": TensorForm(False, IMAGENET)}, {"y": TensorForm()}, False)
    conv = next(node for node in padless.graph.node if node.op_type == "Conv")
    next(a for a in conv.attribute if a.name == "pads").ints[:] = [1] * 4
    del padless.graph.output[0].type.tensor_type.shape.dim[:]
    padless.graph.output[0].type.tensor_type.shape.dim.extend([onnx.TensorShapeProto.Dimension() for _ in range(4)])
    wrong = ran(padless, {"x": raw}, tmp_path / "b")["y"]
    assert np.allclose(wrong[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-3)
    assert np.abs(wrong - expected)[..., 0, :].max() > 1


def test_what_is_no_conv_keeps_the_normalisation_in_nodes(tmp_path: Path) -> None:
    model = convolutional(0)
    model.graph.node.insert(0, helper.make_node("Relu", ["x"], ["r"], name="/relu"))
    model.graph.node[1].input[0] = "r"
    raw = np.random.default_rng(0).integers(0, 256, (1, 3, 6, 6)).astype(np.uint8)
    expected = ran(model, {"x": IMAGENET.apply(raw)}, tmp_path / "a")["y"]
    found = graph_layout.set_form(model, {"x": TensorForm(True, IMAGENET)}, {"y": TensorForm()}, False)["x"]
    assert (found.factor, found.center) == ("Mul", "Sub")
    assert found.reason == "Relu '/relu' reads 'x', not a Conv alone"
    got = ran(model, {"x": np.moveaxis(raw, 1, -1)}, tmp_path / "b")["y"]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_weight_that_another_node_reads_is_not_touched() -> None:
    model = convolutional(0)
    model.graph.node.append(helper.make_node("ReduceSum", ["w"], ["s"], name="/sum"))
    model.graph.output.append(helper.make_tensor_value_info("s", TensorProto.FLOAT, None))
    before = numpy_helper.to_array(model.graph.initializer[0])
    found = graph_layout.set_form(model, {"x": TensorForm(False, IMAGENET)}, {"y": TensorForm()}, False)["x"]
    assert found.reason == "the weights of '/conv' are another node's, too"
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    assert np.array_equal(numpy_helper.to_array(weight), before)


def test_only_a_factor_needs_no_centre() -> None:
    model = convolutional(1)
    form = TensorForm(False, Normalization((0.0,), (1.0,), 1 / 255))
    found = graph_layout.set_form(model, {"x": form}, {"y": TensorForm()}, True)["x"]
    assert found.to_json() == {"factor": "weights", "center": "", "reason": ""}
    assert [node.op_type for node in model.graph.node] == ["Cast", "Conv"]


@pytest.mark.parametrize("spatial", [(9,), (5, 4, 6)])
@pytest.mark.parametrize("pads", [0, 1])
@pytest.mark.parametrize("for_int8", [True, False])
def test_bytes_of_sound_and_of_volumes_are_folded_too(
    spatial: tuple[int, ...], pads: int, for_int8: bool, tmp_path: Path
) -> None:
    graph = Graph((2, 2, *spatial), 0)
    kernel = [3] * len(spatial)
    weight = graph.weights(4, 2, *kernel)
    graph.now = graph.add("Conv", ["x", weight], pads=[pads] * 2 * len(spatial), kernel_shape=kernel)
    model = graph.finished("plain", True)
    normalization = Normalization((0.4, 0.6), (0.2, 0.3), 1 / 255)
    raw = graph.generator.integers(0, 256, (3, 2, *spatial)).astype(np.uint8)
    expected = ran(model, {"x": normalization.apply(raw)}, tmp_path / "a")["y"]
    form = TensorForm(True, normalization)
    found = graph_layout.set_form(model, {"x": form}, {"y": LAST}, for_int8)["x"]
    assert (found.factor, found.center) == ("weights", "Sub" if pads else "Sub, bias" if for_int8 else "bias")
    got = ran(model, {"x": np.moveaxis(raw, 1, -1)}, tmp_path / "b")["y"]
    np.testing.assert_allclose(np.moveaxis(got, -1, 1), expected, rtol=1e-4, atol=1e-4)


def test_what_else_the_optimizer_would_change_is_told(tmp_path: Path) -> None:
    graph = Graph((1, 4, 6, 5), 0)
    graph.relu()
    model = graph.finished("plain", False)
    changed = copied(model)
    changed.graph.node[0].op_type = "Sigmoid"
    assert graph_layout._other_change(model, changed) == "'/block0/Relu' from Relu to Sigmoid"
    fused = copied(model)
    fused.graph.node[0].domain = "com.microsoft"
    assert graph_layout._other_change(model, fused) == "the domain of '/block0/Relu' to com.microsoft"
    dropped = copied(model)
    del dropped.graph.node[0]
    assert graph_layout._other_change(model, dropped) == "more than Transposes: it drops Relu '/block0/Relu'"
    added = copied(model)
    added.graph.node.append(helper.make_node("Cast", ["x"], ["c"], name="more", to=1))
    assert graph_layout._other_change(model, added) == "more than Transposes: it adds a Cast"


def test_nothing_but_transposes_is_optimised_away(tmp_path: Path) -> None:
    """Duplicates, no-ops, a BatchNorm to fold, constants to compute: all of it stays, with its names."""
    graph = Graph((1, 4, 6, 6), 0)
    last = graph.add("Transpose", ["x"], perm=[0, 2, 3, 1])
    one = graph.add("Mul", [last, graph.weights(4)])
    two = graph.add("Mul", [last, graph.constants[-1].name])
    twice = graph.add("Dropout", [graph.add("Identity", [graph.add("Add", [one, two])])])
    graph.now = graph.add("Transpose", [twice], perm=[0, 3, 1, 2])
    graph.conv()
    channels = graph.shape[1]
    numbers = [graph.constant(np.abs(graph.generator.standard_normal(channels))) for _ in range(4)]
    graph.now = graph.add("BatchNormalization", [graph.now, *numbers])
    graph.relu()
    graph.now = graph.add("Clip", [graph.now, graph.constant(0.0), graph.constant(6.0)])
    graph.now = graph.add("Reshape", [graph.now, graph.add("Shape", [graph.now])])
    axis = graph.constant([0], np.int64)
    graph.now = graph.add("Squeeze", [graph.add("Unsqueeze", [graph.now, axis]), axis])
    graph.now = graph.add("Mul", [graph.now, graph.constant(1.0)])
    graph.now = graph.add("Expand", [graph.now, graph.constant([1, 1, 1, 1], np.int64)])
    model = graph.finished("plain", True)
    value = graph.generator.standard_normal((1, 4, 6, 6)).astype(np.float32)
    expected = ran(model, {"x": value}, tmp_path / "a")["y"]
    graph_layout.set_form(model, {"x": LAST}, {"y": LAST}, for_int8=False)
    moved, reason = graph_layout.without_needless_transposes(model, tmp_path)
    assert (reason, graph_layout.transposes(model), graph_layout.transposes(moved)) == ("", 4, 2)
    named = {node.name: node.op_type for node in model.graph.node if node.op_type != "Transpose"}
    assert {node.name: node.op_type for node in moved.graph.node if node.op_type != "Transpose"} == named
    assert np.array_equal(ran(moved, {"x": LAST.deployed(value)}, tmp_path / "b")["y"], LAST.deployed(expected))
