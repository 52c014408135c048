"""A serialized engine for one target, with the record that says what it is."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpuopt import engine_record, environment, reference
from gpuopt.artifact import ONNX_FILE, StageOutcome
from gpuopt.backends.tensorrt import builder, timing_cache
from gpuopt.backends.tensorrt.builder import BuiltEngine
from gpuopt.backends.tensorrt.library import import_module
from gpuopt.backends.tensorrt.options import BuildOptions, NativeCalibration
from gpuopt.calibration.reading import open_for_model
from gpuopt.engine_record import BuiltTarget, EngineRecord, TensorRecord
from gpuopt.environment import Gpu
from gpuopt.errors import DataError
from gpuopt.gpu_turn import gpu_turn
from gpuopt.recipe import Recipe
from gpuopt.reference import Array, Reference
from gpuopt.shapes import TensorSpec
from gpuopt.stages import build_attempts
from gpuopt.stages.context import StageContext
from gpuopt.storage import sha256_file, write_bytes

CALIBRATION_CACHE_FILE = "model.tensorrt.calibration"
TIMINGS_FILE = "model.tensorrt.timing"
"""A timing cache that gives the engine again: of the fastest of several attempts, and of what was built so."""


def run(context: StageContext) -> StageOutcome:
    """Make `engine` for `context.target` from the deployed ONNX and the profiles: the plan, and its record beside it.

    Raises:
        RequirementError: the target's library, driver or GPU is missing.
        UsageError: an option that this release does not have.
        BuildError: the library refuses the graph.
    """
    stored = reference.load(context.folder("reference"))
    onnx_path = context.engine_graph() / ONNX_FILE
    gpu = next(iter(environment.gpus()), None)
    options = build_options(context, onnx_path, gpu)
    native = recipe_is_native(context)
    if native:
        options = replace(options, calibration=_native_calibration(context, stored))
    # TensorRT-RTX times no kernels.
    turn = gpu_turn(context.progress) if context.target == "tensorrt" else contextlib.nullcontext(0.0)
    with turn as waited:
        built, attempts = _built(context, onnx_path, stored, options, gpu)
    path = context.made("engine") / engine_record.ENGINE_FILES[_target(context)]
    write_bytes(path, built.plan)
    record = _record(path, context, built, stored, gpu)
    engine_record.write(path, record)
    if native and built.calibration_cache:
        write_bytes(path.parent / CALIBRATION_CACHE_FILE, built.calibration_cache)
    if (options.attempts > 1 or options.require_timing_cache) and built.timings:
        write_bytes(path.parent / TIMINGS_FILE, built.timings)
    facts = {
        "target": context.target,
        "file": path.name,
        "library_version": built.version,
        "size_bytes": len(built.plan),
        "compute_capabilities": list(record.compute_capabilities) or ["8.0 and newer"],
        "gpu": record.gpu,
        "driver_version": record.driver_version,
        "options": built.applied,
        "quantizer": context.recipe.quantize.quantizer,
        "timing_cache": _timing_facts(built.timing_cache),
        "attempts": attempts,
        "repairs": list(built.repairs),
        "build_seconds": round(built.seconds, 3),
        "waited_seconds": round(waited, 3),
        "builder_messages": list(built.messages),
    }
    return StageOutcome(facts, built.warnings)


def _built(
    context: StageContext, onnx_path: Path, stored: Reference, options: BuildOptions, gpu: Gpu | None
) -> tuple[BuiltEngine, list[dict[str, Any]]]:
    """The engine, and what each attempt took if there are several."""

    def build(options: BuildOptions) -> BuiltEngine:
        return builder.build(context.target, onnx_path, stored.profiles, options, context.progress, context.deadline)

    if options.attempts == 1:
        return build(options), []
    builds = build_attempts.Builds(build, lambda path, built: _record(path, context, built, stored, gpu))
    return build_attempts.fastest(context, stored, options, builds)


def recipe_is_native(context: StageContext) -> bool:
    """Whether TensorRT's own calibrator quantizes."""
    return context.recipe.precision == "int8" and context.recipe.quantize.quantizer == "tensorrt"


def _native_calibration(context: StageContext, stored: Reference) -> NativeCalibration:
    """TensorRT's calibrator over the recipe's data, in batches of the first profile's optimum.

    Its feeds end in a DataError where the samples fill no batch.
    """
    asked = context.recipe.calibrate.method
    batch = max((bounds.opt[0] for bounds in stored.profiles[0].values() if bounds.opt), default=1)

    def batches() -> Iterator[Mapping[str, Array]]:
        waiting: list[Mapping[str, Array]] = []
        samples = 0
        for feed in open_for_model(context, stored.inputs):
            waiting.append(feed)
            samples += len(next(iter(feed.values())))
            if sum(len(next(iter(one.values()))) for one in waiting) >= batch:
                # Samples that fill no whole batch at the end are left out: the calibrator takes batches of one shape.
                yield {name: np.concatenate([one[name] for one in waiting])[:batch] for name in waiting[0]}
                waiting = []
        if samples < batch:
            raise DataError(
                f"{samples} calibration sample{' does' if samples == 1 else 's do'} not fill a batch: TensorRT's "
                f"calibrator needs {batch}, the size that the first profile is tuned for",
                "Give more data (and as many --calibration-samples), or tune for a smaller batch with --opt-shapes.",
            )

    return NativeCalibration("minmax" if asked == "minmax" else "entropy", batches, batch)


def build_options(context: StageContext, onnx_path: Path, gpu: Gpu | None) -> BuildOptions:
    """What the recipe tells the builder.

    Raises:
        RequirementError: the target's library is missing.
    """
    return replace(
        asked_options(context.recipe),
        fp32_nodes=_kept_in_fp32(context, onnx_path),
        timing_cache=_timing_cache_file(context, gpu),
    )


def asked_options(recipe: Recipe) -> BuildOptions:
    """What a recipe alone tells the builder, without what depends on the graph and the GPU."""
    settings = recipe.build
    return BuildOptions(
        precision=recipe.built_precision,
        tf32=settings.tf32,
        fp16_remainder=recipe.cast.remainder == "fp16",
        compute_capabilities=settings.compute_capability,
        optimization_level=settings.optimization_level,
        workspace_bytes=settings.workspace,
        timing_cache=Path(settings.timing_cache) if settings.timing_cache is not None else None,
        require_timing_cache=settings.require_timing_cache,
        tactic_sources=settings.tactic_sources,
        auxiliary_streams=settings.auxiliary_streams,
        timing_iterations=settings.timing_iterations,
        attempts=settings.attempts,
        version_compatible=settings.version_compatible,
        hardware_compatibility=settings.hardware_compatibility,
        refit=settings.refit,
        strip_weights=settings.strip_weights,
        weight_streaming=settings.weight_streaming,
        plugins=tuple(Path(name) for name in settings.plugins),
        dla_core=settings.dla_core,
        sparsity=settings.sparsity,
        # Where formats are measured, each candidate's recipe names its own; alone, auto is linear.
        io_formats=tuple(settings.io_formats.items()) if isinstance(settings.io_formats, dict) else (),
        repairs=settings.repairs,
    )


def _timing_cache_file(context: StageContext, gpu: Gpu | None) -> Path | None:
    """The recipe's file, else one in gpuopt's cache for this release and GPU."""
    named = context.recipe.build.timing_cache
    if named is not None:
        return Path(named)
    if context.target == "tensorrt-rtx" or context.cache_folder is None or gpu is None:
        return None
    version = str(import_module(context.target).__version__)
    return context.cache_folder / "timing" / timing_cache.file_name(context.target, version, gpu)


def _kept_in_fp32(context: StageContext, onnx_path: Path) -> tuple[str, ...]:
    """Names of the nodes that `cast` keeps in FP32; in a strongly typed network the graph says so already."""
    cast = context.recipe.cast
    if context.target == "tensorrt-rtx" or not (cast.nodes_to_keep or cast.op_types_to_keep):
        return ()
    import onnx

    return tuple(
        node.name
        for node in onnx.load(str(onnx_path), load_external_data=False).graph.node
        if node.op_type in cast.op_types_to_keep or any(fnmatch.fnmatchcase(node.name, p) for p in cast.nodes_to_keep)
    )


def _target(context: StageContext) -> BuiltTarget:
    return "tensorrt" if context.target == "tensorrt" else "tensorrt-rtx"


def _record(path: Path, context: StageContext, built: BuiltEngine, stored: Reference, gpu: Gpu | None) -> EngineRecord:
    def tensors(specs: tuple[TensorSpec, ...]) -> tuple[TensorRecord, ...]:
        return tuple(
            TensorRecord(name=spec.name, dtype=built.io_dtypes.get(spec.name, spec.dtype), shape=spec.shape)
            for spec in specs
        )

    settings = context.recipe.build
    return EngineRecord(
        file=path.name,
        sha256=sha256_file(path),
        size_bytes=len(built.plan),
        target=_target(context),
        library_version=built.version,
        version_compatible=settings.version_compatible,
        compute_capabilities=_capabilities(context, gpu),
        hardware_compatibility=settings.hardware_compatibility,
        gpu=gpu.name if gpu else "",
        driver_version=gpu.driver_version if gpu else "",
        precision=context.recipe.precision,
        tf32=settings.tf32,
        inputs=tensors(stored.inputs),
        outputs=tensors(stored.outputs),
        profiles=engine_record.profile_records(stored.profiles),
        plugins=tuple(Path(name).name for name in settings.plugins),
        weights_stripped=settings.strip_weights,
    )


def _capabilities(context: StageContext, gpu: Gpu | None) -> tuple[str, ...]:
    """Those that the engine runs on; empty: 8.0 and newer."""
    here = (gpu.compute_capability,) if gpu else ()
    if context.target == "tensorrt":
        return () if context.recipe.build.hardware_compatibility == "ampere+" else here
    chosen = context.recipe.build.compute_capability
    return tuple(dict.fromkeys(c for text in chosen for c in (here if text == "current" else (text,))))


def _timing_facts(use: timing_cache.TimingCacheUse | None) -> dict[str, Any] | None:
    return {**asdict(use), "file": str(use.file)} if use else None
