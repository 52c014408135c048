"""The serialized engine, run: its outputs against the original model's, its layers as they were built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gpuopt import engine_record, reference
from gpuopt.artifact import StageOutcome
from gpuopt.backends.tensorrt import inspector
from gpuopt.backends.tensorrt.inspector import EngineLayer
from gpuopt.backends.tensorrt.runtime import (
    ExecutionOptions,
    LoadedEngine,
    as_engine_inputs,
    feeds_of_shape,
    iterate_profiles,
)
from gpuopt.comparison import Array, batch_invariance, compare
from gpuopt.cuda.device import Device
from gpuopt.engine_record import Trust
from gpuopt.gpu_turn import gpu_turn
from gpuopt.recipe import Precision, VerifySection
from gpuopt.reference import Reference
from gpuopt.shapes import tuned_shapes
from gpuopt.stages.context import StageContext
from gpuopt.stages.verify import BATCH_TOLERANCE, limits_of
from gpuopt.storage import write_json
from gpuopt.tolerance import problem

PROOF_FILE = "proof.json"
_REPEATS = 3
_TIMED_ITERATIONS = 20


def run(context: StageContext) -> StageOutcome:
    """Make `proof` of the target's engine. A failed proof is a result; what follows from it is the caller's."""
    folder = context.folder("engine")
    path = next(file for file in sorted(folder.iterdir()) if file.suffix == ".engine")
    stored = reference.load(context.folder("reference"))
    with gpu_turn(context.progress):
        result = prove(path, stored, context.recipe.verify, context.recipe.built_precision, context.trust)
    write_json(context.made("proof") / PROOF_FILE, result)
    return StageOutcome(result, tuple(result["warnings"]))


def prove(
    path: Path, stored: Reference, settings: VerifySection, precision: Precision, trust: Trust | None = None
) -> dict[str, Any]:
    """Run an engine at every corner under every profile that admits it, and read what it is made of.

    Args:
        path: the engine, its record beside it.
        trust: what it may run on the CPU.

    Returns:
        `target`, `gpu`, `passed`, `failures` and `warnings` (one line each), `limits`; `outputs`: figures of
        `comparison.compare` with `corner`, `profile` and `output`; `batch_invariance`; `repeats_equal`: whether equal
        inputs gave equal bytes; `coverage`: shares by precision of layers and time; `layers`: every layer with its
        time in milliseconds; `io_formats`; `device_memory_bytes`.

    Raises:
        EngineError: the engine is not what its record says, or does not belong on this machine.
        RequirementError: pycuda, the library or the GPU is missing.
    """
    record = engine_record.read(path)
    failures: list[str] = []
    warnings: list[str] = []
    rows: list[dict[str, Any]] = []
    with Device() as device:
        judged_as = _judged_as(precision, record.tf32, device.compute_capability)
        limits, tolerance = limits_of(settings, judged_as), BATCH_TOLERANCE[judged_as]
        engine = LoadedEngine.open(path, device, record, trust=trust)
        for corner in stored.corners:
            feed, expected = stored.feed(corner), stored.expected(corner)
            for profile in iterate_profiles(engine, corner.shapes):
                with engine.execution(corner.shapes, ExecutionOptions(profile)) as execution:
                    actual = execution.run(as_engine_inputs(engine.inputs, feed))
                for name, wanted in expected.items():
                    figures = compare(actual[name], wanted)
                    rows.append({"corner": corner.name, "profile": profile, "output": name, **figures})
                    if found := problem(figures, limits):
                        failures.append(f"{path.name}, output '{name}' at {corner.name}: {found}")
        invariance: dict[str, Any] = {"checked": False, "reason": "not asked for"}
        if settings.batch_invariance:
            invariance = batch_invariance(
                _AnyShape(engine), stored, tolerance, limits.min_agreement, is_coarse=precision == "int8"
            )
            failures += [f"{path.name}, {failure}" for failure in invariance.get("failures", [])]
        repeats_equal = _repeats_equal(engine, stored)
        if not repeats_equal:
            warnings.append(f"{path.name} does not give the same bytes for the same inputs each time")
        found_layers, times = _layers(engine, stored)
        facts = {
            "target": record.target,
            "file": path.name,
            "gpu": device.name,
            "io_formats": engine.io_formats,
            "device_memory_bytes": engine.device_memory_bytes,
        }
        engine.close()
    return {
        **facts,
        "passed": not failures,
        "failures": failures,
        "warnings": warnings,
        "reference": stored.origin,
        "limits": {**asdict(limits), "batch_tolerance": tolerance},
        "outputs": rows,
        "batch_invariance": invariance,
        "repeats_equal": repeats_equal,
        "coverage": asdict(inspector.coverage(found_layers, times)),
        "layers": [_layer_row(layer, times) for layer in found_layers],
    }


def _judged_as(precision: Precision, tf32: bool, compute_capability: str) -> Precision:
    """Whose limits an engine has. TF32, of GPUs from 8.0 on, has FP16's ten bits of mantissa: a MobileNetV3 came to
    34 dB with it on an H100, and to 45 dB in FP16."""
    has_tf32 = int(compute_capability.partition(".")[0]) >= 8
    return "fp16" if precision == "fp32" and tf32 and has_tf32 else precision


class _AnyShape:
    """Runs feeds of any shape that a profile admits."""

    def __init__(self, engine: LoadedEngine) -> None:
        self._engine = engine

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        with self._engine.execution({name: value.shape for name, value in feed.items()}) as execution:
            return execution.run(as_engine_inputs(self._engine.inputs, feed))


def _repeats_equal(engine: LoadedEngine, stored: Reference) -> bool:
    corner = stored.corners[-1]
    feed = as_engine_inputs(engine.inputs, stored.feed(corner))
    with engine.execution(corner.shapes) as execution:
        first = execution.run(feed)
        for _ in range(_REPEATS - 1):
            again = execution.run(feed)
            if any(not np.array_equal(first[n], again[n], equal_nan=first[n].dtype.kind == "f") for n in first):
                return False
    return True


def _layers(engine: LoadedEngine, stored: Reference) -> tuple[tuple[EngineLayer, ...], dict[str, float]]:
    """Layers and milliseconds of each at the first profile's optimum: without shapes TensorRT tells no formats."""
    shapes = tuned_shapes(stored.profiles)
    with engine.execution(shapes) as execution:
        execution.run(feeds_of_shape(engine, shapes))
        found = inspector.layers(engine.layer_information(execution))
        return found, {time.name: time.milliseconds for time in execution.time_layers(_TIMED_ITERATIONS)}


def _layer_row(layer: inspector.EngineLayer, times: Mapping[str, float]) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "precision": layer.precision,
        "tactic": layer.tactic,
        "onnx_nodes": list(layer.onnx_nodes),
        "computes": layer.computes,
        "milliseconds": times.get(layer.name),
    }
