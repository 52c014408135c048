"""Reading ONNX from strangers, and the surgery that must keep what a graph computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from gpuopt import onnx_model
from gpuopt.errors import ModelError
from gpuopt.shapes import TensorSpec


def tensor(name: str, shape: Sequence[int | str | None], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: dict[str, Any] | None = None,
) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(np.asarray(v), n) for n, v in (constants or {}).items()]
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model: onnx.ModelProto, *arrays: Any) -> list[Any]:
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, arrays, strict=True)))


X = np.arange(6, dtype=np.float32).reshape(2, 3) - 2


# External data -----------------------------------------------------------------------------------


def with_external(folder: Path, location: str, length: int = 24) -> Path:
    model = model_of(
        [helper.make_node("Add", ["x", "w"], ["y"])], [tensor("x", [2, 3])], [tensor("y", [2, 3])], {"w": X}
    )
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        weight.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret").write_bytes(X.tobytes())
    (inner / "weights").write_bytes(X.tobytes())
    return inner


def test_external_data_beside_the_model_is_read(folder: Path) -> None:
    model = onnx_model.load_untrusted(with_external(folder, "weights"))
    assert np.array_equal(numpy_helper.to_array(model.graph.initializer[0]), X)


def test_external_data_that_leaves_the_folder_is_refused(folder: Path) -> None:
    (folder / "link").symlink_to(folder.parent / "secret")
    (folder / "below").symlink_to(folder.parent)
    secret = str(folder.parent / "secret")
    for location in (
        "../secret",
        secret,
        "link",
        "below/secret",
        "weights/../../secret",
        "",
        "weights\0x",
        "/dev/zero",
    ):
        with pytest.raises(ModelError, match="leaves the model's folder"):
            onnx_model.load_untrusted(with_external(folder, location))


@pytest.mark.parametrize("location", ["absent", ".", "below"])
def test_external_data_that_is_no_file_is_refused(folder: Path, location: str) -> None:
    (folder / "below").mkdir()
    with pytest.raises(ModelError, match="is missing"):
        onnx_model.load_untrusted(with_external(folder, location))


def test_external_data_cut_short_is_refused(folder: Path) -> None:
    path = with_external(folder, "weights")
    (folder / "weights").write_bytes(X.tobytes()[:-4])
    with pytest.raises(ModelError, match="external data"):
        onnx_model.load_untrusted(path)


def test_external_data_of_an_attribute_in_a_subgraph_is_refused_too(folder: Path) -> None:
    secret = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[6], data_location=TensorProto.EXTERNAL)
    secret.external_data.add(key="location", value="../secret")
    branch = helper.make_graph([helper.make_node("Constant", [], ["c"], value=secret)], "b", [], [tensor("c", [6])])
    node = helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=branch)
    model = model_of([node], [tensor("condition", [], TensorProto.BOOL)], [tensor("y", [6])])
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="leaves the model's folder"):
        onnx_model.load_untrusted(path)


@pytest.mark.parametrize("suffix", [".onnx", ".json", ".textproto", ".bin"])
def test_a_graph_is_read_by_content_whatever_its_suffix(tmp_path: Path, suffix: str) -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], [tensor("x", [2])], [tensor("y", [2])])
    path = tmp_path / f"m{suffix}"
    path.write_bytes(model.SerializeToString())
    assert onnx_model.load_untrusted(path) == model
    path.write_bytes(model.SerializeToString()[:-3])
    with pytest.raises(ModelError, match="not a whole ONNX file"):
        onnx_model.load_untrusted(path)


# Names -------------------------------------------------------------------------------------------


def test_names_are_given_in_order_and_inner_tensors_step_aside() -> None:
    model = model_of(
        [
            helper.make_node("Relu", ["a"], ["output"]),
            helper.make_node("Neg", ["output"], ["output_inner"]),
            helper.make_node("Add", ["output_inner", "b"], ["out"]),
        ],
        [tensor("a", [2, 3]), tensor("b", [2, 3])],
        [tensor("out", [2, 3])],
    )
    before = run(model, X, X + 1)
    onnx_model.rename_interface(model, ["x", "y"], ["output"])
    assert [v.name for v in model.graph.input] == ["x", "y"]
    assert [v.name for v in model.graph.output] == ["output"]
    assert np.array_equal(run(model, X, X + 1)[0], before[0])


def test_names_can_be_swapped() -> None:
    model = model_of(
        [helper.make_node("Sub", ["a", "b"], ["c"]), helper.make_node("Neg", ["c"], ["d"])],
        [tensor("a", [2, 3]), tensor("b", [2, 3])],
        [tensor("c", [2, 3]), tensor("d", [2, 3])],
    )
    before = run(model, X, X * 3)
    onnx_model.rename_interface(model, ["b", "a"], ["d", "c"])
    assert [v.name for v in [*model.graph.input, *model.graph.output]] == ["b", "a", "d", "c"]
    assert all(map(np.array_equal, run(model, X, X * 3), before))


def test_a_wanted_name_that_an_initializer_has_goes_to_the_input() -> None:
    model = model_of(
        [helper.make_node("Add", ["a", "x"], ["y"])], [tensor("a", [2, 3])], [tensor("y", [2, 3])], {"x": X}
    )
    onnx_model.rename_interface(model, ["x"], ["y"])
    assert np.array_equal(run(model, X)[0], 2 * X)


def branch_reading(name: str, operator: str) -> onnx.GraphProto:
    nodes = [
        helper.make_node(operator, [name], ["output_inner"]),
        helper.make_node("Identity", ["output_inner"], ["r"]),
    ]
    return helper.make_graph(nodes, operator, [], [tensor("r", [2, 3])])


def test_subgraphs_follow_a_renamed_outer_tensor() -> None:
    model = model_of(
        [
            helper.make_node("Abs", ["a"], ["output"]),
            helper.make_node(
                "If",
                ["condition"],
                ["out"],
                then_branch=branch_reading("output", "Neg"),
                else_branch=branch_reading("a", "Relu"),
            ),
        ],
        [tensor("a", [2, 3]), tensor("condition", [], TensorProto.BOOL)],
        [tensor("out", [2, 3])],
    )
    onnx_model.rename_interface(model, ["x", "flag"], ["output"])
    assert np.array_equal(run(model, X, np.array(True))[0], -np.abs(X))
    assert np.array_equal(run(model, X, np.array(False))[0], np.maximum(X, 0))


def test_loop_bodies_follow_a_renamed_outer_tensor() -> None:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["sum", "a"], ["x"]),
        ],
        "body",
        [tensor("i", [], TensorProto.INT64), tensor("go", [], TensorProto.BOOL), tensor("sum", [2, 3])],
        [tensor("go_on", [], TensorProto.BOOL), tensor("x", [2, 3])],
    )
    model = model_of(
        [helper.make_node("Loop", ["turns", "", "start"], ["total"], body=body)],
        [tensor("a", [2, 3])],
        [tensor("total", [2, 3])],
        {"turns": np.array(3, np.int64), "start": np.zeros((2, 3), np.float32)},
    )
    onnx_model.rename_interface(model, ["x"], ["sum"])
    assert np.array_equal(run(model, X)[0], 3 * X)


def test_an_input_passed_through_and_an_output_given_twice_get_tensors_of_their_own() -> None:
    model = model_of(
        [helper.make_node("Neg", ["a"], ["n"])],
        [tensor("a", [2, 3])],
        [tensor("a", [2, 3]), tensor("n", [2, 3]), tensor("n", [2, 3])],
    )
    onnx_model.rename_interface(model, ["x"], ["same", "first", "second"])
    assert [v.name for v in [*model.graph.input, *model.graph.output]] == ["x", "same", "first", "second"]
    assert all(map(np.array_equal, run(model, X), [X, -X, -X]))


def test_another_number_of_names_is_refused() -> None:
    model = model_of([helper.make_node("Neg", ["a"], ["n"])], [tensor("a", [1])], [tensor("n", [1])])
    with pytest.raises(ValueError, match="argument 2 is"):
        onnx_model.rename_interface(model, ["x", "y"], ["n"])


def test_dimensions_get_the_wanted_names_everywhere() -> None:
    model = model_of(
        [helper.make_node("Add", ["a", "b"], ["c"])],
        [tensor("a", ["s0", 3, "s1"]), tensor("b", [None, 3, "s1"])],
        [tensor("c", ["s0", 3, "s1"])],
    )
    wanted = [TensorSpec("a", "float32", ("batch", 3, "a_dim2")), TensorSpec("b", "float32", ("batch", 3, "b_dim2"))]
    onnx_model.name_dimensions(model, wanted)
    assert [spec.shape for spec in onnx_model.input_specs(model)] == [("batch", 3, "a_dim2")] * 2
    assert [spec.shape for spec in onnx_model.output_specs(model)] == [("batch", 3, "a_dim2")]
    assert onnx_model.static_axes(model, {"a": (0, 1), "b": (0,)}) == ["a[1]"]


def test_specs_leave_out_inputs_with_an_initializer_and_name_open_dimensions() -> None:
    model = model_of(
        [helper.make_node("Gather", ["w", "ids"], ["y"])],
        [tensor("w", [4, 3]), tensor("ids", ["n", None], TensorProto.INT64)],
        [tensor("y", ["n", None, 3])],
        {"w": np.zeros((4, 3), np.float32)},
    )
    assert onnx_model.input_specs(model) == [TensorSpec("ids", "int64", ("n", "dim1"))]
    assert onnx_model.output_specs(model) == [TensorSpec("y", "float32", ("n", "dim1", 3))]
    assert onnx_model.opset(model) == 18


@given(st.lists(st.sampled_from(["", "a", "a_1", "a_2", "a_2_1", "Relu_1", "Relu"]), max_size=8))
def test_node_names_become_unique_and_good_ones_stay(names: list[str]) -> None:
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"], name=name) for i, name in enumerate(names)]
    model = model_of(nodes, [tensor("t0", [1])], [tensor(f"t{len(names)}", [1])])
    onnx_model.node_names_made_unique(model)
    made = [node.name for node in model.graph.node]
    assert all(made)
    assert len(set(made)) == len(made)
    if len(set(names)) == len(names) and all(names):
        assert made == names


# Order, files, types -----------------------------------------------------------------------------


@given(st.permutations(range(6)))
def test_any_order_of_nodes_is_sorted_into_one_that_runs(order: list[int]) -> None:
    inner = helper.make_graph([helper.make_node("Add", ["t3", "w"], ["r"])], "b", [], [tensor("r", [2, 3])])
    nodes = [
        helper.make_node("Neg", ["x"], ["t0"]),
        helper.make_node("Abs", ["t0"], ["t1"]),
        helper.make_node("Add", ["t0", "t1"], ["t2"]),
        helper.make_node("Mul", ["t2", "w"], ["t3"]),
        # Its branches read t3 from outside: an edge that its own inputs do not show.
        helper.make_node("If", ["yes"], ["t4"], then_branch=inner, else_branch=inner),
        helper.make_node("Sub", ["t4", "t1"], ["y"]),
    ]
    constants = {"w": np.full((2, 3), 2, np.float32), "yes": np.array(True)}
    model = model_of([nodes[i] for i in order], [tensor("x", [2, 3])], [tensor("y", [2, 3])], constants)
    ordered = onnx_model.sort_topologically(model)
    expected = (-X + np.abs(X)) * 2 + 2 - np.abs(X)
    assert np.array_equal(run(ordered, X)[0], expected)


def test_a_sorted_graph_keeps_its_order() -> None:
    names = [["x"], ["t0"], ["x"], ["t2"], ["t1"]]
    nodes = [helper.make_node("Relu", read, [f"t{i}"]) for i, read in enumerate(names)]
    model = model_of(nodes, [tensor("x", [1])], [tensor("t3", [1]), tensor("t4", [1])])
    assert list(onnx_model.sort_topologically(model).graph.node) == nodes


def test_a_cycle_is_refused() -> None:
    nodes = [helper.make_node("Relu", ["b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    with pytest.raises(ValueError, match="cycle"):
        onnx_model.sort_topologically(model_of(nodes, [], [tensor("a", [1])]))


def test_saving_caps_the_ir_version_and_load_reads_it_back(tmp_path: Path) -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], [tensor("x", [2])], [tensor("y", [2])])
    model.ir_version = onnx_model.IR_VERSION + 1
    path = onnx_model.save(model, tmp_path / "new" / "folder")
    onnx_model.check(path)
    loaded = onnx_model.load(path.parent)
    assert loaded.ir_version == onnx_model.IR_VERSION
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]


def test_types_are_inferred_and_float_tensors_known() -> None:
    model = model_of(
        [
            helper.make_node("Relu", ["x"], ["r"]),
            helper.make_node("Shape", ["r"], ["s"]),
            helper.make_node("Add", ["r", "w"], ["y"]),
        ],
        [tensor("x", [2, 3])],
        [tensor("y", [2, 3]), tensor("s", [2], TensorProto.INT64)],
        {"w": X},
    )
    assert onnx_model.float_tensors(model) == {"x", "y"}
    assert onnx_model.float_tensors(onnx_model.with_types(model)) == {"x", "r", "y"}


def test_names_that_are_read_include_those_of_subgraphs_and_outputs() -> None:
    inner = helper.make_graph([helper.make_node("Neg", ["deep"], ["r"])], "b", [], [tensor("r", [2, 3])])
    model = model_of(
        [helper.make_node("If", ["yes"], ["y"], then_branch=inner, else_branch=inner)],
        [],
        [tensor("y", [2, 3])],
        {"yes": np.array(True), "deep": X, "unused": X},
    )
    assert onnx_model.tensors_used(model.graph) == {"yes", "deep", "r", "y"}


def test_an_initializer_that_is_dropped_is_no_input_either() -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "kept", "dropped", "y")]
    tensors = [numpy_helper.from_array(np.ones(2, np.float32), name) for name in ("kept", "dropped")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "kept"], ["y"])], "g", values[:3], values[3:], tensors)
    onnx_model.drop_unused_initializers(graph)
    assert [value.name for value in graph.input] == ["x", "kept"]
    assert [tensor.name for tensor in graph.initializer] == ["kept"]


def test_scales_and_sizes_of_any_dtype_state_shapes() -> None:
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
    scales = numpy_helper.from_array(np.array([1, 1, 2, 3], np.float32), "scales")
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], name="up")
    model = helper.make_model(helper.make_graph([node], "g", value[:1], value[1:], [scales]))
    assert onnx_model.concrete_shapes(model, {"x": (1, 8, 4, 5)})["y"] == (1, 8, 8, 15)


@pytest.mark.parametrize(
    ("opset", "left"),
    [(17, ["given", "kept", "negative", "shared"]), (10, ["given", "kept", "negative", "shared", "zero"])],
)
def test_biases_of_zeros_are_dropped_where_they_are_optional(opset: int, left: list[str]) -> None:
    def constant(name: str, *values: float) -> onnx.TensorProto:
        return numpy_helper.from_array(np.array(values, np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w", "zero"], ["a"]),
        helper.make_node("Conv", ["a", "w", "kept"], ["b"]),
        helper.make_node("Conv", ["b", "w", "shared"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Add", ["d", "shared"], ["e"]),
        helper.make_node("Gemm", ["e", "g", "zero"], ["h"]),
        helper.make_node("Reshape", ["h", "shape"], ["i"]),
        helper.make_node("ConvTranspose", ["i", "w", "zero"], ["j"]),
        helper.make_node("ConvTranspose", ["j", "w", "negative"], ["k"]),
        helper.make_node("Conv", ["k", "w", "given"], ["y"]),
    ]
    weights = [
        numpy_helper.from_array(np.ones((2, 2, 1, 1), np.float32), "w"),
        numpy_helper.from_array(np.ones((2, 2), np.float32), "g"),
        constant("zero", 0, -0.0), constant("kept", 0, 1), constant("shared", 0, 0), constant("negative", 0, -1),
        constant("given", 0, 0), numpy_helper.from_array(np.array([1, 2, 1, 1], np.int64), "shape"),
    ]  # fmt: skip
    x, given, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [1, 2, 1, 1]), ("given", [2]), ("y", [1, 2, 1, 1]))
    )
    made = helper.make_graph(nodes, "biases", [x, given], [y], weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    value = np.array([1, -2], np.float32).reshape(1, 2, 1, 1)
    before = ort.InferenceSession(model.SerializeToString()).run(None, {"x": value})
    onnx_model.zero_biases_dropped(model)
    assert np.array_equal(before, ort.InferenceSession(model.SerializeToString()).run(None, {"x": value}))
    assert [len(n.input) for n in model.graph.node if "Conv" in n.op_type] == [2, 3, 2, 2, 3, 3]
    assert sorted(t.name for t in model.graph.initializer if t.name not in ("w", "g", "shape")) == left


def test_an_operator_of_a_domain_of_its_own_keeps_its_zeros() -> None:
    zero = numpy_helper.from_array(np.zeros(2, np.float32), "zero")
    x, y = (tensor(name, [1, 2, 1, 1]) for name in "xy")
    model = helper.make_model(
        helper.make_graph([helper.make_node("Conv", ["x", "x", "zero"], ["y"], domain="mine")], "one", [x], [y], [zero])
    )
    onnx_model.zero_biases_dropped(model)
    assert list(model.graph.node[0].input) == ["x", "x", "zero"]


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize(
    ("axes", "keeps", "rank", "kinds"),
    [
        ((2, 3), 1, 4, ["GlobalAveragePool"]),
        ((-1, -2), 1, 4, ["GlobalAveragePool"]),
        ((-1, 2), 0, 4, ["GlobalAveragePool", "Squeeze"]),
        ((2, 3, 4), 0, 5, ["GlobalAveragePool", "Squeeze"]),
        ((2,), 1, 4, ["ReduceMean"]),
        ((1, 2), 0, 4, ["ReduceMean"]),
        ((1, 2, 3), 1, 4, ["ReduceMean"]),
        ((2, 3), 1, 5, ["ReduceMean"]),
        ((2,), 1, 3, ["ReduceMean"]),
        ((), 1, 4, ["ReduceMean"]),
    ],
)
def test_a_mean_over_all_places_is_a_global_average_pool(
    axes: tuple[int, ...], keeps: int, rank: int, kinds: list[str], opset: int
) -> None:
    value = np.random.default_rng(0).standard_normal((2, 3, 4, 5, 6)[:rank]).astype(np.float32)
    as_input = opset >= 18
    inputs = ["x", "axes"] if as_input else ["x"]
    told = {} if as_input or not axes else {"axes": axes}
    node = helper.make_node("ReduceMean", inputs, ["y"], "mean", keepdims=keeps, **told)
    node.metadata_props.add(key="module", value="pool")
    constants = [numpy_helper.from_array(np.array(axes, np.int64), "axes")] if as_input else []
    made = helper.make_graph([node], "g", [tensor("x", value.shape)], [tensor("y", None)], constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    before = ort.InferenceSession(model.SerializeToString()).run(None, {"x": value})[0]
    onnx_model.spatial_means_pooled(model)
    after = ort.InferenceSession(model.SerializeToString()).run(None, {"x": value})[0]
    assert after.shape == before.shape
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    assert [n.op_type for n in model.graph.node] == kinds
    assert model.graph.node[0].metadata_props[0].value == "pool"
    assert ("axes" in {t.name for t in model.graph.initializer}) == (as_input and kinds == ["ReduceMean"])


def test_a_mean_of_other_types_or_of_another_domain_stays() -> None:
    constants = {"axes": np.array([2, 3], np.int64)}
    others = [
        model_of(
            [helper.make_node("ReduceMean", ["x", "axes"], ["y"])],
            [tensor("x", [1, 2, 3, 4], kind)], [tensor("y", None, kind)], constants,
        )
        for kind in (TensorProto.INT32, TensorProto.DOUBLE)
    ]  # fmt: skip
    foreign = model_of(
        [helper.make_node("ReduceMean", ["x", "axes"], ["y"], domain="mine")],
        [tensor("x", [1, 2, 3, 4])], [tensor("y", None)], constants,
    )  # fmt: skip
    for model in (*others, foreign):
        onnx_model.spatial_means_pooled(model)
        assert [(n.op_type, len(n.input)) for n in model.graph.node] == [("ReduceMean", 2)]
