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
from gpuopt.errors import EngineError, RequirementError, TimeLimitError
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

    The first takes the timings that the cache holds; the others time anew. Each writes a cache of its own, and that of
    the engine which is kept alone goes into the cache of `options`: timings of two builds of one network give a third
    engine. Where the engines cannot be raced the first is kept, with a warning.

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
            try:
                one = builds.build(_attempt(options, number, scratch / _CALIBRATION, folder))
            except TimeLimitError:
                if built:
                    _with_timings(context, options, built, 0, folders[0])
                raise
            if number == 0 and options.calibration is not None and one.calibration_cache:
                write_bytes(scratch / _CALIBRATION, one.calibration_cache)
            folder.mkdir()
            write_bytes(folder / _ENGINE, one.plan)
            engine_record.write(folder / _ENGINE, builds.record(folder / _ENGINE, one))
            # Plans of several GB wait on the disk.
            built.append(replace(one, plan=b""))
        best = 0
        rows: list[dict[str, Any]] = []
        warnings: tuple[str, ...] = ()
        try:
            raced = _raced(context, stored, folders)
            best = int(raced.fastest)
            rows = [_row(raced, str(number), number == best) for number in range(count)]
        except (EngineError, RequirementError) as error:
            warnings = (f"{context.target}: the attempts could not be raced, and the first is kept: {error.message}",)
        kept = _with_timings(context, options, built, best, folders[best])
        kept = replace(_with_plan(kept, folders[best]), seconds=sum(one.seconds for one in built))
    if rows:
        shown = ", ".join(f"{row['milliseconds']:.4f}" for row in rows)
        context.progress.line(f"{context.target}: attempt {best + 1} is the fastest of {shown} ms")
    return replace(kept, warnings=(*kept.warnings, *warnings)), rows


def _attempt(options: BuildOptions, number: int, calibration: Path, folder: Path) -> BuildOptions:
    """Options of an attempt: a further one has no timings yet, and the ranges that TensorRT's calibrator found."""
    timings = _timings(folder) if options.timing_cache is not None else None
    if number == 0:
        return replace(options, timings_apart=timings)
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
    context: StageContext, options: BuildOptions, built: list[BuiltEngine], best: int, folder: Path
) -> BuiltEngine:
    """The kept engine with its timings in the cache of `options`, from which the first attempt alone read."""
    first, kept = built[0], built[best]
    warnings = [said for one in (first, kept) for said in one.warnings if str(folder.parent) not in said]
    use = first.timing_cache
    if options.timing_cache is not None and use is not None:
        if best > 0 and 0 < use.read_bytes == use.written_bytes:
            written = use.read_bytes
            warnings.append(
                f"{context.target}: the timing cache {options.timing_cache} stays as it is: it held this network's "
                f"timings, which give the engine of attempt 1; another --timing-cache takes attempt {best + 1}'s"
            )
        else:
            saved, said = timing_cache.save_file(import_module(context.target), _timings(folder), options.timing_cache)
            written = saved.written_bytes
            warnings += said
        use = replace(use, file=options.timing_cache, written_bytes=written)
    return replace(kept, timing_cache=use, warnings=tuple(dict.fromkeys(warnings)))


def _with_plan(built: BuiltEngine, folder: Path) -> BuiltEngine:
    path = folder / _ENGINE
    with storage_errors("read", path):
        return replace(built, plan=path.read_bytes())


def _row(raced: Race, name: str, kept: bool) -> dict[str, Any]:
    rounds = raced.rounds[name]
    return {"milliseconds": raced.milliseconds[name], "lowest": min(rounds), "highest": max(rounds), "kept": kept}
