"""Time and memory of calibration, beside plain inference and onnxruntime's own calibrators.

    python benchmarks/calibration.py [--images 256] [--peer-images 64] [--provider cpu]

ResNet-50 at 224x224, batch 1, random weights, samples of normally distributed numbers: what has to be
done does not depend on either. The floor is what ONNX Runtime needs for the same samples through the
FP32 graph and nothing else; every method runs in a process of its own, session creation left out of the
time. Peak memory is the growth of the process over the run, opening the session included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

SHAPE = (1, 3, 224, 224)
PROVIDER: Literal["cpu", "cuda"] = "cpu"
OURS = ("minmax", "entropy", "mse", "percentile")
PEERS = ("entropy", "percentile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--peer-images", type=int, default=64, help="at most; halved until the peer survives")
    parser.add_argument(
        "--model", type=Path, help="ONNX file instead of the exported ResNet-50; its input is `x`, of the same shape"
    )
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu", help="of plain inference and gpuopt")
    parser.add_argument("--work", nargs=3, metavar=("WHO", "METHOD", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    global PROVIDER
    PROVIDER = arguments.provider
    if arguments.work:
        who, method, count = arguments.work
        print(json.dumps(WORK[who](arguments.model, method, int(count))))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or export(Path(folder))
        table(model, arguments.images, arguments.peer_images)


def table(model: Path, images: int, peer_images: int) -> None:
    print("| samples | what | time, s | times the floor | peak MiB | above the floor's |")
    print("| --- | --- | --- | --- | --- | --- |")
    for count in dict.fromkeys((32, peer_images, images, 512)):
        floor = measure(model, "inference", "plain", count)
        row(count, "plain inference", floor, floor)
        for method in OURS if count != 512 else ("entropy",):
            row(count, f"gpuopt {method}", measure(model, "gpuopt", method, count), floor)
        if count == peer_images:
            for method in PEERS:
                peer(model, method, count)


def peer(model: Path, method: str, count: int) -> None:
    """The peer's row, at the largest number of samples that it survives."""
    while count:
        found = measure(model, "onnxruntime", method, count)
        if found:
            row(count, f"onnxruntime {method}", found, measure(model, "inference", "plain", count))
            return
        print(f"| {count} | onnxruntime {method} | does not survive | | | |", flush=True)
        count //= 2


def row(count: int, what: str, found: dict[str, float], floor: dict[str, float]) -> None:
    times, above = found["seconds"] / floor["seconds"], found["peak"] - floor["peak"]
    print(
        f"| {count} | {what} | {found['seconds']:.2f} | {times:.2f} | {found['peak']:.0f} | {above:.0f} |", flush=True
    )


def measure(model: Path, who: str, method: str, count: int) -> dict[str, float]:
    command = [
        sys.executable,
        __file__,
        "--model",
        str(model),
        "--provider",
        PROVIDER,
        "--work",
        who,
        method,
        str(count),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}


class Samples:
    """Feeds made when asked for; eight different ones, over and over."""

    def __init__(self, count: int) -> None:
        generator = np.random.default_rng(0)
        self._images = [generator.standard_normal(SHAPE, dtype=np.float32) for _ in range(8)]
        self._count = count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({"x": self._images[index % 8]} for index in range(self._count))


class Clock:
    """Seconds and growth in MiB since it was made."""

    def __init__(self) -> None:
        from gpuopt.calibration import memory

        memory.reset_peak()
        self._memory, self._before = memory, memory.resident_bytes()
        self.start()

    def start(self) -> None:
        self._started = time.monotonic()

    def read(self) -> dict[str, float]:
        seconds = time.monotonic() - self._started
        return {"seconds": seconds, "peak": (self._memory.peak_bytes() - self._before) / self._memory.MIB}


def inference(model: Path, method: str, count: int) -> dict[str, float]:
    from gpuopt.backends.onnxruntime import Session, execution_providers

    samples, clock = Samples(count), Clock()
    session = Session(model, execution_providers(PROVIDER))
    session.run(next(iter(samples)))
    clock.start()
    for feed in samples:
        session.run(feed)
    return clock.read()


def ours(model: Path, method: str, count: int) -> dict[str, float]:
    from gpuopt import onnx_model
    from gpuopt.backends.onnxruntime import execution_providers
    from gpuopt.calibration.collectors import RangeCollector
    from gpuopt.calibration.run import RunOptions, Seen, calibrate
    from gpuopt.quantization import placement
    from gpuopt.recipe import CalibrateSection

    graph = onnx_model.with_types(onnx_model.load_untrusted(model))
    tensors = placement.candidate_tensors(graph)
    collector = RangeCollector(method, values_per_slice=CalibrateSection().values)
    samples, clock = Samples(count + 1), Clock()

    def seen(sample: Seen) -> None:
        if sample.number == 1:
            clock.start()

    with tempfile.TemporaryDirectory() as folder:
        options = RunOptions(providers=execution_providers(PROVIDER), seen=seen)
        calibrate(graph, tensors, samples, collector, Path(folder) / "watched", options)
        return clock.read()


def theirs(model: Path, method: str, count: int) -> dict[str, float]:
    from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter(Samples(count))

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    reader, clock = Reader(), Clock()
    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(
            model,
            ["Conv", "MatMul", "Gemm"],
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod[method.capitalize()],
        )
        clock.start()
        calibrator.collect_data(reader)
        calibrator.compute_data()
        return clock.read()


WORK = {"inference": inference, "gpuopt": ours, "onnxruntime": theirs}


def export(folder: Path) -> Path:
    import torch
    from torchvision.models import resnet50

    torch.manual_seed(0)
    network = resnet50(weights=None).eval()
    path = folder / "model.onnx"
    torch.onnx.export(network, (torch.randn(SHAPE),), str(path), dynamo=False, input_names=["x"], opset_version=20)
    return path


if __name__ == "__main__":
    main()
