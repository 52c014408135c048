"""A process that damages files of one surface and reads them, one after the other.

    python -m tests.fuzzing.child SURFACE FOLDER --seed 1 --inputs 500 --seconds 60

It prints a JSON line when it begins with an input that might end the process, and one a finding; the last line has
the sums. Inputs with findings lie in FOLDER/findings. Whoever started it knows from its exit code whether a library
crashed; the input at work then is FOLDER/at-work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from random import Random

from tests.fuzzing.guard import Finding, Guard
from tests.fuzzing.mutation import mutate
from tests.fuzzing.readers import Surface, prepare, surface


def run(chosen: Surface, folder: Path, seed: int, inputs: int, seconds: float) -> None:
    """Read damaged files until a number or a time is reached; see the module."""
    warnings.simplefilter("ignore")
    # What readers make for themselves lies inside, too, and what they leave there is seen.
    tempfile.tempdir = str(folder)
    path, seeds = prepare(chosen, folder / "read")
    guard = Guard(folder)
    for undamaged in seeds:
        # Imports and caches of libraries are no growth of memory.
        path.write_bytes(undamaged)
        if (found := guard.check(lambda: chosen.read(path))) and found.kind != "memory":
            say(folder, undamaged, found)
    ends, count = time.monotonic() + seconds, 0
    while count < inputs and time.monotonic() < ends:
        random = Random(f"{chosen.name}/{seed}/{count}")
        data = mutate(random.choice(seeds), random)
        path.write_bytes(data)
        (folder / "at-work").write_text(str(count))
        if found := guard.check(lambda: chosen.read(path), chosen.most_bytes):
            path.write_bytes(data)
            say(folder, data, found)
        count += 1
    print(json.dumps({"inputs": count, "seeds": len(seeds)}), flush=True)


def say(folder: Path, data: bytes, found: Finding) -> None:
    """Keep the input and print the finding."""
    name = hashlib.sha256(data).hexdigest()[:16]
    (folder / "findings").mkdir(exist_ok=True)
    (folder / "findings" / name).write_bytes(data)
    print(json.dumps({"kind": found.kind, "what": found.what, "input": name}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("surface")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=sys.maxsize)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    options = parser.parse_args()
    run(surface(options.surface), options.folder.resolve(), options.seed, options.inputs, options.seconds)


if __name__ == "__main__":
    main()
