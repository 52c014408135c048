"""Parts of a graph: valid ONNX with the shapes of the whole, and nothing of the user's in them."""

from __future__ import annotations

import ml_dtypes
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


def nested() -> onnx.ModelProto:
    """A branch with a weight, a function with one that another function calls, and a function that nothing calls."""
    weight = numpy_helper.from_array(np.linspace(1, 2, 32, dtype=np.float32), "w")
    inside = [
        helper.make_node("Constant", [], ["w"], value=weight),
        helper.make_node("Mul", ["a", "w"], ["b"], doc_string="secret of the function"),
    ]
    inside[1].metadata_props.add(key="pkg.torch.onnx.stack_trace", value="secret.py, line 7")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    functions = [
        helper.make_function("own", "Scale", ["a"], ["b"], inside, opsets),
        helper.make_function(
            "own", "Outer", ["a"], ["b"], [helper.make_node("Scale", ["a"], ["b"], domain="own")], opsets
        ),
        helper.make_function("own", "Unused", ["a"], ["b"], inside, opsets),
    ]
    product = helper.make_node("Mul", ["x", "w"], ["r"], doc_string="secret of the branch")
    bodies = [helper.make_graph([product], name, [], [_wide("r")], [weight]) for name in ("then", "else")]
    nodes = [
        helper.make_node("If", ["which"], ["branched"], then_branch=bodies[0], else_branch=bodies[1]),
        helper.make_node("Outer", ["branched"], ["y"], domain="own"),
    ]
    inputs = [_wide("x"), helper.make_tensor_value_info("which", TensorProto.BOOL, [])]
    graph = helper.make_graph(nodes, "nested", inputs, [_wide("y")])
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


def _wide(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [32])


def test_weights_and_origins_inside_branches_and_functions_go_as_well() -> None:
    weight = np.linspace(1, 2, 32, dtype=np.float32).tobytes()
    assert nested().SerializeToString().count(weight) == 4
    after = without_origin(with_random_weights(nested()))
    assert weight not in after.SerializeToString()
    assert b"secret" not in after.SerializeToString()
    feed = {"x": np.ones(32, np.float32), "which": np.array(True)}
    ort.InferenceSession(after.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)


def test_a_part_has_the_functions_that_it_calls_and_no_others() -> None:
    profile = {"x": ShapeRange((32,), (32,), (32,)), "which": ShapeRange((), (), ())}
    pieces = Pieces(nested(), profile)
    for kept, names in (((0,), set()), ((0, 1), {"Scale", "Outer"})):
        piece = pieces.piece(kept)
        assert piece is not None
        assert {function.name for function in piece.model.functions} == names


MANY = np.random.default_rng(0).standard_normal(64).astype(np.float32)


@pytest.mark.parametrize(
    "values",
    [
        np.where(np.arange(64) == 5, np.nan, MANY),
        np.where(np.arange(64) == 5, np.inf, np.abs(MANY)),
        MANY.astype(np.float16),
        MANY + 1j * MANY,
        MANY.astype(ml_dtypes.bfloat16),
        MANY.astype(ml_dtypes.float8_e4m3fn),
        MANY.astype(ml_dtypes.float8_e5m2),
        (MANY * 3).astype(ml_dtypes.int4),
        np.arange(64).astype(ml_dtypes.uint4),
        np.arange(64).astype(np.uint64) + np.uint64(2**63),
        MANY > 0,
        np.array([f"word {index}" for index in range(64)], object),
    ],
    ids=lambda values: f"{values.dtype.name}",
)
def test_constants_of_every_type_become_random(values: np.ndarray) -> None:
    before = numpy_helper.from_array(values, "w")
    graph = helper.make_graph([], "constants", [], [], [before])
    after = with_random_weights(helper.make_model(graph)).graph.initializer[0]
    assert (after.name, list(after.dims), after.data_type) == (before.name, list(before.dims), before.data_type)
    found = numpy_helper.to_array(after)
    assert np.count_nonzero(found == values) < 48
    if values.dtype.kind not in "Ob":
        old, new = (array.astype(complex) for array in (values, found))
        assert np.isfinite(new).all()
        assert np.abs(new).max() <= np.abs(old[np.isfinite(old)]).max() * 1.5


def test_constants_written_as_lists_become_random_and_the_structure_of_nodes_stays() -> None:
    weight = numpy_helper.from_array(MANY, "")
    places = numpy_helper.from_array(np.arange(64), "")
    nodes = [
        helper.make_node("Constant", [], ["a"], value_floats=MANY.tolist()),
        helper.make_node("Constant", [], ["b"], value_ints=range(64)),
        helper.make_node("Constant", [], ["c"], value_strings=[f"word {index}" for index in range(64)]),
        helper.make_node("Constant", [], ["d"], sparse_value=helper.make_sparse_tensor(weight, places, [128])),
        helper.make_node("Trees", ["x"], ["e"], domain="own", nodes=range(64), weight=weight),
    ]
    after = with_random_weights(helper.make_model(helper.make_graph(nodes, "constants", [], [])))
    pairs = list(zip(nodes, after.graph.node, strict=True))
    for old, new in pairs:
        assert old != new
    sparse = pairs[3][1].attribute[0].sparse_tensor
    assert sparse.indices == places
    assert sparse.values != weight
    trees = {one.name: one for one in pairs[4][1].attribute}
    assert list(trees["nodes"].ints) == list(range(64))
    assert trees["weight"].t != weight


def test_constants_of_one_value_stay() -> None:
    same = [np.full(32, value) for value in (0.3, 7, True)]
    graph = helper.make_graph([], "constants", [], [], [numpy_helper.from_array(v, v.dtype.name) for v in same])
    model = helper.make_model(graph)
    assert with_random_weights(model) == model
