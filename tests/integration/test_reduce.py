"""Failures of real libraries, reduced: graphs that TensorRT-RTX refuses, graphs that differ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.conftest import Gpuopt

HERE = Path(__file__).parent
SECRET = 0.123456789


def selecting() -> onnx.ModelProto:
    """Twelve layers, in their middle a NonZero, which TensorRT-RTX does not build."""
    generator = np.random.default_rng(0)
    nodes, weights = [], []
    name = "x"
    for index in range(6):
        weights.append(
            numpy_helper.from_array((generator.standard_normal((8, 8)) + SECRET).astype(np.float32), f"w{index}")
        )
        nodes += [
            helper.make_node("MatMul", [name, f"w{index}"], [f"m{index}"], name=f"product_{index}"),
            helper.make_node("Tanh", [f"m{index}"], [f"t{index}"], name=f"tanh_{index}"),
        ]
        name = f"t{index}"
        if index == 3:
            nodes.append(helper.make_node("NonZero", [name], ["where"], name="select"))
    graph = helper.make_graph(
        nodes,
        "selecting",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]),
            helper.make_tensor_value_info("where", TensorProto.INT64, [2, "found"]),
        ],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_compile_keeps_the_smallest_graph_that_fails_and_the_command_that_replays_it(
    gpuopt: Gpuopt, tmp_path: Path
) -> None:
    onnx.save(selecting(), str(tmp_path / "model.onnx"))
    shapes = ("--min-shapes", "x:1x8", "--max-shapes", "x:4x8")
    result = gpuopt("compile", tmp_path / "model.onnx", "-p", "fp16", "-t", "tensorrt-rtx", *shapes, cwd=tmp_path)
    assert result.code == 7
    assert "'select' (NonZero)" in result.stderr
    assert "torch.where" in result.stderr
    assert "nodes still fail (NonZero)" in result.stderr
    folder = tmp_path / "model.gpuopt.failed/failure"
    document = json.loads((folder / "failure.json").read_text())
    assert (document["stage"], document["target"], document["operators"]) == ("build", "tensorrt-rtx", ["NonZero"])
    assert document["finished"]
    assert document["fails_with_these_weights"]
    assert document["environment"]["packages"]["tensorrt-rtx-cu13"]
    assert str(Path.home()) not in (folder / "failure.json").read_text()
    log = (folder / "log.txt").read_text()
    assert "Traceback" in log
    assert "In function importNonZero" in log
    graph = onnx.load(str(folder / "reduced.onnx")).graph
    assert [node.op_type for node in graph.node] == ["NonZero"]
    assert not graph.initializer
    assert gpuopt("check", tmp_path / "model.gpuopt.failed").code == 0
    again = gpuopt("reduce", folder, "--replay")
    assert again.code == 7
    assert "NonZero" in again.stderr


def test_a_failure_is_reduced_anew_from_its_folder_with_other_wishes(gpuopt: Gpuopt, tmp_path: Path) -> None:
    onnx.save(selecting(), str(tmp_path / "model.onnx"))
    arguments = ("-p", "fp16", "-t", "tensorrt-rtx", "-i", "x:2x8", "--set", "failure.seconds=0")
    assert gpuopt("compile", tmp_path / "model.onnx", *arguments).code == 7
    folder = tmp_path / "model.gpuopt.failed"
    before = json.loads((folder / "failure/failure.json").read_text())
    assert before["graph"] is None
    assert not (folder / "failure/reduced.onnx").exists()
    assert gpuopt("reduce", folder, "--replay").code == 10
    result = gpuopt("reduce", folder, "--json")
    assert result.code == 0, result.stderr
    assert result.report()["operators"] == ["NonZero"]
    assert (folder / "failure/reduced.onnx").is_file()
    assert (folder / "report.md").is_file()
    assert gpuopt("check", folder).code == 0


def test_a_graph_is_reduced_on_demand_and_its_weights_stay_out(gpuopt: Gpuopt, tmp_path: Path) -> None:
    onnx.save(selecting(), str(tmp_path / "model.onnx"))
    arguments = ("-t", "tensorrt-rtx", "--min-shapes", "x:1x8", "--max-shapes", "x:4x8")
    result = gpuopt("reduce", tmp_path / "model.onnx", *arguments)
    assert result.code == 0, result.stderr
    assert "1 of 13 nodes still fail (NonZero)" in result.stdout
    assert "gpuopt reduce" in result.stdout
    assert "--replay" in result.stdout
    document = json.loads((tmp_path / "model.failure/failure.json").read_text())
    assert document["weights"] == "random"
    assert document["inputs"] == {"t3": {"min": "1x8", "opt": "4x8", "max": "4x8"}}


def test_where_nothing_fails_nothing_is_written(gpuopt: Gpuopt, tmp_path: Path) -> None:
    onnx.save(selecting(), str(tmp_path / "model.onnx"))
    result = gpuopt("reduce", tmp_path / "model.onnx", "-t", "onnxruntime", "-i", "x:2x8", "--json")
    assert result.code == 20
    assert "does not fail here" in result.report()["error"]["message"]
    same = gpuopt("reduce", tmp_path / "model.onnx", "--against", "optimized", "-i", "x:2x8")
    assert same.code == 20
    assert "does not differ" in same.stderr
    assert not (tmp_path / "model.failure").exists()


def test_the_node_by_which_two_graphs_differ_is_found(gpuopt: Gpuopt, tmp_path: Path) -> None:
    onnx.save(selecting(), str(tmp_path / "model.onnx"))
    other = selecting()
    weight = next(tensor for tensor in other.graph.initializer if tensor.name == "w2")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(-1), "w2"))
    onnx.save(other, str(tmp_path / "other.onnx"))
    arguments = ("--against", tmp_path / "other.onnx", "-i", "x:4x8", "-o", tmp_path / "found", "--json")
    result = gpuopt("reduce", tmp_path / "model.onnx", *arguments)
    assert result.code == 0, result.stderr
    document = result.report()
    assert document["stage"] == "difference"
    graph = onnx.load(str(tmp_path / "found/reduced.onnx")).graph
    assert [node.name for node in graph.node] == ["product_2"]
    theirs = onnx.load(str(tmp_path / "found/other.onnx")).graph
    assert [node.op_type for node in theirs.node] == ["MatMul"]
    again = gpuopt("reduce", tmp_path / "found", "--replay")
    assert again.code == 8
    assert "differs" in again.stderr


def test_the_worst_of_a_quantized_graph_is_found(gpuopt: Gpuopt, tmp_path: Path) -> None:
    model = selecting()
    del model.graph.output[1]
    model.graph.node.remove(next(node for node in model.graph.node if node.op_type == "NonZero"))
    onnx.save(model, str(tmp_path / "model.onnx"))
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            # Ranges of data a hundred times smaller than those that come: everything is clipped.
            self._feeds = iter([{"x": np.full((2, 8), 0.001, np.float32)}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    options = {"ActivationSymmetric": True, "WeightSymmetric": True}
    quantize_static(
        str(tmp_path / "model.onnx"), str(tmp_path / "int8.onnx"), Reader(), quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"],
        extra_options=options,
    )  # fmt: skip
    arguments = ("--against", tmp_path / "int8.onnx", "-i", "x:4x8", "-o", tmp_path / "found", "--json")
    result = gpuopt("reduce", tmp_path / "model.onnx", *arguments)
    assert result.code == 0, result.stderr
    assert result.report()["nodes"] == 1
    assert result.report()["operators"] == ["MatMul"]
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "found/other.onnx")).graph.node]
    assert "DequantizeLinear" in kinds


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("nothing.onnx",), 10, "No such file or directory"),
        (("model.onnx", "--against", "nothing.onnx"), 10, "No such file or directory"),
        ((".",), 2, "no folder of a failed compilation"),
        (("model.onnx", "-t", "tensorrt-rtx", "-i", "x:2x8", "--plugin", "a.so"), 2, "no build.plugins"),
        (("model.onnx", "--replay"), 10, "cannot read"),
    ],
)
def test_bad_input_of_reduce(arguments: tuple[str, ...], code: int, words: str, gpuopt: Gpuopt, tmp_path: Path) -> None:
    onnx.save(selecting(), str(tmp_path / "model.onnx"))
    result = gpuopt("reduce", *arguments, cwd=tmp_path)
    assert result.code == code, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_failure_of_somebody_else_runs_no_code_here(gpuopt: Gpuopt, tmp_path: Path) -> None:
    onnx.save(selecting(), str(tmp_path / "model.onnx"))
    assert gpuopt("reduce", tmp_path / "model.onnx", "-t", "tensorrt-rtx", "-i", "x:2x8").code == 0
    path = tmp_path / "model.failure/failure.json"
    document = json.loads(path.read_text())
    document["recipe"].setdefault("build", {})["plugins"] = ["/nowhere/plugin.so"]
    path.write_text(json.dumps(document))
    assert gpuopt("reduce", tmp_path / "model.failure", "--replay").code == 7
    document["recipe"] = {"model": {"path": "x"}, "unknown": 1}
    path.write_text(json.dumps(document))
    assert gpuopt("reduce", tmp_path / "model.failure", "--replay").code == 2
    for damage in (
        "{", "[]", "{}", json.dumps({"schema_version": 1, "graph": "reduced.onnx"}),
        json.dumps({**document, "recipe": {"model": {"path": "x"}}, "stage": "record"}),
        json.dumps({**document, "recipe": {"model": {"path": "x"}}, "target": "../elsewhere"}),
        json.dumps({**document, "recipe": {"model": {"path": "x"}, "build": 3}}),
        json.dumps({**document, "recipe": {"model": {"path": "x"}}, "limits": {"a": 1}}),
        json.dumps({**document, "recipe": {"model": {"path": "x"}}, "inputs": {"t3": "1x8"}}),
    ):  # fmt: skip
        path.write_text(damage)
        result = gpuopt("reduce", tmp_path / "model.failure", "--replay")
        assert result.code == 10, (damage, result.stderr)


def test_a_stage_that_is_no_build_is_tried_by_the_pipeline_up_to_it(tmp_path: Path) -> None:
    from gpuopt.errors import ReductionError
    from gpuopt.progress import Silent
    from gpuopt.recipe import resolve
    from gpuopt.reduction.attempts import Check
    from gpuopt.reduction.reproduction import Wish, replay, reproduce
    from gpuopt.shapes import ShapeRange

    nodes = [helper.make_node(kind, [f"t{i}"], [f"t{i + 1}"]) for i, kind in enumerate(("Tanh", "Relu", "Neg"))]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 8]) for name in ("t0", "t3")]
    model = helper.make_model(
        helper.make_graph(nodes, "without products", tensors[:1], tensors[1:]),
        opset_imports=[helper.make_opsetid("", 20)], ir_version=10,
    )  # fmt: skip
    onnx.save(model, str(tmp_path / "model.onnx"))
    recipe = resolve({"model": {"path": "x"}, "build": {"target": ["tensorrt-rtx"]}})
    check = Check("quantize", recipe)
    (tmp_path / "made").mkdir()
    profile = {"t0": ShapeRange((2, 8), (2, 8), (2, 8))}
    found = reproduce(
        tmp_path / "model.onnx", profile, check, Wish(300, kind="quantization"), Silent(), tmp_path / "made"
    )
    assert found["nodes"] == 1
    assert found["stage"] == "quantize"
    _, error = replay(tmp_path / "made", (), 300)
    assert error is not None
    assert "no node can be quantized" in error.message
    with pytest.raises(ReductionError, match="the time ran out"):
        replay(tmp_path / "made", (), 0.1)


def test_the_reduction_keeps_the_time_of_the_command(gpuopt: Gpuopt, tmp_path: Path) -> None:
    import time

    onnx.save(selecting(), str(tmp_path / "model.onnx"))
    arguments = ("-p", "fp16", "-t", "tensorrt-rtx", "-i", "x:2x8", "--set", "failure.seconds=600")
    started = time.monotonic()
    result = gpuopt("compile", tmp_path / "model.onnx", *arguments, "--timeout", "120s")
    assert time.monotonic() - started < 180
    assert result.code == 7
    assert (tmp_path / "model.gpuopt.failed/failure/failure.json").is_file()
