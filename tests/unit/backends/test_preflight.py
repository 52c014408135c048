"""Every reason for which an engine is not deserialised has its own message."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from gpuopt import engine_record
from gpuopt.backends.tensorrt.preflight import Here, check_file, check_machine
from gpuopt.engine_record import EngineRecord
from gpuopt.errors import EngineError

H100 = Here("8.5.3.1", "9.0", "NVIDIA H100", "12.4")


def record(**changes: Any) -> EngineRecord:
    plan = b"a plan"
    base = {
        "file": "model.engine", "sha256": hashlib.sha256(plan).hexdigest(), "size_bytes": len(plan),
        "target": "tensorrt", "library_version": "8.5.3.1", "version_compatible": False,
        "compute_capabilities": ("9.0",), "hardware_compatibility": "none", "gpu": "NVIDIA H100",
        "driver_version": "12.4", "precision": "int8", "inputs": (), "outputs": (), "profiles": (),
    }  # fmt: skip
    return EngineRecord.model_validate({**base, **changes})


def refusal(changes: dict[str, Any], here: Here = H100) -> str:
    try:
        check_machine(record(**changes), here)
    except EngineError as error:
        return error.message
    return ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        ({"library_version": "8.6.1"}, "model.engine was built with TensorRT 8.6.1, 8.5.3.1 is installed"),
        ({"library_version": "8.5.1", "version_compatible": True}, ""),
        ({"library_version": "8.6.1", "version_compatible": True}, "model.engine was built with TensorRT 8.6.1"),
        ({"library_version": "10.3.0", "version_compatible": True}, "model.engine was built with TensorRT 10.3.0"),
        ({"compute_capabilities": ("8.6",)}, "model.engine was built for compute capability 8.6, NVIDIA H100 has 9.0"),
        ({"compute_capabilities": ("8.6",), "hardware_compatibility": "ampere+"}, ""),
        ({"compute_capabilities": ()}, ""),
        (
            {"driver_version": "13.0"},
            "model.engine was built with a driver for CUDA 13.0, the one here is for CUDA 12.4",
        ),
        ({"driver_version": "12.2"}, ""),
    ],
)
def test_library_gpu_and_driver(changes: dict[str, Any], message: str) -> None:
    assert refusal(changes).startswith(message)
    assert bool(refusal(changes)) == bool(message)


@pytest.mark.parametrize(("capability", "fits"), [("7.5", False), ("8.0", True), ("8.6", True), ("10.0", True)])
def test_ampere_plus_is_for_8_0_and_newer(capability: str, fits: bool) -> None:
    engine = {"compute_capabilities": (), "hardware_compatibility": "ampere+"}
    told = refusal(engine, Here("8.5.3.1", capability, "a GPU", "12.4"))
    expected = f"model.engine was built for compute capability 8.0 and newer, a GPU has {capability}"
    assert told == ("" if fits else expected)


def test_tensorrt_rtx_runs_on_some_gpus() -> None:
    rtx = {"target": "tensorrt-rtx", "compute_capabilities": (), "driver_version": ""}
    assert "does not run on NVIDIA H100" in refusal(rtx)
    assert refusal(rtx, Here("8.5.3.1", "8.9", "an L40S", "12.4")) == ""
    only = {**rtx, "compute_capabilities": ("8.6",)}
    assert "was built for compute capability 8.6" in refusal(only, Here("8.5.3.1", "8.9", "an L40S", "12.4"))


def test_a_file_that_was_cut_or_changed(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    path.write_bytes(b"a plan")
    check_file(path, record())
    path.write_bytes(b"a pl")
    with pytest.raises(EngineError, match="has 4 bytes, its record says 6"):
        check_file(path, record())
    path.write_bytes(b"a plaN")
    with pytest.raises(EngineError, match="was changed: SHA-256"):
        check_file(path, record())


def test_a_record_is_read_as_it_was_written_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    with pytest.raises(EngineError, match=r"has no record model\.engine\.json"):
        engine_record.read(path)
    engine_record.write(path, record())
    assert engine_record.read(path) == record()
    engine_record.record_path(path).write_text('{"record_version": 2}')
    with pytest.raises(EngineError, match=r"model\.engine\.json is not the record of an engine"):
        engine_record.read(path)
