"""Floors, peaks and origins of layers."""

from __future__ import annotations

import pytest
from onnx import TensorProto, helper

from gpuopt.profiling.layers import Layer, by_module, floor_of
from gpuopt.profiling.origins import modules
from gpuopt.profiling.peaks import Peak, peak_of

PEAK = Peak(1e12, {"fp16": 1e15}, "a data sheet")


@pytest.mark.parametrize(
    ("bytes_moved", "operations", "milliseconds", "floor", "bound"),
    [
        (1_000_000_000, 0, 1.2, 1.0, "memory"),
        (1_000_000, 2_000_000_000_000, 2.5, 2.0, "arithmetic"),
        (1_000_000, 0, 0.01, 0.001, "latency"),
    ],
)
def test_what_bounds_a_layer(bytes_moved: int, operations: int, milliseconds: float, floor: float, bound: str) -> None:
    found = floor_of(bytes_moved, operations, "fp16", milliseconds, PEAK)
    assert found == (pytest.approx(floor), bound)


def test_without_peaks_or_sizes_nothing_is_claimed() -> None:
    assert floor_of(None, 1, "fp16", 1.0, PEAK) == (None, "")
    assert floor_of(1, 1, "fp16", 1.0, None) == (None, "")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 data sheet, SXM5"),
        ("NVIDIA H100 PCIe", "H100 data sheet, PCIe"),
        ("NVIDIA A100-SXM4-40GB", "40 GB"),
        ("NVIDIA A100-SXM4-80GB", "80 GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA RTX A6000", "A6000"),
    ],
)
def test_a_gpu_is_found_by_its_driver_s_name(name: str, words: str) -> None:
    peak = peak_of(name)
    assert peak is not None
    assert words in peak.source
    assert peak.operations_per_second["int8"] >= 0.4 * peak.operations_per_second["fp16"]


def test_an_unknown_gpu_has_no_peaks() -> None:
    assert peak_of("NVIDIA B9000") is None


def test_modules_come_from_scopes_and_from_names_of_weights() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "/layer1/layer1.0/conv1/Conv"),
        helper.make_node("DequantizeLinear", ["block.1.fc.weight_quantized", "s"], ["d"], "dq"),
        helper.make_node("Gemm", ["c", "d"], ["g"], "node_linear"),
        helper.make_node("Relu", ["g"], ["y"], "node_relu"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    found = modules(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:])))
    assert found["/layer1/layer1.0/conv1/Conv"] == "layer1.0.conv1"
    assert found["node_linear"] == "block.1.fc"
    assert "node_relu" not in found


def test_time_by_module() -> None:
    layers = [
        Layer(str(i), ms, "fp16", "", (), (), module) for i, (ms, module) in enumerate([(1, "a"), (2, ""), (3, "a")])
    ]
    assert by_module(layers) == [("a", 4, 2), ("-", 2, 1)]
