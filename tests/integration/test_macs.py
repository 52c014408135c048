"""Multiply-accumulates against torch's own flop counter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gpuopt import onnx_model
from gpuopt.quantization import macs
from tests.integration import zoo

FEEDS = {
    "resnet18": {"x": torch.randn(2, 3, 64, 64)},
    "mobilenet_v3": {"x": torch.randn(1, 3, 64, 64)},
    "vit": {"x": torch.randn(2, 3, 64, 64)},
    "unet": {"image": torch.randn(1, 3, 32, 32)},
    "encoder": {"ids": torch.randint(0, 1000, (2, 12)), "mask": torch.ones(2, 12, dtype=torch.int64)},
    "two_by_two": {"image": torch.randn(1, 3, 32, 32), "table": torch.randn(1, 20)},
}


def exported(model: nn.Module, feed: dict[str, torch.Tensor], path: Path, dynamic: bool) -> onnx.ModelProto:
    axes = {name: {0: "batch"} for name in feed} if dynamic else None
    if dynamic and "ids" in feed:
        axes = {name: {0: "batch", 1: "length"} for name in feed}
    torch.onnx.export(
        model,
        tuple(feed.values()),
        str(path),
        dynamo=False,
        input_names=list(feed),
        dynamic_axes=axes,
        opset_version=17,
    )
    loaded = onnx.load(str(path))
    onnx_model.node_names_made_unique(loaded)
    return onnx_model.with_types(loaded)


@pytest.fixture
def no_fused_layers() -> Iterator[None]:
    """torch's fused encoder layer is one operator that its counter does not know."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FEEDS)
def test_the_count_is_torchs(name: str, dynamic: bool, tmp_path: Path, no_fused_layers: None) -> None:
    build: Callable[[], nn.Module] = getattr(zoo, name)
    model, feed = build().eval(), FEEDS[name]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*feed.values())
    arrays = {key: value.numpy() for key, value in feed.items()}
    found = macs.count(exported(model, feed, tmp_path / "m.onnx", dynamic), arrays, tmp_path / "shapes")
    assert 2 * sum(found.values()) == counter.get_total_flops()
    assert macs.share(found, found) == 1


def test_shapes_that_depend_on_data_are_those_of_a_run(tmp_path: Path) -> None:
    """NonZero keeps as many rows as the data has: 3."""
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"], name="nz"),
        helper.make_node("Transpose", ["places"], ["rows"], name="t"),
        helper.make_node("Cast", ["rows"], ["numbers"], name="c", to=onnx.TensorProto.FLOAT),
        helper.make_node("MatMul", ["numbers", "w"], ["y"], name="m"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["k", 8])],
        [numpy_helper.from_array(np.ones((2, 8), np.float32), "w")],
    )
    model = onnx_model.with_types(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10))
    feed = {"x": np.array([[1, 0, 0, 1], [0, 0, 1, 0]], np.float32)}
    assert macs.count(model, feed, tmp_path / "shapes") == {"m": 3 * 2 * 8}


def test_groups_and_a_transposed_operand_count_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="depthwise", group=8, pads=[1, 1, 1, 1]),
        helper.make_node("Gemm", ["a", "b"], ["y"], name="gemm", transA=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 8, 5, 5]),
            helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [3, 4]),
        ],
        [
            helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, None),
            helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None),
        ],
        [
            numpy_helper.from_array(np.ones((8, 1, 3, 3), np.float32), "w"),
            numpy_helper.from_array(np.ones((3, 6), np.float32), "b"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    assert macs.count(model, None, tmp_path / "s") == {"depthwise": 8 * 25 * 9, "gemm": 4 * 6 * 3}
