"""An engine built several times, raced, and the fastest kept: `build.attempts`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpuopt import engine_record, environment
from gpuopt.backends.tensorrt.builder import BuiltEngine
from gpuopt.backends.tensorrt.options import BuildOptions
from gpuopt.bench.measuring import Race
from gpuopt.engine_record import EngineRecord
from gpuopt.errors import EngineError, RequirementError
from gpuopt.reference import Reference
from gpuopt.shapes import tuned_shapes
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

    The first is built as if it were the only one: it reads and fills the timing cache. The others time anew, and what
    they time does not get there, since of the timings of two builds TensorRT makes a third engine. Where the engines
    cannot be raced the first is kept, with a warning.

    Returns:
        The engine, whose `timings` give it again; a row an attempt: `milliseconds` (median), `lowest`, `highest` of an
        inference, and `kept`.

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
            asked = options if number == 0 else _anew(options, scratch / _CALIBRATION)
            # Without a cache, too, an engine's timings have to be known.
            if number > 0 or asked.timing_cache is None:
                asked = replace(asked, timing_cache=folder.with_name(f"{folder.name}.timings"))
            one = builds.build(asked)
            if number == 0 and options.calibration is not None and one.calibration_cache:
                write_bytes(scratch / _CALIBRATION, one.calibration_cache)
            folder.mkdir()
            write_bytes(folder / _ENGINE, one.plan)
            engine_record.write(folder / _ENGINE, builds.record(folder / _ENGINE, one))
            # Plans of several GB wait on the disk.
            built.append(replace(one, plan=b""))
        best, rows = 0, []
        said = [text for text in built[0].warnings if str(scratch) not in text]
        try:
            raced = _raced(context, stored, folders)
            best = int(raced.fastest)
            rows = [_row(raced, str(number), number == best) for number in range(count)]
            said += [text for text in built[best].warnings if str(scratch) not in text]
        except (EngineError, RequirementError) as error:
            said.append(f"{context.target}: the attempts could not be raced, and the first is kept: {error.message}")
        with storage_errors("read", folders[best] / _ENGINE):
            plan = (folders[best] / _ENGINE).read_bytes()
    if rows:
        shown = ", ".join(f"{row['milliseconds']:.4f}" for row in rows)
        context.progress.line(f"{context.target}: attempt {best + 1} is the fastest of {shown} ms")
    kept = replace(
        built[best],
        plan=plan,
        timing_cache=built[0].timing_cache if options.timing_cache is not None else None,
        warnings=tuple(dict.fromkeys(said)),
        seconds=sum(one.seconds for one in built),
    )
    return kept, rows


def _anew(options: BuildOptions, calibration: Path) -> BuildOptions:
    """Options of a further attempt: the ranges that TensorRT's calibrator found for the first."""
    if options.calibration is None or not calibration.is_file():
        return options
    return replace(options, calibration=replace(options.calibration, cache_file=calibration))


def _raced(context: StageContext, stored: Reference, folders: list[Path]) -> Race:
    from gpuopt.bench.engine_race import Racing, race_engines
    from gpuopt.cuda.device import Device

    racing = Racing(
        {folder.name: folder / _ENGINE for folder in folders},
        tuned_shapes(stored.profiles),
        context.trust,
        environment.has_module("cuda.bindings"),
    )
    with Device() as device:
        return race_engines(racing, device, context.progress.advance)


def _row(raced: Race, name: str, kept: bool) -> dict[str, Any]:
    rounds = raced.rounds[name]
    return {"milliseconds": raced.milliseconds[name], "lowest": min(rounds), "highest": max(rounds), "kept": kept}
