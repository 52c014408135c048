"""Rewritten operators give the same numbers, in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from gpuopt import lowering, onnx_model


def run(model: onnx.ModelProto, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    return np.asarray(found)


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    return made


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


def dft(
    shape: list[int | str], opset: int = 20, axis: int | None = None, length: int | None = None, **attributes: int
) -> onnx.ModelProto:
    inputs, values = ["positive"], []
    for name, value in (("length", length), ("axis", axis if opset >= 20 else None)):
        inputs.append(name if value is not None else "")
        if value is not None:
            values.append(numpy_helper.from_array(np.array(value, np.int64), name))
    while not inputs[-1]:
        inputs.pop()
    if opset < 20 and axis is not None:
        attributes["axis"] = axis
    graph = helper.make_graph(
        [
            helper.make_node("Abs", ["x"], ["positive"], name="abs"),
            helper.make_node("DFT", inputs, ["y"], name="transform", **attributes),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        values,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def evaluated(model: onnx.ModelProto, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    (found,) = ReferenceEvaluator(model).run(None, {"x": x})
    return np.asarray(found)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("opset", "axis", "settings"),
    [
        (20, None, {}),
        (20, 1, {}),
        (20, -3, {"length": 5}),
        (20, None, {"length": 12}),
        (20, None, {"inverse": 1}),
        (20, 1, {"inverse": 1, "length": 9}),
        (17, None, {}),
        (17, 2, {"inverse": 1}),
    ],
)
def test_a_fourier_transform_becomes_a_matrix_product(
    opset: int, axis: int | None, settings: dict[str, int], parts: int
) -> None:
    model = dft(["batch", 7, 8, parts], opset, axis, **settings)
    x = np.random.default_rng(0).standard_normal((2, 7, 8, parts)).astype(np.float32)
    made = lowering.lowered(copied(model))
    onnx_model.node_names_made_unique(made)
    onnx.checker.check_model(made, full_check=True)
    assert "DFT" not in {node.op_type for node in made.graph.node}
    wanted = evaluated(model, x)
    found = run(made, x)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [None, 6, 10, 13])
def test_one_side_of_the_spectrum_and_back(length: int | None) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 10, 1)).astype(np.float32)
    forward = dft(["batch", 3, 10, 1], length=length, onesided=1)
    made = lowering.lowered(copied(forward))
    np.testing.assert_allclose(run(made, x), evaluated(forward, x), rtol=1e-5, atol=1e-5)
    complex_x = np.random.default_rng(0).standard_normal((2, 3, 6, 2)).astype(np.float32)
    back = dft(["batch", 3, 6, 2], length=length, onesided=1, inverse=1)
    made = lowering.lowered(copied(back))
    wanted = np.fft.irfft(np.abs(complex_x[..., 0]) + 1j * np.abs(complex_x[..., 1]), length)[..., None]
    np.testing.assert_allclose(run(made, complex_x), wanted, rtol=1e-5, atol=1e-5)


def test_new_names_are_new_and_an_output_between_two_transforms_is_known() -> None:
    model = dft(["batch", 7, 8, 2])
    model.graph.node[1].output[0] = "between"
    model.graph.node[1].name = model.graph.node[0].name = "t"
    model.graph.node.append(helper.make_node("DFT", ["between", "", "axis"], ["y"], name="t"))
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.array([1]), "axis"), numpy_helper.from_array(np.ones(3, np.float32), "t/matrix")]
    )
    del model.graph.output[:]
    for name in ("y", "between"):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 7, 8, 2]))
    x = np.random.default_rng(0).standard_normal((2, 7, 8, 2)).astype(np.float32)
    made = lowering.lowered(copied(model))
    onnx_model.node_names_made_unique(made)
    onnx.checker.check_model(made, full_check=True)
    assert "DFT" not in {node.op_type for node in made.graph.node}
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    spectrum = np.fft.fft(np.abs(x[..., 0]) + 1j * np.abs(x[..., 1]), axis=2)
    both = np.fft.fft(spectrum, axis=1)
    found = dict(zip(["y", "between"], session.run(["y", "between"], {"x": x}), strict=True))
    for name, wanted in (("y", both), ("between", spectrum)):
        np.testing.assert_allclose(found[name], np.stack([wanted.real, wanted.imag], -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [-1, 3, 7])
def test_a_transform_of_no_signal_axis_is_left(axis: int) -> None:
    made = lowering.lowered(dft(["batch", 7, 8, 2], axis=axis))
    assert "DFT" in {node.op_type for node in made.graph.node}


@pytest.mark.parametrize("shape", [["batch", "open", 1], ["batch", 8192, 2], ["batch", 8, "parts"]])
def test_a_transform_of_open_or_great_length_is_left(shape: list[int | str]) -> None:
    made = lowering.lowered(dft(shape))
    assert [node.op_type for node in made.graph.node] == ["Abs", "DFT"]


def test_a_model_without_such_operators_is_itself() -> None:
    model = col2im(9, [6, 6], [2, 2], strides=[2, 2])
    del model.graph.node[1]
    assert lowering.lowered(model) is model
