"""Quantize an ONNX file by nvidia-modelopt; runs in modelopt's own environment (`setup.sh modelopt`).

    PYTHON benchmarks/peers/modelopt_int8.py MODEL.onnx CALIBRATION.npz OUTPUT.onnx [entropy|max] [fp32|fp16]

Its defaults (entropy, its own choice of layers) but for two: the CPU calibrates, and what INT8
leaves stays FP32, because ONNX Runtime's CPU optimizer spoils INT8 graphs whose scales are FP16.
Prints the seconds that calibration and quantization took, imports left out.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from modelopt.onnx.quantization import quantize


def main() -> None:
    model, data, output, *rest = sys.argv[1:]
    method, remainder = [*rest, *("entropy", "fp32")[len(rest) :]]
    arrays = np.load(data)
    started = time.perf_counter()
    quantize(
        model,
        quantize_mode="int8",
        calibration_data={name: arrays[name] for name in arrays},
        calibration_method=method,
        calibration_eps=["cpu"],
        high_precision_dtype=remainder,
        output_path=output,
        log_level="WARNING",
    )
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main()
