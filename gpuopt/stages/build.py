"""A serialized engine for one target, and the record that says what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gpuopt import engine_record, environment, reference
from gpuopt.artifact import ONNX_FILE, StageOutcome
from gpuopt.backends.tensorrt import builder
from gpuopt.backends.tensorrt.options import BuildOptions, NativeCalibration
from gpuopt.calibration.reading import open_for_model
from gpuopt.engine_record import EngineRecord, TensorRecord
from gpuopt.errors import DataError
from gpuopt.recipe import Recipe
from gpuopt.reference import Array, Reference
from gpuopt.stages.context import StageContext
from gpuopt.storage import sha256_file

ENGINE_FILE = {"tensorrt": "model.tensorrt.engine", "tensorrt-rtx": "model.tensorrt-rtx.engine"}


CALIBRATION_CACHE_FILE = "model.tensorrt.calibration"


def run(context: StageContext) -> StageOutcome:
    """Make `engine` for `context.target` from the deployed ONNX and the profiles.

    Raises:
        RequirementError: the target's library, driver or GPU is missing.
        UsageError: an option that the library does not have.
        BuildError: the library refuses the graph.
    """
    stored = reference.load(context.folder("reference"))
    options = build_options(context.recipe, context.target, context.timing_cache)
    native = context.recipe.precision == "int8" and context.recipe.quantize.quantizer == "tensorrt"
    if native:
        options = replace(options, calibration=_native_calibration(context, stored))
    onnx_path = context.engine_graph() / ONNX_FILE
    built = builder.build(context.target, onnx_path, stored.profiles, options, context.progress)
    path = context.made("engine") / ENGINE_FILE[context.target]
    path.write_bytes(built.plan)
    record = record_of(path, context.target, built.version, options, stored, context.recipe.precision)
    engine_record.write(path, record)
    if native:
        (path.parent / CALIBRATION_CACHE_FILE).write_bytes(built.calibration_cache)
    facts: dict[str, Any] = {
        "target": context.target,
        "file": path.name,
        "library_version": built.version,
        "size_bytes": len(built.plan),
        "compute_capabilities": list(record.compute_capabilities) or ["8.0 and newer"],
        "gpu": record.gpu,
        "options": built.applied,
        "quantizer": "tensorrt" if native else "gpuopt",
        "builder_messages": list(built.messages),
    }
    return StageOutcome(facts, built.warnings)


def _native_calibration(context: StageContext, stored: Reference) -> NativeCalibration:
    """TensorRT's calibrator over the recipe's data, in batches of the first profile's optimum."""
    asked = context.recipe.calibrate.method
    batch = max((bounds.opt[0] for bounds in stored.profiles[0].values() if bounds.opt), default=1)

    def batches() -> Iterator[Mapping[str, Array]]:
        waiting: list[Mapping[str, Array]] = []
        given = 0
        for feed in open_for_model(context, stored.inputs):
            waiting.append(feed)
            if sum(len(next(iter(one.values()))) for one in waiting) >= batch:
                yield _joined(waiting, batch)
                given += 1
                waiting = []
        if not given:
            raise DataError(
                f"there are fewer calibration samples than one batch of {batch}",
                "Give more samples, or a smaller --opt-shapes.",
            )

    return NativeCalibration("minmax" if asked == "minmax" else "entropy", batches)


def _joined(feeds: Sequence[Mapping[str, Array]], batch: int) -> dict[str, Array]:
    return {name: np.concatenate([feed[name] for feed in feeds])[:batch] for name in feeds[0]}


def build_options(recipe: Recipe, target: str, timing_cache: Path | None) -> BuildOptions:
    """The recipe's build section for one target.

    Args:
        timing_cache: the file that is used where the recipe names none.
    """
    settings = recipe.build
    is_int8 = recipe.precision == "int8"
    named = Path(settings.timing_cache) if settings.timing_cache else timing_cache
    return BuildOptions(
        int8=is_int8,
        fp16=recipe.precision == "fp16" or (is_int8 and recipe.cast.remainder == "fp16"),
        compute_capabilities=settings.compute_capability,
        optimization_level=settings.optimization_level,
        workspace_bytes=settings.workspace,
        timing_cache=named if target == "tensorrt" else None,
        require_timing_cache=settings.require_timing_cache and target == "tensorrt",
        tactic_sources=settings.tactic_sources if target == "tensorrt" else (),
        auxiliary_streams=settings.auxiliary_streams,
        timing_iterations=settings.timing_iterations,
        version_compatible=settings.version_compatible,
        hardware_compatibility=settings.hardware_compatibility if target == "tensorrt" else "none",
        refit=settings.refit,
        strip_weights=settings.strip_weights,
        weight_streaming=settings.weight_streaming,
        plugins=tuple(Path(name) for name in settings.plugins),
        dla_core=settings.dla_core,
        sparsity=settings.sparsity,
        io_formats=tuple(settings.io_formats.items()),
    )


def record_of(
    path: Path, target: str, version: str, options: BuildOptions, stored: Reference, precision: str
) -> EngineRecord:
    """The record of an engine that was built here."""
    devices = environment.gpus()
    gpu = devices[0] if devices and target == "tensorrt" else None
    return EngineRecord(
        file=path.name,
        sha256=sha256_file(path),
        size_bytes=path.stat().st_size,
        target=target,
        library_version=version,
        version_compatible=options.version_compatible,
        compute_capabilities=(gpu.compute_capability,) if gpu else options.compute_capabilities,
        hardware_compatibility=options.hardware_compatibility,
        gpu=gpu.name if gpu else "",
        driver_version=gpu.driver_version if gpu else "",
        precision=precision,
        inputs=tuple(TensorRecord(name=t.name, dtype=t.dtype, shape=t.shape) for t in stored.inputs),
        outputs=tuple(TensorRecord(name=t.name, dtype=t.dtype, shape=t.shape) for t in stored.outputs),
        profiles=engine_record.profile_records(stored.profiles),
    )
