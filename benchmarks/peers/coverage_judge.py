"""Judge a peer's graph as gpuopt judges its own: ONNX Runtime against PyTorch at every corner, then TensorRT-RTX.

    python benchmarks/peers/coverage_judge.py MODEL.onnx FP32-BUNDLE fp16|int8

The bundle is that of the FP32 graph which the peer was given: its reference holds PyTorch's outputs. Prints a row.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gpuopt import reference
from gpuopt.backends.tensorrt import builder
from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.errors import GpuoptError, one_line
from gpuopt.progress import Silent
from gpuopt.recipe import VerifySection
from gpuopt.stages.verify import check

PASSED = "verified and built"


def main() -> None:
    graph, bundle, precision = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    stored = reference.load(bundle / "reference")
    row: dict[str, object] = {}
    said = []
    try:
        found = check({"model.onnx": graph}, stored, VerifySection(), precision)  # type: ignore[arg-type]
        cosines = [o["cosine"] for o in found["outputs"] if o["cosine"] is not None]
        row["cosine"] = min(cosines, default=None)
        said += [f"not verified: {found['failures'][0]}"] if found["failures"] else []
    except (GpuoptError, KeyError, ValueError) as error:
        said.append(f"ONNX Runtime: {one_line(error)}")
    try:
        # Each corner is a profile of its own shapes; the first one is what gpuopt builds for, too.
        builder.build("tensorrt-rtx", graph, stored.profiles, BuildOptions(precision=precision), Silent())  # type: ignore[arg-type]
    except GpuoptError as error:
        said.append(f"no engine: {one_line(error.message)}")
    row["outcome"] = PASSED if not said else said[0].partition(":")[0]
    row["message"] = "; ".join(said)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
