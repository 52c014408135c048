"""The readers written in Python, fuzzed by coverage with atheris, in an environment that has it.

    python -m tests.fuzzing.guided SURFACE FOLDER --seed 1 --seconds 60

Findings are told as by `tests.fuzzing.child`; how many files were read stands in FOLDER/at-work. libFuzzer chooses what
to damage next by the lines of gpuopt that a file reached; half of the time it damages bytes itself, half of the time it
is given a file damaged by its form.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from random import Random


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("surface")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    import atheris

    with atheris.instrument_imports(include=["gpuopt"]):
        import gpuopt.backends.tensorrt.preflight
        import gpuopt.bundle
        import gpuopt.cache
        import gpuopt.calibration.readers
        import gpuopt.calibration.reuse
        import gpuopt.comparing.command
        import gpuopt.inspection.command
        import gpuopt.inspection.integrity
        import gpuopt.model_file
        import gpuopt.recipe
        import gpuopt.sweep.plan  # noqa: F401
    from tests.fuzzing.child import say
    from tests.fuzzing.guard import Guard
    from tests.fuzzing.mutation import mutate
    from tests.fuzzing.readers import prepare, surface

    warnings.simplefilter("ignore")
    chosen, folder = surface(options.surface), options.folder.resolve()
    path, seeds = prepare(chosen, folder / "read")
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    tempfile.tempdir = str(folder)
    guard = Guard(folder)
    count = 0

    def test(data: bytes) -> None:
        nonlocal count
        count += 1
        (folder / "at-work").write_text(str(count))
        path.write_bytes(data)
        if found := guard.check(lambda: chosen.read(path), chosen.most_bytes):
            say(folder, data, found)

    def damage(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        changed = mutate(data, random) if random.random() < 0.5 else atheris.Mutate(data, most)
        return changed[:most]

    arguments = [sys.argv[0], f"-max_total_time={options.seconds:.0f}", f"-seed={options.seed + 1}", "-timeout=60"]
    arguments += ["-rss_limit_mb=0", "-max_len=1000000", "-verbosity=0", "-print_final_stats=0", str(corpus)]
    atheris.Setup(arguments, test, custom_mutator=damage)
    # libFuzzer ends the process itself, so that nothing can be told afterwards: FOLDER/at-work has the number.
    atheris.Fuzz()


if __name__ == "__main__":
    main()
