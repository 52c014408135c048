"""Faults in the middle of a run: the old bundle stays whole, the next run passes, the cache is not believed when wrong.

A few points of each kind are walked here; `python benchmarks/faults.py` walks them all.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpuopt import bundle
from tests.conftest import Gpuopt
from tests.faults.points import Action
from tests.faults.walk import Walk
from tests.integration import small

SHAPE = ("-t", "onnxruntime", "-i", "x:4x16x8x8")
SAMPLES: dict[Action, int] = {"kill": 7, "interrupt": 3, "full disk": 4}


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return Walk(tmp_path_factory.mktemp("walk"))


@pytest.mark.parametrize("action", SAMPLES)
def test_a_run_that_is_cut_off_loses_nothing(walk: Walk, action: Action) -> None:
    every = len(walk.points) // SAMPLES[action]
    for at in range(every // 2, len(walk.points), every):
        assert walk.step(action, at) == "", f"{at}: {walk.points[at]}"


def test_the_exchange_of_old_and_new_is_one_step(walk: Walk) -> None:
    exchange = max(at for at, point in enumerate(walk.points) if point.startswith("ctypes.dlsym"))
    for at in (exchange - 1, exchange, exchange + 1, len(walk.points) - 1):
        assert walk.step("kill", at) == "", walk.points[at]


def test_a_flipped_bit_in_the_cache_is_not_believed(walk: Walk) -> None:
    files = walk.cached_files()
    for number in range(0, files, files // 4):
        assert walk.flip(number) == ""


@pytest.mark.parametrize(
    "shifts", [itertools.repeat(-2e9), itertools.cycle([1e8, -1e8])], ids=["a clock in 1970", "a clock that jumps"]
)
def test_the_clock_decides_nothing(walk: Walk, shifts: Iterator[float]) -> None:
    assert walk.with_clock(shifts) == ""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("a file system of its own needs the command mount")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "gpuopt-test", str(folder)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("a file system of its own can be mounted by root alone, and here not even by it")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def remounted(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass


def graph(folder: Path) -> Path:
    from tests.unit.quantization.graphs import depthwise_block

    path = folder / "model.onnx"
    path.write_bytes(depthwise_block().SerializeToString())
    return path


def test_a_disk_that_is_full_keeps_the_old_bundle(gpuopt: Gpuopt, disk: Path, tmp_path: Path) -> None:
    def compiled(*flags: str) -> tuple[int, str]:
        model, output = graph(tmp_path), disk / "out/model.gpuopt"
        done = gpuopt("compile", model, *SHAPE, "-o", output, "--cache-dir", tmp_path / "cache", *flags)
        return done.code, done.stderr

    assert compiled("-p", "fp32")[0] == 0
    before = bundle.open_bundle(disk / "out/model.gpuopt")
    fill(disk / "filler")
    code, said = compiled("-p", "fp16")
    assert (code, "Free some space" in said) == (10, True), said
    assert bundle.open_bundle(disk / "out/model.gpuopt") == before
    (disk / "filler").unlink()
    assert compiled("-p", "fp16")[0] == 0
    assert [path.name for path in (disk / "out").iterdir()] == ["model.gpuopt"]


def test_a_read_only_cache_serves_what_it_has(gpuopt: Gpuopt, disk: Path, tmp_path: Path) -> None:
    arguments = ("compile", graph(tmp_path), *SHAPE, "--cache-dir", disk / "cache", "--json")
    assert gpuopt(*arguments, "-p", "fp32").code == 0
    remounted(disk, "ro")
    again = gpuopt(*arguments, "-p", "fp32")
    assert again.code == 0, again.stderr
    assert all(stage["cached"] for stage in again.report()["stages"])
    refused = gpuopt(*arguments, "-p", "fp16")
    assert refused.code == 10, refused.stderr
    assert "--cache-dir" in refused.stderr
    assert bundle.open_bundle(tmp_path / "model.gpuopt")["precision"] == "fp32"
    remounted(disk, "rw")
    assert gpuopt(*arguments, "-p", "fp16").code == 0


def test_two_runs_on_one_output_folder_leave_one_whole_bundle(gpuopt: Gpuopt, tmp_path: Path) -> None:
    model = graph(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            runs = [
                pool.submit(gpuopt, "compile", model, *SHAPE, "-p", precision, "-q", "--no-cache")
                for precision in ("fp32", "fp16")
            ]
            assert [run.result().code for run in runs] == [0, 0], [run.result().stderr for run in runs]
            assert bundle.open_bundle(tmp_path / "model.gpuopt")["precision"] in ("fp32", "fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gpuopt", "model.onnx"]


def test_a_time_limit_ends_the_run_its_worker_and_nothing_else(gpuopt: Gpuopt, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ndef build():\n    time.sleep(600)\n")
    own = {"GPUOPT_CACHE_DIR": str(tmp_path / "cache")}
    arguments = ("compile", "slow:build", "-p", "fp32", "-i", "x:1x4", "-t", "onnxruntime", "-o", tmp_path / "out")
    started = time.monotonic()
    done = gpuopt(*arguments, "--timeout", "6s", "--json", cwd=tmp_path, env=own, timeout=60)
    assert time.monotonic() - started < 30
    assert (done.code, done.report()["error"]["kind"]) == (18, "timeout"), done.stderr
    assert "time limit of 6 s" in done.stderr
    assert done.report()["error"]["stage"] == "export"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "cache", "out.failed", "slow.py",
    ]  # fmt: skip
    assert list((tmp_path / "cache/scratch").iterdir()) == []
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in processes.splitlines() if str(tmp_path) in line and "gpuopt" in line]


def test_a_time_limit_is_for_every_command_that_works_long(gpuopt: Gpuopt, tmp_path: Path) -> None:
    small.save("onnx", tmp_path / "model.onnx")
    small.save_data(tmp_path / "calibration.npz")
    own = {"GPUOPT_CACHE_DIR": str(tmp_path / "cache")}
    for command in ("quantize", "analyze"):
        done = gpuopt(command, tmp_path / "model.onnx", "--timeout", "0.4", "--json", env=own)
        assert (done.code, json.loads(done.stdout)["error"]["kind"]) == (18, "timeout"), done.stderr
    assert gpuopt("compile", tmp_path / "model.onnx", "-q", "--timeout", "9m", env=own).code == 0
    before = (tmp_path / "model.gpuopt/manifest.json").read_bytes()
    done = gpuopt("build", tmp_path / "model.gpuopt", "--no-cache", "--timeout", "0.2", env=own)
    assert done.code == 18, done.stderr
    assert (tmp_path / "model.gpuopt/manifest.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cache", "calibration.npz", "model.gpuopt", "model.onnx",
    ]  # fmt: skip


def test_what_a_killed_process_left_beside_a_file_goes_with_the_next_write(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; import gpuopt.storage as storage\n"
        "storage.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "storage.write_text(Path(sys.argv[1]), 'half')\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], env=dict(os.environ))
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".file.")
    from gpuopt.storage import write_text

    write_text(tmp_path / "file", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    shutil.rmtree(tmp_path)
