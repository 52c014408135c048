"""How many damaged files gpuopt's readers take before one of them does what it may not.

    python benchmarks/fuzz.py [--seconds 60] [--seed 0] [--surface NAME] [--atheris PYTHON] [--output FILE]

Each surface (a reader of bytes that gpuopt did not write) reads files in a process of its own for so many seconds:
valid ones, damaged by their form: bytes, JSON and YAML trees, headers, ONNX graphs, members of archives. A finding is
an exception that is no error of gpuopt's, a message of more than three lines, 20 seconds for one file, more memory than
the documented limit, a started process, a connection, an unpickled call, or a change outside of the folder. A
library that crashes ends a process; `crashes` counts that: in gpuopt's worker it takes a stage along and no more.

With --atheris, the Python of an environment that has atheris and gpuopt's packages, the pure-Python readers are fuzzed
guided by coverage, too. Damaged files of findings are kept in ./fuzz-findings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.fuzzing.guard import MOST_SECONDS  # noqa: E402
from tests.fuzzing.readers import SURFACES  # noqa: E402

KEPT = Path("fuzz-findings")
IMPORTS_SECONDS = 60


@dataclass
class Result:
    """What one surface gave."""

    surface: str
    inputs: int = 0
    crashes: int = 0
    findings: Counter[str] = field(default_factory=Counter)


def fuzz(surface: str, seconds: float, seed: int, python: str, module: str) -> Result:
    """Fuzz one surface for so long; a process that a library ends is followed by another one."""
    result = Result(surface)
    left, turn = seconds, seed * 1000
    while left > 1:
        with tempfile.TemporaryDirectory() as name:
            command = [python, "-m", module, surface, name, "--seed", str(turn), "--seconds", f"{left:.0f}"]
            try:
                env = {
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
                }
                done = subprocess.run(
                    command, env=env, capture_output=True, text=True, timeout=left + MOST_SECONDS + IMPORTS_SECONDS
                )
                code, said = done.returncode, done.stdout
            except subprocess.TimeoutExpired as error:
                code, said = None, (error.stdout or b"").decode()
            lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
            for found in (line for line in lines if "kind" in line):
                result.findings[f"{found['kind']}: {found['what']}"] += 1
            read = next((line["inputs"] for line in lines if "inputs" in line), None)
            if read is None and code == 0:
                read = int((Path(name) / "at-work").read_text())
            if read is not None:
                result.inputs += read
                left = 0
            else:
                at_work = Path(name) / "at-work"
                result.inputs += int(at_work.read_text()) + 1 if at_work.exists() else 0
                if code is None:
                    result.findings["hang: in native code"] += 1
                else:
                    result.crashes += 1
                left /= 2
                turn += 1
            kept = KEPT / surface.replace("/", "-").replace(" ", "-")
            if (Path(name) / "findings").is_dir():
                shutil.copytree(Path(name) / "findings", kept, dirs_exist_ok=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="for each surface")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--surface", action="append", help="one of them; repeatable; default: all")
    parser.add_argument("--atheris", help="a Python with atheris")
    parser.add_argument("--output", type=Path, help="write the table into a file, too")
    options = parser.parse_args()
    jobs = [(one, sys.executable, "tests.fuzzing.child") for one in SURFACES]
    if options.atheris:
        jobs += [(one, options.atheris, "tests.fuzzing.guided") for one in SURFACES if one.is_python]
    rows, broken = [], []
    for number, (one, python, module) in enumerate(jobs, 1):
        if options.surface and one.name not in options.surface:
            continue
        found = fuzz(one.name, options.seconds, options.seed, python, module)
        way = "by coverage (atheris)" if module.endswith("guided") else "by form"
        rows.append(f"| {one.name} | {way} | {found.inputs} | {found.crashes} | {sum(found.findings.values())} |")
        broken += [f"- {one.name}: {what} ({count} times)" for what, count in found.findings.items()]
        print(f"{number}/{len(jobs)} {rows[-1]}", file=sys.stderr, flush=True)
    text = "\n".join(
        [
            "# Fuzzing",
            "",
            f"`python benchmarks/fuzz.py --seconds {options.seconds:g} --seed {options.seed}"
            f"{' --atheris PYTHON' if options.atheris else ''}`; {platform.machine()}, Python "
            f"{platform.python_version()}.",
            "",
            "| reader | damaged | files read | crashes of libraries | findings |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            *(["", *broken] if broken else []),
            "",
        ]
    )
    print(text)
    if options.output:
        options.output.write_text(text)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
