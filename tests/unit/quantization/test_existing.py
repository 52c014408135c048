"""Graphs with Q/DQ of their own: repaired where the numbers stay the same, refused by name where TensorRT would."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from gpuopt.errors import QuantizationError
from gpuopt.model_file import ModelKind
from gpuopt.quantization import existing, qdq

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(0)
CODES = RANDOM.integers(-127, 128, (32, 16, 3, 3))
X = RANDOM.standard_normal((2, 16, 8, 8)).astype(np.float32)


@dataclass
class Graph:
    """A convolution with Q/DQ on both operands, every part of which can be another."""

    activation_type: Any = np.int8
    activation_zero: Any = 0
    activation_scale: Any = 0.03
    dq_scale: Any = None
    weight_type: Any = np.int8
    weight_zero: Any = 0
    weight_scale: Any = None
    weight_axis: int = 0
    folded: bool = True
    bias: str = "float"
    opset: int = 20

    def model(self, *more: onnx.NodeProto, output: str = "y", **attributes: Any) -> onnx.ModelProto:
        scale = self.weight_scale
        if scale is None:
            scale = RANDOM.uniform(0.001, 0.01, 32).astype(np.float32)
        scale = np.asarray(scale)
        values: dict[str, Array] = {
            "xs": np.asarray(self.activation_scale, np.float32),
            "xz": np.full(np.shape(self.activation_scale), self.activation_zero, self.activation_type),
            "ws": scale,
            "wz": np.full(scale.shape, self.weight_zero, self.weight_type),
        }
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], name="Qx", **attributes),
            helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], name="DQx", **attributes),
        ]
        if self.dq_scale is not None:
            values["ds"] = np.asarray(self.dq_scale)
            nodes[1].input[1] = "ds"
        codes = CODES + np.int64(self.weight_zero)
        if self.folded:
            values["wq"] = codes.astype(self.weight_type)
        else:
            spread = scale.reshape(-1, 1, 1, 1) if scale.ndim else scale
            values["w"] = (CODES * spread).astype(np.float32)
            nodes.append(
                helper.make_node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], name="Qw", axis=self.weight_axis)
            )
        nodes.append(
            helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], name="DQw", axis=self.weight_axis)
        )
        if self.bias == "int32":
            values["bq"] = RANDOM.integers(-(1 << 20), 1 << 20, 32).astype(np.int32)
            values["bs"] = (scale * np.float32(0.03) * np.ones(32, np.float32)).astype(np.float32)
            values["bz"] = np.zeros(32, np.int32)
            nodes.append(helper.make_node("DequantizeLinear", ["bq", "bs", "bz"], ["b"], name="DQb", axis=0))
        else:
            values["b"] = RANDOM.standard_normal(32).astype(np.float32)
        nodes.append(helper.make_node("Conv", ["xd", "wd", "b"], ["y"], name="conv", pads=[1, 1, 1, 1]))
        nodes.extend(more)
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16, 8, 8])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", 32, 8, 8])],
            [numpy_helper.from_array(value, name) for name, value in values.items()],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        return onnx.shape_inference.infer_shapes(made)


def run(model: onnx.ModelProto) -> Array:
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {"x": X})[0]
    return result


def operators(model: onnx.ModelProto) -> list[str]:
    return sorted(node.op_type for node in model.graph.node)


@pytest.mark.parametrize(
    ("graph", "repaired"),
    [
        (Graph(), []),
        (Graph(folded=False), []),
        (Graph(weight_scale=np.float32(0.01)), []),
        (Graph(weight_scale=np.float32([0.01]), activation_scale=np.float32([0.03])), []),
        (Graph(activation_type=np.uint8, activation_zero=128), ["UINT8 with the zero point 128 became INT8"]),
        (Graph(weight_type=np.uint8, weight_zero=128), ["UINT8 with the zero point 128 became INT8"]),
        (Graph(weight_type=np.uint8, weight_zero=128, folded=False), ["UINT8 with the zero point 128 became INT8"]),
        (Graph(bias="int32"), ["INT32 behind DQ became floating point: bq"]),
        (
            Graph(bias="int32", activation_type=np.uint8, activation_zero=128),
            ["UINT8 with the zero point 128 became INT8", "INT32 behind DQ became floating point: bq"],
        ),
    ],
)
def test_repairs_leave_every_number_as_it_was(graph: Graph, repaired: list[str]) -> None:
    model = graph.model()
    before = model.SerializeToString()
    wanted = run(model)
    adopted = existing.adopt(model, fp16=False)
    assert model.SerializeToString() == before
    graphs = qdq.finished(adopted.model, True, False)
    assert graphs.engine is not None
    assert run(graphs.engine).tobytes() == wanted.tobytes()
    assert run(graphs.runtime).tobytes() == wanted.tobytes()
    assert len(adopted.repaired) == len(repaired)
    assert all(any(line.startswith(start) for line in adopted.repaired) for start in repaired)
    # Whichever way the weights came: floating point behind Q and DQ for the engine, INT8 behind DQ for the runtime.
    assert operators(graphs.engine) == ["Conv", *["DequantizeLinear"] * 2, *["QuantizeLinear"] * 2]
    assert operators(graphs.runtime) == ["Conv", *["DequantizeLinear"] * 2, "QuantizeLinear"]
    weights = {t.name: t.data_type for t in graphs.runtime.graph.initializer if len(t.dims) == 4}
    assert set(weights.values()) == {TensorProto.INT8}
    assert TensorProto.UINT8 not in {t.data_type for t in graphs.engine.graph.initializer}
    for node in graphs.engine.graph.node:
        assert len(node.input) == 3
    assert adopted.pairs == 2
    assert [(d.node, d.quantized) for d in adopted.decisions] == [("conv", True)]


def test_a_type_that_is_stated_without_a_zero_point_gets_one() -> None:
    model = Graph(opset=21).model()
    quantize, dequantize = model.graph.node[:2]
    wanted = run(model)
    del quantize.input[2:]
    del dequantize.input[2:]
    quantize.attribute.append(helper.make_attribute("output_dtype", TensorProto.INT8))
    adopted = existing.adopt(model, fp16=False)
    assert all(len(n.input) == 3 for n in adopted.model.graph.node if n.op_type != "Conv")
    assert np.array_equal(run(adopted.model), wanted)


def test_scales_that_reach_q_and_dq_through_constant_nodes_are_found() -> None:
    model = Graph().model()
    (scale,) = [tensor for tensor in model.graph.initializer if tensor.name == "xs"]
    model.graph.initializer.remove(scale)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["given"], name="k", value=scale))
    model.graph.node.insert(1, helper.make_node("Identity", ["given"], ["xs"], name="i"))
    wanted = run(model)
    adopted = existing.adopt(model, fp16=True)
    assert run(adopted.model).tobytes() == wanted.tobytes()


def test_biases_of_an_fp16_model_stay_finite() -> None:
    """Integers above FP16's largest number, 65504, whose product with the scale is small."""
    values = {
        "xs": np.float16(0.02), "z": np.int8(0), "wq": CODES[:16, :, 0, 0].astype(np.int8), "ws": np.float16(0.01),
        "bq": np.full(16, 100_000, np.int32), "bs": np.float16(0.0002),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "z"], ["xq"], name="Qx"),
        helper.make_node("DequantizeLinear", ["xq", "xs", "z"], ["xd"], name="DQx"),
        helper.make_node("DequantizeLinear", ["wq", "ws", "z"], ["wd"], name="DQw"),
        helper.make_node("DequantizeLinear", ["bq", "bs"], ["b"], name="DQb"),
        helper.make_node("Gemm", ["xd", "wd", "b"], ["y"], name="gemm"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, 16]) for name in "xy"]
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    adopted = existing.adopt(model, fp16=True)
    (bias,) = [numpy_helper.to_array(t) for t in adopted.model.graph.initializer if t.name == "b"]
    assert bias.dtype == np.float16
    assert bias.tolist() == pytest.approx([20] * 16, rel=1e-3)


def test_weights_keep_their_codes_when_scales_are_rounded_for_fp16() -> None:
    model = Graph().model()
    graphs = qdq.finished(existing.adopt(model, fp16=True).model, True, True)
    assert graphs.scales_rounded == 2
    (codes,) = [numpy_helper.to_array(t) for t in graphs.runtime.graph.initializer if len(t.dims) == 4]
    assert np.array_equal(codes, CODES)


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (Graph(activation_type=np.uint8), "QuantizeLinear 'Qx': asymmetric: UINT8 with the zero point 0"),
        (Graph(activation_zero=3), "QuantizeLinear 'Qx': asymmetric: INT8 with the zero point 3"),
        (Graph(activation_type=np.uint8, activation_zero=127), "asymmetric: UINT8 with the zero point 127"),
        (Graph(weight_zero=-5, weight_scale=np.float32(0.1)), "DequantizeLinear 'DQw': asymmetric: INT8 with"),
        (Graph(activation_type=np.int16, opset=21), "QuantizeLinear 'Qx': it is of the type INT16, not INT8"),
        (Graph(activation_type=ml_dtypes.float8_e4m3fn), "it is of the type FLOAT8E4M3FN, not INT8"),
        (
            Graph(weight_type=np.int32, weight_scale=np.float32(0.1), folded=True, opset=21),
            None,
        ),
        (
            Graph(activation_scale=np.full(16, 0.1, np.float32)),
            "QuantizeLinear 'Qx': an activation with 16 scales, where TensorRT takes one",
        ),
        (Graph(activation_scale=np.float32(0)), "QuantizeLinear 'Qx': a scale is zero, negative or not finite"),
        (Graph(activation_scale=np.float32(np.inf)), "a scale is zero, negative or not finite"),
        (Graph(activation_scale=np.float32(1e6)), "a scale is too large for FP16; --set cast.remainder=fp32"),
        (Graph(dq_scale=np.float32(0.04)), "DequantizeLinear 'DQx': its scale or zero point is another than that"),
        (
            Graph(weight_axis=1, weight_scale=np.full(16, 0.1, np.float32)),
            "DequantizeLinear 'DQw': a scale for each index of axis 1, not the output channels of 'conv'",
        ),
    ],
)
def test_what_tensorrt_refuses_is_refused_by_name(graph: Graph, said: str | None) -> None:
    if said is None:
        # INT32 weights become floating point: then only the activation is quantized, which is a warning.
        adopted = existing.adopt(graph.model(), fp16=True)
        assert adopted.warnings == ("half quantized: only one operand has Q/DQ, so it runs in floating point: conv",)
        assert adopted.decisions[0].reason == "the model does not quantize its weight 'wd'"
        return
    with pytest.raises(QuantizationError) as caught:
        existing.adopt(graph.model(), fp16=True)
    assert said in caught.value.message
    assert caught.value.message.startswith("the model's own Q/DQ do not fit TensorRT: ")
    assert len(caught.value.lines().splitlines()) <= 3


def test_more_than_one_problem_is_counted() -> None:
    with pytest.raises(QuantizationError, match=r"'Qx': asymmetric.*\(and 1 more\)$"):
        existing.adopt(Graph(activation_zero=3, weight_zero=4, weight_scale=np.float32(0.1)).model(), fp16=True)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ([helper.make_node("QuantizeLinear", ["y", "xs", "xz"], ["lone"], name="Qy")], "'Qy': no DQ behind it"),
        (
            [
                helper.make_node("QuantizeLinear", ["y", "xs", "xz"], ["yq"], name="Qy"),
                helper.make_node("MaxPool", ["yq"], ["z"], name="pool", kernel_shape=[1, 1]),
            ],
            "QuantizeLinear 'Qy': MaxPool 'pool' reads it, where only a DQ may",
        ),
        (
            [
                helper.make_node("ReduceMax", ["y"], ["amax"], name="max", keepdims=0),
                helper.make_node("QuantizeLinear", ["y", "amax", "xz"], ["yq"], name="Qy"),
                helper.make_node("DequantizeLinear", ["yq", "amax", "xz"], ["z"], name="DQy"),
            ],
            "QuantizeLinear 'Qy': its scale is computed, not a constant",
        ),
        (
            [
                helper.make_node("Cast", ["y"], ["codes"], name="cast", to=TensorProto.INT8),
                helper.make_node("DequantizeLinear", ["codes", "xs", "xz"], ["z"], name="DQy"),
            ],
            "DequantizeLinear 'DQy': 'codes' is neither a constant nor behind a Q",
        ),
        (
            [helper.make_node("DynamicQuantizeLinear", ["y"], ["a", "b", "c"], name="dynamic")],
            "DynamicQuantizeLinear 'dynamic': an integer operator",
        ),
    ],
)
def test_structures_that_tensorrt_refuses(extra: list[onnx.NodeProto], said: str) -> None:
    with pytest.raises(QuantizationError) as caught:
        existing.adopt(Graph().model(*extra), fp16=True)
    assert said in caught.value.message


def test_what_is_only_slow_is_a_warning() -> None:
    more = [
        helper.make_node("QuantizeLinear", ["y", "xs", "xz"], ["yq"], name="Qy"),
        helper.make_node("DequantizeLinear", ["yq", "xs", "xz"], ["yd"], name="DQy"),
        helper.make_node("Add", ["yd", "yd"], ["sum"], name="add"),
        helper.make_node("QuantizeLinear", ["sum", "xs", "xz"], ["sq"], name="Qs"),
        helper.make_node("DequantizeLinear", ["sq", "xs", "xz"], ["out"], name="DQs"),
    ]
    adopted = existing.adopt(Graph(activation_scale=np.float32(1e-6)).model(*more, output="out"), fp16=True)
    assert adopted.warnings == (
        "Q/DQ on an output cost accuracy and bring nothing: out",
        "Q/DQ between a convolution and its Add keep TensorRT from fusing them: add",
        "a scale so small that FP16 rounds it by over 3 %; --set cast.remainder=fp32 avoids it: Qx, Qy, Qs",
    )


def test_a_graph_without_q_and_dq_holds_none(tmp_path: Path) -> None:
    plain = helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [], []))
    assert not existing.holds_quantization(plain)
    assert existing.holds_quantization(Graph().model())
    path = tmp_path / "model.bin"
    onnx.save(Graph().model(), str(path))
    assert existing.file_holds_quantization(path, ModelKind.ONNX)
    assert not existing.file_holds_quantization(path, ModelKind.EXPORTED_PROGRAM)
    assert not existing.file_holds_quantization(tmp_path / "absent", ModelKind.ONNX)
    onnx.save(plain, str(path))
    assert not existing.file_holds_quantization(path, ModelKind.ONNX)
