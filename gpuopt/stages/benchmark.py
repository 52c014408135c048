"""Latency and throughput of a deployable file, at the shapes that the first profile is tuned for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpuopt import engine_record, environment, reference
from gpuopt.artifact import ONNX_FILE, StageOutcome
from gpuopt.bench import conditions
from gpuopt.bench.measuring import Measurement, Settings, measure
from gpuopt.bench.statistics import PERCENTILES
from gpuopt.gpu_turn import gpu_turn
from gpuopt.reference import Reference
from gpuopt.shapes import Shape, batch_size, format_shape, tuned_shapes
from gpuopt.stages.context import StageContext

MOST_TIMINGS = 2000
WANTED_TIMINGS = 600
"""`gpuopt compare` needs 500 to judge a p99."""
WHOLE_CALL = "a whole call of ONNX Runtime on the CPU"
WITH_COPIES = "host-to-device copy, compute, device-to-host copy, from page-locked memory"


def run(context: StageContext) -> StageOutcome:
    """Measure the target's engine, or `model.onnx` in ONNX Runtime where no engine runs here.

    Returns facts: those of `report.model.BenchmarkReport`.
    """
    stored = reference.load(context.folder("reference"))
    shapes = tuned_shapes(stored.profiles)
    batch = batch_size(shapes)
    about = {
        "target": context.target,
        "shapes": {name: format_shape(shape) for name, shape in shapes.items()},
        "batch": batch,
        "definition": 1,
        "seconds": context.recipe.benchmark.seconds,
    }
    measured = _session if context.target == "onnxruntime" else _engine
    found = measured(context, stored, shapes, batch)
    warnings = [] if found["was_steady"] else [f"{found['file']}: timings were not steady after the warm-up"]
    return StageOutcome({**about, **found}, tuple(warnings))


def figures(found: Measurement, batch: int) -> dict[str, Any]:
    """A measurement in the report's names."""
    facts: dict[str, Any] = {}
    for percent in PERCENTILES:
        one = found.latency.percentiles[percent]
        facts[f"latency_p{percent}_ms"] = {"value": one.value, "low": one.low, "high": one.high}
    low, high = found.back_to_back_spread
    rates = {"value": found.back_to_back_ms, "low": high, "high": low}
    facts["throughput_samples_per_second"] = {name: batch / ms * 1000 for name, ms in rates.items()}
    facts["timings_ms"] = [round(ms, 6) for ms in thinned(found.timings_ms, MOST_TIMINGS)]
    facts["was_steady"] = found.was_steady
    return facts


def thinned(values: Sequence[float], most: int) -> list[float]:
    """At most so many of the values, evenly spread, in order."""
    if len(values) <= most:
        return list(values)
    return [values[index] for index in np.linspace(0, len(values) - 1, most).round().astype(int)]


def _settings(context: StageContext) -> Settings:
    """Enough single inferences for a p99 whose spread can be told, also of slow models."""
    return Settings(seconds=context.recipe.benchmark.seconds, wanted=WANTED_TIMINGS)


def _session(context: StageContext, stored: Reference, shapes: Mapping[str, Shape], batch: int) -> dict[str, Any]:
    from gpuopt.bench.subjects import SessionSubject

    corner = next(c for c in stored.corners if dict(c.shapes) == dict(shapes))
    subject = SessionSubject(context.folder("onnx") / ONNX_FILE, stored.feed(corner))
    found = measure(subject, _settings(context))
    return {
        **figures(found, batch),
        "file": ONNX_FILE,
        "where": f"CPU, {os.cpu_count()} x {environment.processor()}",
        "library_version": environment.library_version("onnxruntime"),
        "driver_version": "",
        "includes": WHOLE_CALL,
        "cuda_graph": None,
        "host_to_device_ms": None,
        "compute_ms": None,
        "device_to_host_ms": None,
        "device_memory_bytes": None,
        "conditions": {"cpu_load": round(os.getloadavg()[0], 2), "cpus": os.cpu_count()},
    }


def _engine(context: StageContext, stored: Reference, shapes: Mapping[str, Shape], batch: int) -> dict[str, Any]:
    from gpuopt.backends.tensorrt.runtime import LoadedEngine, as_engine_inputs, feeds_of_shape
    from gpuopt.bench.subjects import ALL_PARTS, EngineSubject
    from gpuopt.cuda.device import Device, pci_bus_id

    settings = context.recipe.benchmark
    graph = settings.cuda_graph and environment.has_module("cuda.bindings")
    path = next(file for file in sorted(context.folder("engine").iterdir()) if file.suffix == ".engine")
    record = engine_record.read(path)
    with gpu_turn(context.progress), conditions.watched(pci_bus_id()) as state, Device() as device:
        engine = LoadedEngine.open(path, device, record, trust=context.trust)
        with engine.execution(shapes) as execution:
            corner = next((c for c in stored.corners if dict(c.shapes) == dict(shapes)), None)
            feeds = stored.feed(corner) if corner is not None else feeds_of_shape(engine, shapes)
            execution.run(as_engine_inputs(engine.inputs, feeds))
            found = measure(EngineSubject(execution, ALL_PARTS, graph), _settings(context))
            part = Settings(seconds=settings.seconds / 4)
            parts = [measure(EngineSubject(execution, (name,), False), part).back_to_back_ms for name in ALL_PARTS]
            memory = execution.device_bytes
        where = device.name
        driver = device.driver_version
        engine.close()
    return {
        **figures(found, batch),
        "file": path.name,
        "where": where,
        "library_version": record.library_version,
        "driver_version": driver,
        "includes": f"{WITH_COPIES}; {'as a CUDA graph' if graph else 'without a CUDA graph'}",
        "cuda_graph": graph,
        "host_to_device_ms": parts[0],
        "compute_ms": parts[1],
        "device_to_host_ms": parts[2],
        "device_memory_bytes": memory,
        "conditions": state.summary(),
    }
