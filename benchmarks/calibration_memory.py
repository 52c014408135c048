"""Peak memory of calibration against the number of samples: it must not grow.

    python benchmarks/calibration_memory.py [--samples 32 128 512]

A ResNet-shaped network, 3x128x128 images from an .npz, entropy; each size in a process of its own.
Floor: plain ONNX Runtime inference over the same samples, in the same run.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

SIZE = 128


def make_model(path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    nodes, weights, last, channels = [], [], "image", 3
    for index, width in enumerate((32, 64, 64, 128, 128, 128)):
        scale = np.sqrt(2 / (channels * 9))
        kernel = (generator.standard_normal((width, channels, 3, 3)) * scale).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"w{index}"))
        stride = 2 if index % 2 else 1
        nodes.append(
            helper.make_node(
                "Conv", [last, f"w{index}"], [f"c{index}"], f"conv{index}", strides=[stride] * 2, pads=[1] * 4
            )
        )
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"], f"relu{index}"))
        last, channels = f"r{index}", width
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["output"], "pool"))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", channels, 1, 1])],
        weights,
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), str(path))


def make_data(model: Path, data: Path) -> None:
    """Images for the run; in a process of its own, since a child's peak starts at its parent's size."""
    count = int(data.stem)
    np.savez(data, image=np.random.default_rng(0).standard_normal((count, 3, SIZE, SIZE), dtype=np.float32))


def infer(model: Path, data: Path) -> None:
    """The floor: the same samples through the plain graph."""
    from gpuopt.backends.onnxruntime import Session
    from gpuopt.calibration.readers import open_reader

    session = Session(model)
    for feed in open_reader(str(data), []):
        session.run(feed)


def calibrate(model: Path, data: Path) -> None:
    """Collectors over every convolution's input, as the calibrate stage has them."""
    import onnx

    from gpuopt import onnx_model
    from gpuopt.backends.onnxruntime import Session
    from gpuopt.calibration.collectors import RangeCollector
    from gpuopt.calibration.readers import open_reader
    from gpuopt.quantization import placement

    graph = onnx.shape_inference.infer_shapes(onnx.load(str(model)))
    watched = [name for name in placement.candidate_tensors(graph) if name != "image"]
    types = {value.name: value for value in graph.graph.value_info}
    graph.graph.output.extend(types[name] for name in watched)
    session = Session(onnx_model.save(graph, data.with_suffix(".watched")), optimization="basic")
    collector = RangeCollector("entropy")
    for feed in open_reader(str(data), []):
        for name, values in {**session.run(feed, watched), **feed}.items():
            collector.update(name, values)
    collector.ranges()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--one", nargs=3, metavar=("JOB", "MODEL", "DATA"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        job, model, data = arguments.one
        {"data": make_data, "infer": infer, "calibrate": calibrate}[job](Path(model), Path(data))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    print(f"{'samples':>8}{'inference MiB':>16}{'calibration MiB':>18}")
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model.onnx"
        make_model(model)
        for count in arguments.samples:
            data = Path(name) / f"{count}.npz"
            peaks = [
                int(
                    subprocess.run(
                        [sys.executable, __file__, "--one", job, str(model), str(data)],
                        check=True,
                        capture_output=True,
                        text=True,
                    ).stdout
                )
                for job in ("data", "infer", "calibrate")
            ]
            print(f"{count:>8}{peaks[1]:>16}{peaks[2]:>18}", flush=True)


if __name__ == "__main__":
    main()
