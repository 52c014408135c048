"""A bundle made by hand, as `gpuopt compile` would write it on a machine with an H100."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from gpuopt import bundle, engine_record, onnx_model, reference
from gpuopt.engine_record import EngineRecord
from gpuopt.recipe import resolve
from gpuopt.reference import Interface
from gpuopt.report.model import EngineReport, ModelReport, Report
from gpuopt.shapes import ShapeRange, TensorSpec, corners
from gpuopt.storage import sha256_file
from tests.unit.quantization.graphs import depthwise_block

ENGINE = "model.tensorrt.engine"
PLAN = b"ftrt" + bytes(60)
ENVIRONMENT = {
    "python": "3.11.7",
    "platform": "Linux x86_64",
    "packages": {"numpy": "2.4.6", "torch": "2.15.0"},
    "gpus": [{"name": "NVIDIA H100", "compute_capability": "9.0"}],
}
PROOF: dict[str, Any] = {
    "gpu": "NVIDIA H100",
    "io_formats": {"x": "fp16:hwc8", "y": "fp32:chw"},
    "coverage": {
        "layers": {"int8": 3, "fp16": 1},
        "layer_share": {"int8": 0.75, "fp16": 0.25},
        "time_share": {"int8": 0.9, "fp16": 0.1},
        "reformats": 2,
        "quantizations": 1,
        "overhead_time_share": 0.125,
        "milliseconds": 0.0625,
    },
}


def record(**changes: Any) -> EngineRecord:
    base = {
        "file": ENGINE,
        "sha256": hashlib.sha256(PLAN).hexdigest(),
        "size_bytes": len(PLAN),
        "target": "tensorrt",
        "library_version": "8.5.3.1",
        "version_compatible": False,
        "compute_capabilities": ("9.0",),
        "hardware_compatibility": "none",
        "gpu": "NVIDIA H100",
        "driver_version": "13.0",
        "precision": "int8",
        "inputs": ({"name": "x", "dtype": "float16", "shape": ("batch", 16, 8, 8)},),
        "outputs": ({"name": "y", "dtype": "float32", "shape": ("batch", 16, 8, 8)},),
        "profiles": ({"x": {"min": "1x16x8x8", "opt": "4x16x8x8", "max": "8x16x8x8"}},),
    }
    return EngineRecord.model_validate({**base, **changes})


def report(engines: list[EngineReport], **changes: Any) -> Report:
    base = Report(
        command=["gpuopt", "compile", "a model.onnx"],
        gpuopt_version="0.1.0",
        created="2026-01-02T03:04:05+00:00",
        status="passed",
        error=None,
        model=ModelReport(path="/models/a model.onnx", factory=None, kind="ONNX", sha256="ab" * 32),
        precision="int8",
        bundle="model.gpuopt",
        stages=[],
        engines=engines,
        verification=None,
        warnings=[],
        environment=ENVIRONMENT,
        seconds=1.0,
    )
    return base.model_copy(update=changes)


def make(
    folder: Path,
    *,
    graph: onnx.ModelProto | None = None,
    engine: EngineRecord | None = None,
    proof: dict[str, Any] | None = PROOF,
    about: dict[str, Any] | None = None,
    change: Callable[[Path], None] = lambda files: None,
    **of_report: Any,
) -> Path:
    """Write a bundle.

    Args:
        engine: its record; None: one that fits.
        about: laid over the manifest.
        change: called with the folder of the files before the manifest is made.
        of_report: fields of the report.
    """
    files = folder.with_name(folder.name + ".files")
    shutil.rmtree(files, ignore_errors=True)
    onnx_model.save(graph if graph is not None else depthwise_block(), files)
    (files / ENGINE).write_bytes(PLAN)
    engine_record.write(files / ENGINE, engine or record())
    inputs = (TensorSpec("x", "float32", ("batch", 16, 8, 8)),)
    profile = {"x": ShapeRange((1, 16, 8, 8), (4, 16, 8, 8), (8, 16, 8, 8))}
    generator = np.random.default_rng(0)
    feeds = {c.name: {"x": generator.standard_normal(c.shapes["x"], np.float32)} for c in corners([profile])}
    (files / "reference").mkdir()
    reference.record(
        files / "reference", Interface(inputs, ("y",), (profile,)), lambda feed: [feed["x"]], feeds, "ONNX"
    )
    (files / "recipe.yaml").write_text(
        resolve({"model": {"path": "a.onnx"}, "build": {"io_formats": {"x": "fp16:hwc8"}}}).to_yaml()
    )
    lines = [
        EngineReport(
            target=target,
            file=name,
            size_bytes=(files / name).stat().st_size,
            sha256=sha256_file(files / name),
            status="verified",
            library_version=version,
            compute_capabilities=[],
            note="",
            proof=proof if target == "tensorrt" else None,
        )
        for target, name, version in (("tensorrt", ENGINE, "8.5.3.1"), ("onnxruntime", "model.onnx", "1.32.0"))
    ]
    made = report(lines, **of_report)
    (files / "report.json").write_text(made.model_dump_json())
    change(files)
    manifest = {
        "gpuopt_version": made.gpuopt_version,
        "created": made.created,
        "command": made.command,
        "status": made.status,
        "model": made.model.model_dump(),
        "precision": made.precision,
        "targets": [json.loads(line.model_dump_json(include={"target", "file", "library_version"})) for line in lines],
        "environment": made.environment,
    }
    bundle.write(folder, {path.name: path for path in files.iterdir()}, {}, {**manifest, **(about or {})})
    return folder
