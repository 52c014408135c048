"""Quantize an ONNX file by `onnxruntime.quantization.quantize_static` with its own defaults.

    python benchmarks/peers/onnxruntime_int8.py MODEL.onnx CALIBRATION.npz OUTPUT.onnx [minmax|entropy]

The defaults: Q/DQ, MinMax ranges, signed 8 bits for both, asymmetric activations, one scale a weight
tensor, every operator type it knows, INT32 biases. `entropy` changes the calibrator and nothing else.
Prints the seconds that calibration and quantization took, imports left out.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static


class Samples(CalibrationDataReader):  # type: ignore[misc]
    """The stacked samples, one at a time."""

    def __init__(self, path: str) -> None:
        arrays = np.load(path)
        self._feeds: Iterator[dict[str, np.ndarray]] = iter(
            [{name: arrays[name][i : i + 1] for name in arrays} for i in range(len(arrays[arrays.files[0]]))]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def main() -> None:
    model, data, output, method = [*sys.argv[1:], "minmax"][:4]
    logging.getLogger().setLevel(logging.ERROR)
    methods = {"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy}
    started = time.perf_counter()
    quantize_static(model, output, Samples(data), calibrate_method=methods[method])
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main()
