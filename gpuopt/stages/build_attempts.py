"""An engine built several times, raced, and the fastest kept: `build.attempts`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpuopt import engine_record, environment
from gpuopt.backends.tensorrt import timing_cache
from gpuopt.backends.tensorrt.builder import BuiltEngine
from gpuopt.backends.tensorrt.library import import_module
from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.bench.measuring import Race
from gpuopt.engine_record import EngineRecord
from gpuopt.errors import EngineError, RequirementError
from gpuopt.reference import Reference
from gpuopt.stages.context import StageContext
from gpuopt.storage import scratch_folder, storage_errors, write_bytes

_ENGINE = "engine"
_CALIBRATION = "calibration"


@dataclass(frozen=True)
class Builds:
    """How the stage builds and describes an engine.

    Attributes:
        build: an engine by options.
        record: what lies beside it at a path.
    """

    build: Callable[[BuildOptions], BuiltEngine]
    record: Callable[[Path, BuiltEngine], EngineRecord]


def fastest(
    context: StageContext, stored: Reference, options: BuildOptions, builds: Builds
) -> tuple[BuiltEngine, list[dict[str, Any]]]:
    """The fastest of `options.attempts` engines, and what each took.

    The first takes the timings that the cache holds; the others time anew, into caches of their own. The timings of the
    engine that is kept go into the cache, before what it holds of the same tactics. Where the engines cannot be raced
    the first is kept, with a warning.

    Returns:
        The engine; a row an attempt: `milliseconds` (median), `lowest`, `highest` of an inference, and `kept`.

    Raises:
        As `builder.build`.
    """
    count = options.attempts
    with scratch_folder(context.output.parent, "attempts") as scratch:
        folders = [scratch / str(number) for number in range(count)]
        built: list[BuiltEngine] = []
        for number, folder in enumerate(folders):
            if number > 0:
                context.progress.line(f"{context.target}: attempt {number + 1} of {count}")
            asked = options if number == 0 else _anew(options, scratch / _CALIBRATION, folder)
            one = builds.build(asked)
            if number == 0 and options.calibration is not None and one.calibration_cache:
                write_bytes(scratch / _CALIBRATION, one.calibration_cache)
            folder.mkdir()
            write_bytes(folder / _ENGINE, one.plan)
            engine_record.write(folder / _ENGINE, builds.record(folder / _ENGINE, one))
            # Plans of several GB wait on the disk.
            built.append(replace(one, plan=b""))
        seconds = sum(one.seconds for one in built)
        try:
            raced = _raced(context, stored, folders)
        except (EngineError, RequirementError) as error:
            said = f"{context.target}: the attempts could not be raced, and the first is kept: {error.message}"
            return _with_plan(replace(built[0], warnings=(*built[0].warnings, said), seconds=seconds), folders[0]), []
        best = int(raced.fastest)
        kept = built[0] if best == 0 else _with_timings(context, options, built[0], built[best], folders[best])
        kept = _with_plan(replace(kept, seconds=seconds), folders[best])
    rows = [_row(raced, str(number), number == best) for number in range(count)]
    shown = ", ".join(f"{row['milliseconds']:.4f}" for row in rows)
    context.progress.line(f"{context.target}: attempt {best + 1} is the fastest of {shown} ms")
    return kept, rows


def _anew(options: BuildOptions, calibration: Path, folder: Path) -> BuildOptions:
    """Options of a further attempt: no timings yet, and the ranges that TensorRT's calibrator found for the first."""
    timings = _timings(folder) if options.timing_cache is not None else None
    if options.calibration is not None and calibration.is_file():
        options = replace(options, calibration=replace(options.calibration, cache_file=calibration))
    return replace(options, timing_cache=timings)


def _timings(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.timings")


def _raced(context: StageContext, stored: Reference, folders: list[Path]) -> Race:
    from gpuopt.bench.engine_race import Racing, race_engines
    from gpuopt.cuda.device import Device

    racing = Racing(
        {folder.name: folder / _ENGINE for folder in folders},
        {name: bounds.opt for name, bounds in stored.profiles[0].items()},
        context.trust,
        environment.has_module("cuda.bindings"),
    )
    with Device() as device:
        return race_engines(racing, device, context.progress.advance)


def _with_timings(
    context: StageContext, options: BuildOptions, first: BuiltEngine, kept: BuiltEngine, folder: Path
) -> BuiltEngine:
    """The kept engine with its timings in the cache of `options`, from which the first attempt alone read."""
    warnings = list(first.warnings)
    use = first.timing_cache
    if options.timing_cache is not None:
        library = import_module(context.target)
        saved, said = timing_cache.save_file(library, _timings(folder), options.timing_cache)
        warnings += said
        if use is not None:
            saved = replace(saved, read_bytes=use.read_bytes, hits=use.hits)
        use = saved
    warnings += [said for said in kept.warnings if str(folder.parent) not in said and said not in warnings]
    return replace(kept, timing_cache=use, warnings=tuple(warnings))


def _with_plan(built: BuiltEngine, folder: Path) -> BuiltEngine:
    path = folder / _ENGINE
    with storage_errors("read", path):
        return replace(built, plan=path.read_bytes())


def _row(raced: Race, name: str, kept: bool) -> dict[str, Any]:
    rounds = raced.rounds[name]
    return {"milliseconds": raced.milliseconds[name], "lowest": min(rounds), "highest": max(rounds), "kept": kept}
