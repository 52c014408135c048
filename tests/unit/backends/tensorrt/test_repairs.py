"""Nodes that go back to FP32: which ones a builder means, and that the graph still computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gpuopt import onnx_model
from gpuopt.backends.tensorrt import repairs
from gpuopt.backends.tensorrt.builder import BuiltEngine, build
from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.progress import Silent
from gpuopt.shapes import ShapeRange
from tests.unit.quantization.graphs import depthwise_block, normal, run
from tests.unit.stages.test_cast import cast_to_fp16, quantized

PROFILES = ({"x": ShapeRange((1, 16, 8, 8), (2, 16, 8, 8), (4, 16, 8, 8))},)


def fp16_int8(folder: Path) -> onnx.ModelProto:
    """Q/DQ and FP16 tensors, as engines are built from."""
    model, _ = cast_to_fp16(quantized(20), folder)
    return model


def engine(model: onnx.ModelProto, folder: Path, options: BuildOptions | None = None) -> BuiltEngine:
    pytest.importorskip("tensorrt_rtx")
    path = onnx_model.save(model, folder)
    return build("tensorrt-rtx", path, PROFILES, options or BuildOptions(), Silent())


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx_model.with_types(model).graph
    known = {v.name: v.type.tensor_type.elem_type for v in [*graph.value_info, *graph.input, *graph.output]}
    return known | {tensor.name: tensor.data_type for tensor in graph.initializer}


def computing(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type in ("Conv", "Relu", "Add", "MatMul", "Clip", "Gemm")]


def test_each_node_of_a_quantized_fp16_graph_can_go_back(tmp_path: Path) -> None:
    model = fp16_int8(tmp_path)
    x = normal(np.random.default_rng(0), 2, 16, 8, 8)
    before = run(model, x)[0]
    assert computing(model)
    for node in computing(model):
        repair = repairs.with_nodes_in_fp32(model, node.name)
        assert repair is not None
        assert repair.nodes == (node.name,)
        onnx.checker.check_model(repair.model, full_check=True)
        types = types_of(repair.model)
        changed = next(n for n in repair.model.graph.node if n.name == node.name)
        assert {types[name] for name in [*changed.input, *changed.output] if name} == {TensorProto.FLOAT}
        producers = {name: n.op_type for n in repair.model.graph.node for name in n.output}
        assert all(producers.get(name) != "DequantizeLinear" for name in changed.input)
        after = run(repair.model, x)[0]
        assert np.sum((after - before) ** 2) < 1e-2 * np.sum(before**2)
        assert repairs.with_nodes_in_fp32(repair.model, node.name) is None, "it is in FP32 already"


def test_a_repaired_graph_builds(tmp_path: Path) -> None:
    model = fp16_int8(tmp_path)
    repair = repairs.with_nodes_in_fp32(model, " + ".join(node.name for node in computing(model)))
    assert repair is not None
    assert not any(node.op_type == "QuantizeLinear" for node in repair.model.graph.node)
    built = engine(repair.model, tmp_path / "repaired")
    assert built.plan
    assert not built.repairs


def test_int8_weights_without_q_are_dequantized_by_hand(tmp_path: Path) -> None:
    from gpuopt.quantization import qdq

    model = quantized(20)
    qdq.fold_weights(model)
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    repair = repairs.with_nodes_in_fp32(model, node.name)
    assert repair is not None
    x = normal(np.random.default_rng(1), 2, 16, 8, 8)
    before, after = run(model, x)[0], run(repair.model, x)[0]
    assert np.sum((after - before) ** 2) < 1e-2 * np.sum(before**2)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("a", ["a"]),
        ("a + b", ["a", "b"]),
        ("a + PWN(b)", ["a", "b"]),
        ("{ForeignNode[a...c]}", ["a", "b", "c"]),
        ("{ForeignNode[w...b]}", ["a", "b"]),
        ("{ForeignNode[b...d + (Unnamed Layer* 9) [Shuffle]]}", ["b", "c", "d"]),
        ("stageslice", ["stage"]),
        ("(Unnamed Layer* 146) [Shuffle]", []),
        ("unknown", []),
    ],
)
def test_the_nodes_that_a_builder_means(words: str, found: list[str]) -> None:
    names = {"a": ("x", "w"), "b": ("t_a",), "c": ("t_b",), "d": ("t_c",), "stage": ("x",)}
    nodes = [helper.make_node("Sum", list(inputs), [f"t_{name}"], name) for name, inputs in names.items()]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "t_d", "t_stage")]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    assert repairs.nodes_named(words, helper.make_model(graph)) == found


def test_the_workspace_halves_down_to_a_limit() -> None:
    assert repairs.smaller_workspace(1 << 30, None) == 1 << 29
    assert repairs.smaller_workspace(None, 1 << 30) == 1 << 29
    assert repairs.smaller_workspace(1 << 34, 1 << 30) == 1 << 29
    assert repairs.smaller_workspace(repairs.SMALLEST_WORKSPACE, 1 << 40) is None
    assert repairs.smaller_workspace(None, None) is None


def test_inputs_and_outputs_take_other_dtypes(tmp_path: Path) -> None:
    model = depthwise_block(decades=0.5)
    (output,) = [value.name for value in model.graph.output]
    changed = repairs.with_io_dtypes(model, [("x", "fp16"), (output, "fp16"), ("nothing", "fp16")])
    onnx.checker.check_model(changed, full_check=True)
    x = normal(np.random.default_rng(0), 2, 16, 8, 8)
    want, got = run(model, x)[0], run(changed, x.astype(np.float16))[0]
    assert got.dtype == np.float16
    assert np.allclose(got.astype(np.float32), want, atol=0.02 * np.abs(want).max())
    formats = (("x", "fp16:hwc8"), (output, "fp16:chw"))
    built = engine(model, tmp_path, BuildOptions(io_formats=formats))
    assert built.io_dtypes == {"x": "float16", output: "float16"}
    assert built.applied["io_formats"] == dict(formats)
