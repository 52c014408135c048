"""Builds by TensorRT-RTX, which needs no GPU: options, refusals, repairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from gpuopt import environment, onnx_model
from gpuopt.backends.tensorrt import builder, repairs
from gpuopt.backends.tensorrt.builder import BuiltEngine, build
from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.errors import BuildError, RequirementError, UsageError
from gpuopt.progress import Silent
from gpuopt.shapes import Profile, ShapeRange
from tests.unit.backends.tensorrt.test_repairs import PROFILES, fp16_int8
from tests.unit.quantization.graphs import depthwise_block

pytest.importorskip("tensorrt_rtx")


def rtx(model: onnx.ModelProto, folder: Path, profiles: tuple[Profile, ...] = PROFILES, **options: Any) -> BuiltEngine:
    path = onnx_model.save(model, folder)
    return build("tensorrt-rtx", path, profiles, BuildOptions(**options), Silent())


def test_what_was_applied_is_told(tmp_path: Path) -> None:
    built = rtx(
        depthwise_block(decades=0.5),
        tmp_path,
        optimization_level=2,
        workspace_bytes=1 << 28,
        tactic_sources=("jit_convolutions", "EDGE_MASK_CONVOLUTIONS"),
        sparsity=True,
        weight_streaming=True,
    )
    assert built.applied == {
        "optimization_level": 2,
        "workspace_bytes": 1 << 28,
        "tactic_sources": ["jit_convolutions", "EDGE_MASK_CONVOLUTIONS"],
        "flags": ["WEIGHT_STREAMING", "SPARSE_WEIGHTS"],
    }
    assert built.seconds > 0
    assert built.io_dtypes["x"] == "float32"
    assert (built.timing_cache, built.calibration_cache, built.repairs) == (None, None, ())


@pytest.mark.skipif(bool(environment.gpus()), reason="with a GPU it builds")
@pytest.mark.parametrize("option", ["refit", "strip_weights"])
def test_refit_needs_a_gpu(tmp_path: Path, option: str) -> None:
    with pytest.raises(RequirementError, match="GPU's driver failed") as caught:
        rtx(depthwise_block(decades=0.5), tmp_path, **{option: True})
    assert "refit and strip_weights" in caught.value.hint


def test_several_profiles_go_into_one_engine(tmp_path: Path) -> None:
    other = {"x": ShapeRange((8, 16, 8, 8), (8, 16, 8, 8), (16, 16, 8, 8))}
    one, two = (
        rtx(depthwise_block(decades=0.5), tmp_path / str(len(profiles)), profiles)
        for profiles in (PROFILES, (*PROFILES, other))
    )
    assert len(two.plan) > len(one.plan)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tactic_sources": ("CUBLAS",)}, r"TensorRT-RTX [\d.]+ has no tactic source 'CUBLAS'"),
        ({"io_formats": (("nowhere", "fp32:chw"),)}, "'nowhere' is no input or output"),
        ({"compute_capabilities": ("6.1",)}, "does not build for compute capability '6.1'"),
    ],
)
def test_what_is_unknown_is_refused_with_what_is_known(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        rtx(depthwise_block(decades=0.5), tmp_path, **options)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"io_formats": (("x", "fp32:hwc8"),)}, "at node 'x'.*cannot have the asked-for format"),
        ({"io_formats": (("x", "int8:chw32"),)}, "'x' is FLOAT in the graph, not int8"),
        ({"workspace_bytes": 1}, "scratch memory"),
    ],
)
def test_what_cannot_be_built_says_why(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(BuildError, match=words):
        rtx(depthwise_block(decades=0.5), tmp_path, **options)


def test_a_profile_that_does_not_fit_names_the_input(tmp_path: Path) -> None:
    wrong = {"x": ShapeRange((1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8))}
    with pytest.raises(BuildError, match=r"input 'x' is .*16x8x8 in the network, not 1x3x8x8 to 1x3x8x8"):
        rtx(depthwise_block(decades=0.5), tmp_path, (wrong,))
    with pytest.raises(BuildError, match="input 'x' of the network has no shape"):
        rtx(depthwise_block(decades=0.5), tmp_path, ({"y": wrong["x"]},))


def test_a_nonzero_zero_point_is_explained(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in "xy"]
    constants = [
        helper.make_tensor("s", TensorProto.FLOAT, [], [0.1]),
        helper.make_tensor("z", TensorProto.INT8, [], [3]),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], "dequantize"),
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    with pytest.raises(BuildError, match=r"at node 'quantize' \(QuantizeLinear\): it quantizes symmetrically alone"):
        rtx(model, tmp_path, ({"x": ShapeRange((2, 4), (2, 4), (2, 4))},))


def test_an_operator_that_nobody_knows_is_named(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Strange", ["x"], ["y"], "odd", domain="own")], "g", values[:1],
                              values[1:])  # fmt: skip
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    with pytest.raises(BuildError, match=r"at node 'odd' \(Strange\): the operator is no ONNX operator") as caught:
        rtx(model, tmp_path, ({"x": ShapeRange((2, 4), (2, 4), (2, 4))},))
    assert "--plugin" in caught.value.hint


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    path = onnx_model.save(depthwise_block(decades=0.5), tmp_path)
    model = onnx.load(str(path))
    onnx.save(model, str(path), save_as_external_data=True, location="weights.data", size_threshold=0)
    (tmp_path / "weights.data").unlink()
    with pytest.raises(BuildError, match=r"weights .* cannot be read"):
        build("tensorrt-rtx", path, PROFILES, BuildOptions(), Silent())


class Told(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def refuse_until(monkeypatch: pytest.MonkeyPatch, line: str, tries: int) -> None:
    """Let the first tries fail as a library without a kernel or memory does, which none here can be made to."""
    real, count = builder._attempt, iter(range(tries))

    def attempt(*arguments: Any) -> Any:
        if next(count, None) is not None:
            return builder._Failure({"ERROR": [line], "WARNING": []})
        return real(*arguments)

    monkeypatch.setattr(builder, "_attempt", attempt)


NO_KERNEL = "Error Code 10: Internal Error (Could not find any implementation for node {}.)"


def test_a_node_without_a_kernel_goes_back_to_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fp16_int8(tmp_path)
    path = onnx_model.save(model, tmp_path / "onnx2")
    node = next(node.name for node in model.graph.node if node.op_type == "Conv")
    refuse_until(monkeypatch, NO_KERNEL.format(node), 1)
    told = Told()
    built = build("tensorrt-rtx", path, PROFILES, BuildOptions(), told)
    assert built.plan
    assert built.repairs == (f"no kernel for {node} in the asked-for precision: it computes in FP32",)
    assert built.warnings == (f"tensorrt-rtx: {built.repairs[0]}",)
    assert told.lines == [f"tensorrt-rtx: {built.repairs[0]}"]
    assert onnx.load(str(path)) == model, "the artifact stays as it is"


def test_repairs_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fp16_int8(tmp_path)
    path = onnx_model.save(model, tmp_path / "onnx2")
    node = next(node.name for node in model.graph.node if node.op_type == "Conv")
    refuse_until(monkeypatch, NO_KERNEL.format(node), 1000)
    with pytest.raises(BuildError, match=rf"no kernel for it .*tried in vain: no kernel for {node}"):
        build("tensorrt-rtx", path, PROFILES, BuildOptions(), Silent())
    with pytest.raises(BuildError, match="no kernel") as caught:
        build("tensorrt-rtx", path, PROFILES, BuildOptions(repairs=False), Silent())
    assert "repairs" not in caught.value.message


def test_too_little_memory_shrinks_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "Error Code 1: Cuda Runtime (out of memory)"
    refuse_until(monkeypatch, line, 2)
    options = BuildOptions(workspace_bytes=1 << 30)
    path = onnx_model.save(depthwise_block(decades=0.5), tmp_path)
    built = build("tensorrt-rtx", path, PROFILES, options, Silent())
    assert built.applied["workspace_bytes"] == 1 << 28
    assert len(built.repairs) == 2
    refuse_until(monkeypatch, line, 1000)
    with pytest.raises(BuildError, match=r"memory does not suffice.*tried in vain") as caught:
        build("tensorrt-rtx", path, PROFILES, replace(options, workspace_bytes=1 << 40), Silent())
    assert caught.value.message.count("the workspace is limited") == repairs.MOST_WORKSPACE_REPAIRS
