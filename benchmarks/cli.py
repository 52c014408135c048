"""How long a script waits for gpuopt: the help text, a first compile, and an unchanged second one.

    python benchmarks/cli.py [--repeats 5]

Floor: `python -c pass` is what any Python program costs; a first compile cannot be faster than
importing torch and running its exporter, which is timed beside it; an unchanged compile must hash
the model, the data and the cached artifacts once.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXPORT_ONLY = (
    "import sys, torch; p = torch.export.load(open(sys.argv[1], 'rb')); "
    "torch.onnx.export(p, dynamo=True, opset_version=20, verbose=False)"
)


def seconds(command: list[str], folder: Path, env: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    gpuopt = [sys.executable, "-m", "gpuopt"]
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = dict(os.environ)
        subprocess.run([sys.executable, str(ROOT / "examples/digits.py"), "train", "--output", str(folder)], check=True)
        for repeat in range(repeats):
            env = {**plain, "GPUOPT_CACHE_DIR": str(folder / f"cache{repeat}")}
            job = [*gpuopt, "compile", "model.pt", "--precision", "int8"]
            measured = {
                "python -c pass": ([sys.executable, "-c", "pass"], plain),
                "gpuopt --help": ([*gpuopt, "--help"], plain),
                "torch.onnx.export alone": ([sys.executable, "-c", EXPORT_ONLY, "model.pt"], plain),
                "compile, empty cache": (job, env),
                "compile, unchanged": (job, env),
            }
            for label, (command, environment) in measured.items():
                rows.setdefault(label, []).append(seconds(command, folder, environment))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {repeats} repeats")
    print(f"{'':<26}{'median s':>10}{'min s':>10}{'max s':>10}")
    for label, values in rows.items():
        print(f"{label:<26}{statistics.median(values):>10.2f}{min(values):>10.2f}{max(values):>10.2f}")


if __name__ == "__main__":
    main()
