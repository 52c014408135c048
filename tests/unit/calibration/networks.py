"""A small network and samples for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gpuopt import onnx_model

Feed = dict[str, np.ndarray[Any, Any]]


def network(channels: int = 8, layers: int = 3) -> onnx.ModelProto:
    """Convolutions over images of any number and size."""
    generator = np.random.default_rng(0)
    nodes, constants, name, width = [], [], "x", 3
    for index in range(layers):
        weight = generator.standard_normal((channels, width, 3, 3)).astype(np.float32) / (3 * width**0.5)
        constants.append(numpy_helper.from_array(weight, f"w{index}"))
        nodes.append(helper.make_node("Conv", [name, f"w{index}"], [f"c{index}"], f"conv{index}", pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"], f"relu{index}"))
        name, width = f"r{index}", channels
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    return onnx_model.with_types(model)


TENSORS = ["x", "r0", "r1"]


class Samples:
    """Feeds that can be gone through again, as a reader's can."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self.feeds = feeds

    def __iter__(self) -> Iterator[Feed]:
        return iter(self.feeds)


def images(count: int, size: int = 24, seed: int = 0) -> list[Feed]:
    generator = np.random.default_rng(seed)
    return [{"x": generator.standard_normal((1, 3, size, size), dtype=np.float32)} for _ in range(count)]
