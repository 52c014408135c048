"""Parts of a graph: valid ONNX with the shapes of the whole, and nothing of the user's in them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from gpuopt.reduction.subgraph import Pieces, random_feed, with_random_weights, without_origin
from gpuopt.shapes import ShapeRange


def network() -> onnx.ModelProto:
    """Two branches over one Conv, joined by an Add; batch is dynamic."""
    generator = np.random.default_rng(0)
    weights = {
        "w1": generator.standard_normal((16, 3, 3, 3)),
        "w2": generator.standard_normal((16, 16, 1, 1)),
        "table": np.arange(32).reshape(2, 16),
        "shape": np.array([0, -1]),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w1"], ["a"], name="first", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["a"], ["b"], name="left"),
            helper.make_node("Conv", ["a", "w2"], ["c"], name="right"),
            helper.make_node("Add", ["b", "c"], ["d"], name="join"),
            helper.make_node("Reshape", ["d", "shape"], ["y"], name="flat"),
        ],
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(v.astype(np.float32 if v.dtype.kind == "f" else np.int64), k)
            for k, v in weights.items()
        ],
    )
    for node in graph.node:
        node.doc_string = "written at /home/somebody/secret.py"
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="secret.py, line 12: x = self.conv(x)")
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


PROFILE = {"x": ShapeRange((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))}


@pytest.mark.parametrize("kept", [(0,), (1, 2), (3,), (1, 3), (0, 4), (0, 1, 2, 3, 4)])
def test_every_part_is_a_graph_that_runs_at_every_shape(kept: tuple[int, ...]) -> None:
    piece = Pieces(network(), PROFILE).piece(kept)
    assert piece is not None
    onnx.checker.check_model(piece.model, full_check=True)
    assert piece.nodes == len(kept)
    session = ort.InferenceSession(piece.model.SerializeToString(), providers=["CPUExecutionProvider"])
    from gpuopt.onnx_model import input_specs

    for part in ("min", "opt", "max"):
        shapes = {name: getattr(sizes, part) for name, sizes in piece.profile.items()}
        session.run(None, random_feed(input_specs(piece.model), shapes, 0))


def test_inputs_of_a_part_have_the_shapes_of_the_whole_and_share_their_dynamic_dimension() -> None:
    piece = Pieces(network(), PROFILE).piece((3,))
    assert piece is not None
    assert piece.profile == {
        "b": ShapeRange((1, 16, 8, 8), (2, 16, 8, 8), (4, 16, 8, 8)),
        "c": ShapeRange((1, 16, 8, 8), (2, 16, 8, 8), (4, 16, 8, 8)),
    }
    names = {value.type.tensor_type.shape.dim[0].dim_param for value in piece.model.graph.input}
    assert len(names) == 1
    assert not piece.model.graph.initializer


def test_what_a_branch_reads_of_the_graph_around_it_becomes_an_input() -> None:
    body = helper.make_graph([helper.make_node("Neg", ["a"], ["r"])], "then", [], [_value("r")])
    otherwise = helper.make_graph([helper.make_node("Abs", ["a"], ["s"])], "else", [], [_value("s")])
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["a"], name="first"),
            helper.make_node("If", ["which"], ["y"], name="branch", then_branch=body, else_branch=otherwise),
        ],
        "branched",
        [_value("x"), helper.make_tensor_value_info("which", TensorProto.BOOL, [])],
        [_value("y")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    profile = {"x": ShapeRange((4,), (4,), (4,)), "which": ShapeRange((), (), ())}
    piece = Pieces(model, profile).piece((1,))
    assert piece is not None
    assert {value.name for value in piece.model.graph.input} == {"which", "a"}
    onnx.checker.check_model(piece.model, full_check=True)


def _value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [4])


def test_a_tensor_of_unknown_shape_is_no_border() -> None:
    graph = helper.make_graph(
        [
            helper.make_node("NonZero", ["x"], ["places"], name="select"),
            helper.make_node("Cast", ["places"], ["y"], name="after", to=TensorProto.FLOAT),
        ],
        "selected",
        [_value("x")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    pieces = Pieces(model, {"x": ShapeRange((4,), (4,), (4,))})
    assert pieces.piece((1,)) is None
    assert pieces.piece((0,)) is not None


def test_random_weights_keep_shape_dtype_and_what_says_nothing() -> None:
    before = network()
    after = with_random_weights(before)
    for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True):
        assert (old.name, list(old.dims), old.data_type) == (new.name, list(new.dims), new.data_type)
        changed = not np.array_equal(numpy_helper.to_array(old), numpy_helper.to_array(new))
        assert changed == (old.name != "shape")
    table = numpy_helper.to_array(after.graph.initializer[2])
    assert table.min() >= 0
    assert table.max() <= 31


def test_nothing_of_the_source_code_stays() -> None:
    assert b"secret" in network().SerializeToString()
    assert b"secret" not in without_origin(network()).SerializeToString()
