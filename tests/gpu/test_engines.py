"""Engines of TensorRT, built and run on the GPU here."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import gpuopt
from gpuopt import engine_record
from gpuopt.backends.tensorrt import inspector
from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.bench import engine_race
from gpuopt.bench.subjects import EngineSubject
from gpuopt.cuda.device import Device
from gpuopt.errors import DataError, EngineError
from tests.gpu.networks import build_engine, images, profile, residual_network

_TF32 = 5e-3


@pytest.fixture
def options(tactic_sources: tuple[str, ...]) -> BuildOptions:
    return BuildOptions(precision="fp32", tactic_sources=tactic_sources)


def expected(model: onnx.ModelProto, feed: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": feed})[0]


def relative_error(actual: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(actual - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_an_engine_computes_what_onnx_runtime_does_at_every_batch(
    cuda_graph: bool, options: BuildOptions, tmp_path: Path
) -> None:
    model = residual_network()
    path, _ = build_engine(tmp_path, model, (profile(),), options)
    with gpuopt.load(path, cuda_graph=cuda_graph) as engine:
        assert engine.inputs[0].shape == ("batch", 3, 32, 32)
        for batch in (1, 4, 8, 3, 8, 1):
            feed = images(batch, seed=batch)
            found = engine.infer({"image": feed})["logits"]
            assert found.shape == (batch, 10)
            assert relative_error(found, expected(model, feed)) < _TF32
        with pytest.raises(DataError, match="input 'image' has the shape 9x3x32x32, the engine takes 1x3x32x32 to 8x"):
            engine.infer({"image": images(9)})
        with pytest.raises(DataError, match="float64, the model takes float32"):
            engine.infer({"image": images(1).astype(np.float64)})


def test_several_profiles(options: BuildOptions, tmp_path: Path) -> None:
    model = residual_network()
    path, _ = build_engine(tmp_path, model, (profile(1, 1, 2), profile(4, 8, 16)), options)
    with gpuopt.load(path) as engine:
        for batch in (2, 16, 1, 4):
            feed = images(batch)
            assert relative_error(engine.infer({"image": feed})["logits"], expected(model, feed)) < _TF32
        with pytest.raises(DataError, match="1x3x32x32 to 2x3x32x32 or 4x3x32x32 to 16x3x32x32"):
            engine.infer({"image": images(3)})


def test_nothing_is_allocated_once_a_shape_was_seen(options: BuildOptions, tmp_path: Path) -> None:
    path, _ = build_engine(tmp_path, residual_network(), (profile(),), options)
    with gpuopt.load(path) as engine:
        pools: Any = engine._engine.pools  # type: ignore[attr-defined]
        for batch in (8, 1, 4):
            engine.infer({"image": images(batch)})
        held = pools.device.held_bytes, pools.pinned.held_bytes
        for index in range(200):
            engine.infer({"image": images((8, 1, 4)[index % 3])})
        assert (pools.device.held_bytes, pools.pinned.held_bytes) == held


def test_two_engines_at_once_and_any_order_of_closing(options: BuildOptions, tmp_path: Path) -> None:
    first, _ = build_engine(tmp_path, residual_network(seed=1), (profile(),), options, "first")
    second, _ = build_engine(tmp_path, residual_network(seed=2), (profile(),), options, "second")
    one, two = gpuopt.load(first), gpuopt.load(second)
    feed = {"image": images(4)}
    assert not np.allclose(one.infer(feed)["logits"], two.infer(feed)["logits"])
    one.close()
    two.infer(feed)
    two.close()
    two.close()


@pytest.mark.parametrize("is_full", [False, True])
def test_engines_in_a_race_are_loaded_anew(
    is_full: bool, options: BuildOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, _ = build_engine(tmp_path, residual_network(channels=512), (profile(),), options, "wide")
    narrow, _ = build_engine(tmp_path, residual_network(), (profile(),), options, "narrow")
    addresses: list[int] = []
    executions: list[Any] = []
    closed: list[int] = []

    class Watched(EngineSubject):
        def __init__(self, execution: Any, **how: Any) -> None:
            super().__init__(execution, **how)
            addresses.append(next(iter(execution._buffers.values())).address)
            executions.append(execution)
            closed.append(sum(one._context is None for one in executions))

    monkeypatch.setattr(engine_race, "EngineSubject", Watched)
    told: list[tuple[int, int]] = []
    with Device() as device:
        if is_full:
            answers = itertools.cycle((10, 4))
            monkeypatch.setattr(device, "free_bytes", lambda: next(answers))
        racing = engine_race.Racing({"wide": wide, "narrow": narrow}, seconds=0.3)
        found = engine_race.race_engines(racing, device, lambda done, total: told.append((done, total)))
    assert found.fastest == "narrow"
    assert found.loads == engine_race.LOADS
    assert {len(rounds) for rounds in found.rounds.values()} == {engine_race.ROUNDS}
    assert found.ratio("wide", "narrow").low > 1
    assert told == [(load + 1, engine_race.LOADS) for load in range(engine_race.LOADS)]
    # Each load has two executions; where memory is short, those of the loads before are closed.
    assert closed == [2 * load if is_full else 0 for load in range(engine_race.LOADS) for _ in range(2)]
    assert is_full or len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("ending", ["", "engine.close()", "del engine", "raise SystemExit(0)"])
def test_a_process_ends_well_whatever_is_open(ending: str, options: BuildOptions, tmp_path: Path) -> None:
    path, _ = build_engine(tmp_path, residual_network(), (profile(),), options)
    script = (
        "import sys, numpy, gpuopt\n"
        "engine = gpuopt.load(sys.argv[1], cuda_graph=True)\n"
        "engine.infer({'image': numpy.zeros((2, 3, 32, 32), numpy.float32)})\n" + ending
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_cut_changed_or_foreign_engine_is_refused_before_it_is_deserialised(
    options: BuildOptions, tmp_path: Path
) -> None:
    path, _ = build_engine(tmp_path, residual_network(), (profile(),), options)
    plan, record = path.read_bytes(), engine_record.read(path)

    def refusal() -> str:
        with pytest.raises(EngineError) as caught:
            gpuopt.load(path)
        return caught.value.message

    path.write_bytes(plan[:5000])
    assert "was cut off or replaced" in refusal()
    path.write_bytes(plan[:1000] + b"\xff" * 64 + plan[1064:])
    assert "was changed: SHA-256" in refusal()
    path.write_bytes(plan)
    for changes, message in (
        ({"library_version": "7.2.3.4"}, "was built with TensorRT 7.2.3.4"),
        ({"compute_capabilities": ("5.0",)}, "was built for compute capability 5.0"),
        ({"driver_version": "99.0"}, "was built with a driver for CUDA 99.0"),
    ):
        engine_record.write(path, record.model_copy(update=changes))
        assert message in refusal()
    # A record that fits a poisoned plan: TensorRT's own refusal.
    poisoned = b"\xff" * 64 + plan[64:]
    path.write_bytes(poisoned)
    import hashlib

    engine_record.write(path, record.model_copy(update={"sha256": hashlib.sha256(poisoned).hexdigest()}))
    assert "refuses model.engine" in refusal()
    engine_record.record_path(path).unlink()
    assert "has no record" in refusal()


def test_layers_and_their_times(options: BuildOptions, tmp_path: Path) -> None:
    from gpuopt.backends.tensorrt.runtime import LoadedEngine
    from gpuopt.cuda.device import Device

    path, _ = build_engine(tmp_path, residual_network(), (profile(),), dataclasses.replace(options, precision="fp16"))
    with Device() as device:
        engine = LoadedEngine.open(path, device, engine_record.read(path))
        found = inspector.layers(engine.layer_information())
        with engine.execution({"image": (8, 3, 32, 32)}) as execution:
            times = {time.name: time.milliseconds for time in execution.time_layers(10)}
            assert execution.device_bytes > 0
        shares = inspector.coverage(found, times)
        engine.close()
    assert {layer.name for layer in found if not layer.is_free} <= set(times)
    assert shares.milliseconds is not None
    assert shares.milliseconds > 0
    names = {node.name for node in residual_network().graph.node}
    assert names & {node for layer in found for node in layer.onnx_nodes}


def test_vectorised_formats_keep_the_values(options: BuildOptions, tmp_path: Path) -> None:
    model = residual_network()
    settings = dataclasses.replace(options, precision="fp16", io_formats=(("image", "fp16:hwc8"),))
    path, _ = build_engine(tmp_path, model, (profile(),), settings)
    with gpuopt.load(path) as engine:
        assert engine._engine.io_formats["image"] == "fp16:hwc8"  # type: ignore[attr-defined]
        feed = images(4)
        found = engine.infer({"image": feed.astype(np.float16)})["logits"]
        assert relative_error(found, expected(model, feed)) < 2e-2


def test_a_model_with_nan_is_found_out(options: BuildOptions, tmp_path: Path) -> None:
    model = residual_network()
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == "b3")
    values = np.zeros(10, np.float32)
    values[3] = np.nan
    weights.raw_data = values.tobytes()
    path, _ = build_engine(tmp_path, model, (profile(),), options)
    with gpuopt.load(path) as engine:
        assert np.isnan(engine.infer({"image": images(2)})["logits"][:, 3]).all()
