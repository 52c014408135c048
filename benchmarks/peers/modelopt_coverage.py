"""Convert an FP32 ONNX graph by nvidia-modelopt; runs in modelopt's own environment (`setup.sh modelopt`).

    PYTHON benchmarks/peers/modelopt_coverage.py FP32-BUNDLE OUTPUT.onnx fp16|int8 SAMPLES

FP16 by its AutoCast, INT8 by its ONNX quantization, at their defaults but for the CPU as calibrator. Random
data, as for gpuopt.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx


def samples_of(bundle: Path, count: int) -> dict[str, np.ndarray]:
    """Random inputs of the shapes that the graph is tuned for, stacked along the batch."""
    record = json.loads((bundle / "reference/reference.json").read_text())
    generator = np.random.default_rng(0)
    found = {}
    for spec in record["inputs"]:
        _, *shape = (int(size) for size in record["profiles"][0][spec["name"]]["opt"].split("x"))
        dtype = np.dtype(spec["dtype"])
        values = (
            generator.standard_normal((count, *shape))
            if dtype.kind == "f"
            else generator.integers(0, 2, (count, *shape))
        )
        found[spec["name"]] = values.astype(dtype)
    return found


def main() -> None:
    bundle, output, precision, samples = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    source = str(shutil.copy(bundle / "model.onnx", output.with_name("fp32.onnx")))
    if precision == "fp16":
        from modelopt.onnx.autocast import convert_to_mixed_precision

        onnx.save(convert_to_mixed_precision(source, keep_io_types=True), str(output))
        return
    from modelopt.onnx.quantization import quantize

    quantize(
        source,
        quantize_mode="int8",
        calibration_data=samples_of(bundle, samples),
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(output),
        log_level="WARNING",
    )


if __name__ == "__main__":
    main()
