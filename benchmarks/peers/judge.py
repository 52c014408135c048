"""What an INT8 graph is worth: held-out accuracy, distance from PyTorch, share of INT8 arithmetic, engine or not.

    python benchmarks/peers/judge.py GRAPH.onnx EVALUATION.npz [--engine ENGINE.onnx] [--time DATA.npz]

Prints one JSON document. The graph runs as its tool wrote it, in ONNX Runtime on the CPU with default
session options. It judges every tool by the same few lines and shares none with gpuopt's quantizer;
gpuopt's TensorRT adapter builds the engine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto

BATCH = 64
EIGHT_BITS = (TensorProto.INT8, TensorProto.UINT8)
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Where the codes of a QOperator node's two operands are.
QOPERATORS = {"QLinearConv": (0, 3), "QLinearMatMul": (0, 3), "QGemm": (0, 3), "ConvInteger": (0, 1)}
# They only move values, so that TensorRT takes Q/DQ past them.
MOVES = ("Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def session(model: str | bytes, optimize: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def outputs(path: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    run = session(str(path))
    name = run.get_inputs()[0].name
    parts = [run.run(None, {name: images[start : start + BATCH]})[0] for start in range(0, len(images), BATCH)]
    return np.concatenate(parts).astype(np.float32)


def multiply_accumulates(path: Path, image: NDArray[np.float32]) -> Iterator[tuple[onnx.NodeProto, int, bool]]:
    """Every matrix product and convolution, its multiply-accumulates for one image, and whether both operands are INT8.

    Sizes are those of a real run, so that nothing hangs on shape inference.
    """
    model = onnx.load(path)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    found = [node for node in model.graph.node if node.op_type in (*PRODUCTS, *QOPERATORS)]
    operands = {id(node): _operands(node) for node in found}
    wanted = {name for node in found for name in (*operands[id(node)], node.output[0])}
    known = {tensor.name for tensor in [*model.graph.output, *model.graph.input, *model.graph.initializer]}
    added = sorted(wanted - known)
    for name in added:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    run = session(model.SerializeToString(), optimize=False)
    feed = {run.get_inputs()[0].name: image}
    names = [value.name for value in run.get_outputs()]
    shapes = {name: value.shape for name, value in zip(names, run.run(None, feed), strict=True)}
    shapes.update({name: tuple(tensor.dims) for name, tensor in constants.items()})
    shapes.update({name: value.shape for name, value in feed.items()})
    for node in found:
        data, weight = operands[id(node)]
        size = math.prod(shapes[node.output[0]])
        if "Conv" in node.op_type:
            count = math.prod(shapes[data] if node.op_type == "ConvTranspose" else shapes[node.output[0]])
            count *= math.prod(shapes[weight][1:])
        else:
            transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            count = size * shapes[data][0 if transposed else -1]
        in_int8 = node.op_type in QOPERATORS or all(
            _is_eight_bit(name, producers, constants) for name in (data, weight)
        )
        yield node, count, in_int8


def _operands(node: onnx.NodeProto) -> tuple[str, str]:
    first, second = QOPERATORS.get(node.op_type, (0, 1))
    return node.input[first], node.input[second]


def _is_eight_bit(
    name: str, producers: dict[str, onnx.NodeProto], constants: dict[str, onnx.TensorProto], depth: int = 8
) -> bool:
    """Whether a tensor is what DequantizeLinear makes of 8-bit codes, moved about or not."""
    node = producers.get(name)
    if node is None or depth == 0:
        return False
    if node.op_type in MOVES:
        return _is_eight_bit(node.input[0], producers, constants, depth - 1)
    if node.op_type != "DequantizeLinear":
        return False
    codes = constants.get(node.input[0])
    zero = constants.get(node.input[2]) if len(node.input) > 2 else None
    # Codes without a zero point are UINT8.
    return (codes or zero) is None or (codes or zero).data_type in EIGHT_BITS  # type: ignore[union-attr]


def build(path: Path) -> str:
    """Empty if TensorRT-RTX builds an engine for batches of 1 to 64; else the first line of its complaint."""
    from gpuopt.backends.tensorrt.builder import build
    from gpuopt.backends.tensorrt.options import BuildOptions
    from gpuopt.errors import GpuoptError
    from gpuopt.progress import choose
    from gpuopt.shapes import ShapeRange

    value = onnx.load(path, load_external_data=False).graph.input[0]
    rest = tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim[1:])
    profile = {value.name: ShapeRange((1, *rest), (8, *rest), (BATCH, *rest))}
    try:
        build("tensorrt-rtx", path, (profile,), BuildOptions(), choose(True))
    except GpuoptError as error:
        return error.message.splitlines()[0]
    return ""


def inference_seconds(path: Path, data: Path) -> float:
    """What a plain run of the samples takes, one at a time, the session's start included."""
    images = np.load(data)["image"]
    started = time.perf_counter()
    run = session(str(path))
    name = run.get_inputs()[0].name
    for index in range(len(images)):
        run.run(None, {name: images[index : index + 1]})
    return time.perf_counter() - started


def judge(graph: Path, evaluation: Path, engine: Path) -> dict[str, Any]:
    """Counts, not shares, so that folds can be added up."""
    arrays = np.load(evaluation)
    images, labels, expected = arrays["image"], arrays["label"], arrays["logits"].astype(np.float64)
    actual = outputs(graph, images)
    layers = list(multiply_accumulates(graph, images[:1]))
    return {
        "images": len(labels),
        "correct": int((actual.argmax(1) == labels).sum()),
        "right": "".join("01"[int(answer)] for answer in actual.argmax(1) == labels),
        "same": int((actual.argmax(1) == expected.argmax(1)).sum()),
        "signal": float(np.square(expected).sum()),
        "noise": float(np.square(expected - actual).sum()),
        "macs": sum(count for _, count, _ in layers),
        "int8_macs": sum(count for _, count, in_int8 in layers if in_int8),
        "floating_point_layers": [
            {"node": node.name, "op_type": node.op_type, "macs": count}
            for node, count, in_int8 in layers
            if not in_int8
        ],
        "engine_error": build(engine),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--engine", type=Path, help="what the engine is built from; default: the graph")
    parser.add_argument("--time", type=Path, help="samples whose plain inference is timed")
    options = parser.parse_args()
    result = judge(options.graph, options.evaluation, options.engine or options.graph)
    if options.time:
        result["seconds"] = inference_seconds(options.graph, options.time)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
