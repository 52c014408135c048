"""A short, seeded part of the fuzzing: every reader takes damaged files. `benchmarks/fuzz.py` is the long one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuopt.errors import GpuoptError
from tests.fuzzing.mutation import evil_pickle, mutate
from tests.fuzzing.readers import SURFACES, Surface, surface

ROOT = Path(__file__).parents[2]
INPUTS = 40
INPUTS_OF_BUNDLES = 10
"""Of a bundle, every reader of bundles is called."""


@pytest.mark.parametrize("chosen", [one for one in SURFACES if not one.torch], ids=lambda one: one.name)
def test_damaged_files_are_refused_in_words(chosen: Surface, tmp_path: Path) -> None:
    count = INPUTS_OF_BUNDLES if chosen.name.startswith("bundle") else INPUTS
    command = [sys.executable, "-m", "tests.fuzzing.child", chosen.name, str(tmp_path), "--inputs", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.stderr[-2000:], (tmp_path / "at-work").read_text())
    assert said[-1].get("inputs") == count
    assert said[:-1] == []


def test_the_fuzzer_finds_what_it_looks_for(tmp_path: Path) -> None:
    """Each kind of finding, seeded into a reader that has it."""
    script = (
        "import os, pickle, sys, time\n"
        "from pathlib import Path\n"
        "from tests.fuzzing import guard\n"
        "guard.MOST_SECONDS = 4\n"
        "watch = guard.Guard(Path(sys.argv[1]))\n"
        "readers = {\n"
        "    'exception': lambda: {}['key'],\n"
        "    'hang': lambda: time.sleep(30),\n"
        "    'memory': lambda: bytearray(700 << 20),\n"
        "    'forbidden': lambda: pickle.loads(Path(sys.argv[2]).read_bytes()),\n"
        "    'elsewhere': lambda: open(sys.argv[1] + '-elsewhere', 'w'),\n"
        "    'nothing': lambda: open(sys.argv[1] + '/inside', 'w').close(),\n"
        "}\n"
        "print({name: found.kind if (found := watch.check(read)) else '' for name, read in readers.items()})\n"
    )
    (tmp_path / "evil").write_bytes(evil_pickle())
    (tmp_path / "folder").mkdir()
    command = [sys.executable, "-c", script, str(tmp_path / "folder"), str(tmp_path / "evil")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(
        {"exception": "exception", "hang": "hang", "memory": "memory", "forbidden": "forbidden",
         "elsewhere": "forbidden", "nothing": ""}
    )  # fmt: skip
    assert not (tmp_path / "gpuopt-fuzz-canary").exists()


@pytest.mark.parametrize("name", ["recipe", "sweep", "ranges and TensorRT's calibration caches"])
def test_text_files_are_read_or_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = surface(name)
    monkeypatch.chdir(tmp_path)
    seeds = chosen.seeds(tmp_path)
    path = tmp_path / chosen.file

    @settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False), st.sampled_from(seeds))
    def read(random: Random, seed: bytes) -> None:
        path.write_bytes(mutate(seed, random))
        try:
            chosen.read(path)
        except GpuoptError as error:
            assert type(error) is not GpuoptError, error.message  # noqa: PT017 - every error, not one that is expected
            assert len(error.lines().splitlines()) <= 3  # noqa: PT017

    read()
