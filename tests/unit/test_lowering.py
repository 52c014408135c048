"""Rewritten operators give the same numbers, in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from gpuopt import lowering, onnx_model


def run(model: onnx.ModelProto, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    return np.asarray(found)


def col2im(
    blocks: int, image: list[int], block: list[int], channels: int = 3, constant: bool = True, **attributes: Any
) -> onnx.ModelProto:
    places = channels * int(np.prod(block))
    sizes = {"image": np.array(image, np.int64), "block": np.array(block, np.int64)}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", places, blocks])]
    nodes = [
        helper.make_node("Relu", ["x"], ["positive"], name="relu"),
        helper.make_node("Col2Im", ["positive", "image", "block"], ["y"], name="fold", **attributes),
    ]
    if not constant:
        nodes[:0] = [helper.make_node("Mul", [f"{name}0", "one"], [name]) for name in sizes]
        sizes = {f"{name}0": value for name, value in sizes.items()} | {"one": np.array(1, np.int64)}
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", channels, *image])],
        [numpy_helper.from_array(value, name) for name, value in sizes.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("image", "block", "settings"),
    [
        ([6, 6], [2, 2], {"strides": [2, 2]}),
        ([7, 9], [3, 3], {}),
        ([8, 8], [3, 3], {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        # A row and a column are left over.
        ([8, 9], [3, 2], {"strides": [3, 2], "pads": [0, 1, 1, 0]}),
        ([10, 10], [3, 3], {"dilations": [2, 2], "strides": [1, 2]}),
    ],
)
def test_col2im_becomes_a_transposed_convolution(image: list[int], block: list[int], settings: dict[str, Any]) -> None:
    pads = settings.get("pads", [0, 0, 0, 0])
    counts = [
        (image[a] + pads[a] + pads[a + 2] - settings.get("dilations", [1, 1])[a] * (block[a] - 1) - 1)
        // settings.get("strides", [1, 1])[a]
        + 1
        for a in (0, 1)
    ]
    model = col2im(int(np.prod(counts)), image, block, **settings)
    x = np.random.default_rng(0).standard_normal((2, 3 * int(np.prod(block)), int(np.prod(counts)))).astype(np.float32)
    made = lowering.lowered(model)
    assert [node.op_type for node in made.graph.node] == ["Relu", "Reshape", "ConvTranspose"]
    onnx_model.node_names_made_unique(made)
    onnx.checker.check_model(made, full_check=True)
    np.testing.assert_allclose(run(made, x), run(model, x), rtol=1e-6, atol=1e-6)


def test_sizes_that_nodes_give_are_constant_too() -> None:
    model = col2im(9, [6, 6], [2, 2], strides=[2, 2])
    sizes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer]
    nodes = [*sizes, *model.graph.node]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    made = lowering.lowered(model)
    assert [node.op_type for node in made.graph.node if node.op_type != "Constant"] == [
        "Relu",
        "Reshape",
        "ConvTranspose",
    ]
    x = np.random.default_rng(0).standard_normal((2, 12, 9)).astype(np.float32)
    np.testing.assert_allclose(run(made, x), run(model, x), rtol=1e-6, atol=1e-6)


def test_what_has_no_constant_sizes_or_one_axis_is_left() -> None:
    for model in (col2im(9, [6, 6], [2, 2], constant=False, strides=[2, 2]), col2im(4, [6], [3])):
        assert "Col2Im" in {node.op_type for node in lowering.lowered(model).graph.node}


def test_a_model_without_such_operators_is_itself() -> None:
    model = col2im(9, [6, 6], [2, 2], strides=[2, 2])
    del model.graph.node[1]
    assert lowering.lowered(model) is model
