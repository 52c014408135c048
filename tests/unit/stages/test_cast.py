"""The cast to FP16 of graphs that the converter alone does not take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gpuopt import onnx_model, recipe
from gpuopt.artifact import Artifact, StageOutcome
from gpuopt.backends.onnxruntime import Session
from gpuopt.calibration.collectors import TensorRange
from gpuopt.errors import QuantizationError
from gpuopt.progress import Silent
from gpuopt.quantization import placement, qdq
from gpuopt.recipe import QuantizeSection
from gpuopt.stages import cast
from gpuopt.stages.context import StageContext
from tests.unit.quantization.graphs import depthwise_block, normal

SECTION = QuantizeSection(min_channels=8)


def cast_to_fp16(
    model: onnx.ModelProto, folder: Path, keep: tuple[str, ...] = ()
) -> tuple[onnx.ModelProto, StageOutcome]:
    onnx_model.save(model, folder / "onnx")
    (folder / "made").mkdir()
    chosen = recipe.resolve({"model": {"path": "m"}, "cast": {"nodes_to_keep": list(keep)}})
    artifacts = {"onnx": Artifact("onnx", folder / "onnx", "")}
    context = StageContext(chosen, artifacts, folder / "made", Silent())
    outcome = cast.run(context)
    return onnx_model.load(folder / "made/onnx"), outcome


def outputs(folder: Path, feed: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    return list(Session(folder / "model.onnx", optimization="none").run(feed).values())


def quantized(opset: int) -> onnx.ModelProto:
    model = depthwise_block(decades=0.5)
    model.opset_import[0].version = opset
    known = {name: TensorRange(-4, 4, "test") for name in placement.candidate_tensors(model)}
    engine = qdq.quantize(model, SECTION, placement.place(model, SECTION, known, True), known, True).engine
    assert engine is not None
    return engine


@pytest.mark.parametrize("opset", [13, 17, 18, 19, 20])
def test_scales_become_fp16_in_every_opset(tmp_path: Path, opset: int) -> None:
    made, outcome = cast_to_fp16(quantized(opset), tmp_path)
    assert onnx_model.opset(made) == max(opset, 19)
    assert len(outcome.warnings) == (opset < 19)
    scales = {node.input[1] for node in made.graph.node if node.op_type == "QuantizeLinear"}
    assert {t.data_type for t in made.graph.initializer if t.name in scales} == {TensorProto.FLOAT16}
    feed = {"x": normal(np.random.default_rng(1), 2, 16, 8, 8)}
    want, got = (outputs(tmp_path / folder, feed)[0] for folder in ("onnx", "made/onnx"))
    assert np.sum((want - got) ** 2) < 1e-2 * np.sum(want**2)


def test_an_opset_that_cannot_be_raised_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("no adapter")

    monkeypatch.setattr("onnx.version_converter.convert_version", refuse)
    with pytest.raises(QuantizationError, match=r"FP16 from opset 19, and opset 17 cannot be converted.*no adapter"):
        cast_to_fp16(quantized(17), tmp_path)


def test_a_weight_that_is_an_output_too(tmp_path: Path) -> None:
    weight = normal(np.random.default_rng(0), 4, 4)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in ("x", "y", "w")]
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    graph = helper.make_graph([node], "g", values[:1], values[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    cast_to_fp16(model, tmp_path)
    x = normal(np.random.default_rng(1), 4, 4)
    y, w = outputs(tmp_path / "made/onnx", {"x": x})
    assert np.array_equal(w, weight.astype(np.float16).astype(np.float32))
    assert np.allclose(y, x @ weight, atol=0.05)


@pytest.mark.parametrize("keep", [("big", "small"), ("*",), ("big", "small", "last")])
def test_what_passes_between_nodes_in_fp32_may_be_more_than_fp16_holds(tmp_path: Path, keep: tuple[str, ...]) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in ("x", "y", "z")]
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "first"),
        helper.make_node("Mul", ["r", "scale"], ["b"], "big"),
        helper.make_node("Div", ["b", "scale"], ["s"], "small"),
        helper.make_node("Sqrt", ["s"], ["y"], "last"),
        helper.make_node("Neg", ["s"], ["z"], "other"),
    ]
    scale = numpy_helper.from_array(np.float32(1e6), "scale")
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    made, _ = cast_to_fp16(model, tmp_path, keep)
    x = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    for got, want in zip(outputs(tmp_path / "made/onnx", {"x": x}), (np.sqrt(x), -x), strict=True):
        assert np.allclose(got, want, rtol=2e-3)
    if keep == ("*",):
        assert "Cast" not in {node.op_type for node in made.graph.node}


def test_a_pair_of_casts_of_the_model_s_own_stays_and_integers_pass_fp16_by(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in ("y", "z")]
    nodes = [
        helper.make_node("Cast", ["n"], ["f"], "from_integer", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "scale"], ["y"], "kept"),
        helper.make_node("Cast", ["y"], ["h"], "rounding", to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["h"], ["r"], "back", to=TensorProto.FLOAT),
        helper.make_node("Sub", ["y", "r"], ["z"], "difference"),
    ]
    inputs = [helper.make_tensor_value_info("n", TensorProto.INT64, [3])]
    scale = numpy_helper.from_array(np.float32(1e-3), "scale")
    graph = helper.make_graph(nodes, "g", inputs, values, [scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    n = np.array([100_001, 234_567, 999_999])
    cast_to_fp16(model, tmp_path, ("kept", "rounding", "back", "difference"))
    y, z = outputs(tmp_path / "made/onnx", {"n": n})
    want = n.astype(np.float32) * np.float32(1e-3)
    assert np.allclose(y, want, rtol=1e-6)
    assert np.allclose(z, want - want.astype(np.float16).astype(np.float32), atol=1e-4)
    assert np.abs(z).max() > 1e-3
