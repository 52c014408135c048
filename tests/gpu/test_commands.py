"""The commands, on engines of TensorRT and the GPU here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from gpuopt.bench.engine_race import LOADS
from tests.conftest import python_path
from tests.gpu.networks import images, residual_network

SHAPES = ("--min-shapes", "image:1x3x32x32", "--opt-shapes", "image:4x3x32x32", "--max-shapes", "image:8x3x32x32")
ROOT = Path(__file__).parents[2]


class Commands:
    """Runs gpuopt in a folder with a model, calibration data and a cache of its own."""

    def __init__(self, folder: Path, tactic_sources: tuple[str, ...]) -> None:
        self.folder = folder
        self._sources = ("--set", f"build.tactic_sources=[{', '.join(tactic_sources)}]") if tactic_sources else ()
        onnx.save(residual_network(), folder / "model.onnx")
        np.savez(folder / "calibration.npz", image=images(64))

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gpuopt", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env={**os.environ, "GPUOPT_CACHE_DIR": str(self.folder / "cache"), "PYTHONPATH": python_path(ROOT)},
        )

    def compile(
        self, *arguments: str, shapes: tuple[str, ...] = SHAPES, model: str = "model.onnx"
    ) -> subprocess.CompletedProcess[str]:
        return self("compile", model, "-t", "tensorrt", "--json", *shapes, *self._sources, *arguments)

    def report(self, *arguments: str) -> Any:
        done = self(*arguments)
        assert done.returncode == 0, done.stderr + done.stdout[-3000:]
        return json.loads(done.stdout)

    def compiled(self, *arguments: str, shapes: tuple[str, ...] = SHAPES, model: str = "model.onnx") -> Any:
        done = self.compile(*arguments, shapes=shapes, model=model)
        assert done.returncode == 0, done.stderr + done.stdout[-3000:]
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    from gpuopt import environment
    from tests.gpu.conftest import why_no_tensorrt

    if reason := why_no_tensorrt():
        pytest.skip(reason)
    version = environment.tensorrt_version()
    sources = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS") if version is not None and version[0] == 8 else ()
    return Commands(tmp_path_factory.mktemp("commands"), sources)


@pytest.mark.parametrize("precision", ["int8", "fp16", "fp32"])
def test_compile_builds_proves_and_tells(precision: str, commands: Commands) -> None:
    # Whether INT8 pays on so small a network is not asked here.
    arguments = ("-p", precision, "-o", f"{precision}.gpuopt", "--set", "speed.check=false")
    report = commands.compiled(*arguments)
    engine = next(e for e in report["engines"] if e["target"] == "tensorrt")
    assert engine["status"] == "verified"
    proof = engine["proof"]
    assert {row["corner"] for row in proof["outputs"]} == {"profile0-min", "profile0-opt", "profile0-max"}
    assert proof["batch_invariance"]["checked"]
    assert proof["coverage"]["layers"].get(precision, 0) >= 3
    verified = commands.report("verify", f"{precision}.gpuopt", "--json")
    assert {e["target"]: e["status"] for e in verified["engines"]}["tensorrt"] == "verified"
    again = commands.compiled(*arguments)
    assert all(stage["cached"] for stage in again["stages"])


def test_a_demanded_share_of_int8_that_is_missed_has_its_exit_code(commands: Commands) -> None:
    arguments = ("-p", "int8", "-o", "share.gpuopt", "--nodes-to-exclude", "conv*", "--set", "speed.check=false")
    done = commands.compile(*arguments, "--min-precision-coverage", "95%")
    assert done.returncode == 12, done.stderr
    assert json.loads(done.stdout)["error"]["kind"] == "precision"


def test_auto_ships_the_fastest(commands: Commands) -> None:
    report = commands.compiled("-p", "auto", "-o", "auto.gpuopt", "--set", "speed.seconds=1")
    race = report["race"]
    measured = {row["name"]: row["milliseconds"] for row in race["candidates"] if row["milliseconds"]}
    assert {"fp32", "fp16", "int8"} <= set(measured)
    assert race["target"] == "tensorrt"
    assert race["includes"].endswith(f"; loaded {LOADS} times")
    # Equals within the noise are left to the more precise one.
    assert measured[race["chosen"]] <= 1.05 * min(measured.values())
    assert report["precision"] in ("fp32", "fp16", "int8")


def test_int8_that_is_slower_than_fp16_is_not_shipped(commands: Commands) -> None:
    done = commands.compile("-p", "int8", "-o", "slow.gpuopt")
    race = json.loads(done.stdout)["race"]
    slower = race["ratio_to_fp16"]["int8"]["low"] > 1
    assert done.returncode == (13 if slower else 0), done.stderr
    assert (commands.folder / "slow.gpuopt").is_dir() != slower


def test_tensorrt_s_own_quantizer(commands: Commands) -> None:
    arguments = ("-p", "int8", "--quantizer", "tensorrt", "-o", "native.gpuopt", "--set", "speed.check=false")
    # Wide enough that INT8 is the fastest by far: the builder chooses freely.
    onnx.save(residual_network(channels=512), commands.folder / "wide.onnx")
    report = commands.compiled(*arguments, model="wide.onnx")
    proof = next(e["proof"] for e in report["engines"] if e["target"] == "tensorrt")
    assert "int8" in proof["coverage"]["layers"]
    assert (commands.folder / "native.gpuopt/model.tensorrt.calibration").read_bytes().startswith(b"TRT-")


@pytest.mark.parametrize("quantizer", ["gpuopt", "tensorrt"])
def test_the_fastest_of_several_attempts_is_kept(quantizer: str, commands: Commands) -> None:
    shared, own = commands.folder / "shared.timing", commands.folder / f"{quantizer}.timing"
    asked = ("-p", "int8", "--quantizer", quantizer, "--set", "speed.check=false")
    if not shared.exists():
        # Another engine of the network times its layers into the same cache; the option makes it one not built yet.
        filling = ("--timing-cache", str(shared), "--set", "build.repairs=false")
        commands.compiled("-p", "fp16", *filling, "-o", "filling.gpuopt")
    size = shared.stat().st_size
    bundle = f"attempts-{quantizer}.gpuopt"
    done = commands.compile(*asked, "--timing-cache", str(shared), "-o", bundle, "--set", "build.attempts=3")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    facts = next(s["facts"] for s in report["stages"] if s["name"] == "build")
    times = [row["milliseconds"] for row in facts["attempts"]]
    assert len(times) == 3
    assert [row["kept"] for row in facts["attempts"]].index(True) == times.index(min(times))
    assert sum(row["kept"] for row in facts["attempts"]) == 1
    assert all(row["lowest"] <= row["milliseconds"] <= row["highest"] for row in facts["attempts"])
    assert facts["timing_cache"]["file"] == str(shared)
    assert facts["timing_cache"]["read_bytes"] == size > 0
    assert facts["timing_cache"]["written_bytes"] == shared.stat().st_size
    assert f"attempt {times.index(min(times)) + 1} is the fastest of" in done.stderr
    # The timings beside the engine give it again.
    beside = commands.folder / bundle / "model.tensorrt.timing"
    shutil.copyfile(beside, own)
    settings = ("build.attempts=1", f"build.timing_cache={own}", "build.require_timing_cache=true")
    anew = ("-t", "tensorrt", "--json", "--no-cache", *(word for setting in settings for word in ("--set", setting)))
    for _ in range(2):
        again = commands.report("build", bundle, *anew)
        assert _tactics(report) == _tactics(again) != []
        assert beside.is_file()


def _tactics(report: Any) -> list[tuple[str, str]]:
    return [(layer["name"], layer["tactic"]) for e in report["engines"] if e["proof"] for layer in e["proof"]["layers"]]


def test_a_bundle_made_elsewhere_is_built_here(commands: Commands) -> None:
    from gpuopt import environment

    version = environment.tensorrt_version()
    legacy = ("--set", "build.legacy=true") if version is not None and version[0] < 10 else ()
    commands.compiled("-p", "int8", "--no-build", "-o", "portable.gpuopt", *legacy)
    assert not (commands.folder / "portable.gpuopt/model.tensorrt.engine").exists()
    report = commands.report("build", "portable.gpuopt", "--json")
    assert {e["target"]: e["status"] for e in report["engines"]}["tensorrt"] == "verified"
    assert (commands.folder / "portable.gpuopt/model.tensorrt.engine").is_file()
    script = (
        "import gpuopt, numpy\n"
        "with gpuopt.load('portable.gpuopt', cuda_graph=True) as engine:\n"
        "    assert engine.target == 'tensorrt'\n"
        "    print(engine.infer({'image': numpy.zeros((2, 3, 32, 32), numpy.float32)})['logits'].shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=commands.folder
    )
    assert done.stdout.strip() == "(2, 10)", done.stderr


def test_bench_measures_every_group(commands: Commands) -> None:
    commands.compiled("-p", "fp16", "-o", "fp16.gpuopt")
    report = commands.report("bench", "fp16.gpuopt", "--seconds", "0.2", "--json")
    groups: dict[str, list[Any]] = {}
    for row in report["rows"]:
        groups.setdefault(row["group"], []).append(row)
    assert {"latency", "loads", "phases", "overlap", "streams", "batches", "baselines"} <= set(groups)
    assert [row["name"] for row in groups["loads"]] == [f"load {number + 1}" for number in range(LOADS)]
    assert all(0 < row["lowest_ms"] <= row["back_to_back_ms"] <= row["highest_ms"] for row in groups["loads"])
    for group in ("latency", "phases", "batches"):
        for row in groups[group]:
            assert not row["failed"], row
            assert row["latency_ms"]["p50"]["value"] > 0
    by_name = {row["name"]: row for row in groups["latency"]}
    whole, compute = by_name["end to end, page-locked"], by_name["compute"]
    assert whole["latency_ms"]["p50"]["value"] > compute["back_to_back_ms"]
    assert report["memory"]["execution_bytes"] > 0
    assert report["memory"]["shape_change_ms_with_pool"] > 0
    assert report["gpu"].startswith("NVIDIA")
    assert report["conditions"]["sm_mhz"] or report["conditions"]["note"]


def test_a_static_engine_runs_at_several_depths_and_streams(commands: Commands) -> None:
    commands.compiled("-p", "fp16", "-o", "static.gpuopt", shapes=("--input", "image:4x3x32x32"))
    flags = ("--only", "overlap", "--only", "streams", "--only", "memory", "--seconds", "0.2")
    report = commands.report(
        "bench", "static.gpuopt", *flags, "--beside", "static.gpuopt/model.tensorrt.engine", "--json"
    )
    assert not [row for row in report["rows"] if row["failed"]]
    assert [row["name"] for row in report["rows"]] == [
        "depth 1", "depth 2", "depth 3", "1 stream", "2 streams", "4 streams",
        "this engine alone", "model.tensorrt.engine alone", "both at once, a pair",
    ]  # fmt: skip
    assert report["memory"]["lost_bytes_with_pool"] == 0


def test_an_engine_with_inputs_in_fp16_is_proved(commands: Commands) -> None:
    report = commands.compiled("-p", "fp16", "-o", "fp16-input.gpuopt", "--io-format", "image=fp16:hwc8")
    proof = next(e["proof"] for e in report["engines"] if e["target"] == "tensorrt")
    assert proof["io_formats"]["image"] == "fp16:hwc8"
    assert proof["passed"]


def test_profile_names_every_layer(commands: Commands) -> None:
    commands.compiled("-p", "fp16", "-o", "fp16.gpuopt")
    report = commands.report("profile", "fp16.gpuopt", "--json")
    assert report["sum_ms"] >= 0.5 * report["latency_ms"] > 0
    computing = [layer for layer in report["layers"] if layer["op_types"]]
    assert {"Conv"} <= {op for layer in computing for op in layer["op_types"]}
    assert any(layer["operations"] > 0 for layer in computing)
    assert any(command.startswith("nsys profile") for command in report["commands"])
    if "H100" in report["where"]:
        assert report["floor_ms"] is None or 0 < report["floor_ms"] < report["sum_ms"]
