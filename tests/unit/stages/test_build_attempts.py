"""Which of several engines is kept, and what goes with it. Race and builder, which need a GPU, are made up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuopt import engine_record, reference
from gpuopt.backends.tensorrt.builder import BuiltEngine
from gpuopt.backends.tensorrt.options import BuildOptions, NativeCalibration
from gpuopt.backends.tensorrt.timing_cache import TimingCacheUse
from gpuopt.bench import engine_race
from gpuopt.bench.measuring import Race
from gpuopt.cuda import device
from gpuopt.engine_record import EngineRecord
from gpuopt.errors import EngineError
from gpuopt.stages import build, build_attempts
from gpuopt.stages.build_attempts import Builds
from gpuopt.stages.context import StageContext
from gpuopt.storage import sha256_file
from tests.unit.stages.test_build import context

Raced = Callable[[Mapping[str, float]], None]


@pytest.fixture
def raced(monkeypatch: pytest.MonkeyPatch) -> Raced:
    """Says what each attempt takes, milliseconds; none: the race is refused."""

    def says(milliseconds: Mapping[str, float]) -> None:
        def race_engines(racing: engine_race.Racing, device: object, tell: object) -> Race:
            if not milliseconds:
                raise EngineError("it cannot be run here", "")
            for path in racing.files.values():
                assert engine_record.read(path).sha256 == sha256_file(path)
            assert racing.shapes == {"x": (2, 16, 8, 8)}
            return Race(milliseconds, {name: (0.5 * ms, ms, 2 * ms) for name, ms in milliseconds.items()})

        monkeypatch.setattr(engine_race, "race_engines", race_engines)
        monkeypatch.setattr(device, "Device", contextlib.nullcontext)

    return says


class Builder:
    """Builds an engine that is its number, and notes the options."""

    def __init__(self, made: StageContext) -> None:
        self.asked: list[BuildOptions] = []
        self._context = made
        self._stored = reference.load(made.folder("reference"))

    def build(self, options: BuildOptions) -> BuiltEngine:
        number = len(self.asked)
        self.asked.append(options)
        use = None
        if options.timing_cache is not None:
            assert number == 0 or not options.timing_cache.exists()
            options.timing_cache.write_bytes(b"timings of %d" % number)
            use = TimingCacheUse(options.timing_cache, 70 if number == 0 else 0, 80, 7 if number == 0 else None)
        ranges = b"ranges" if options.calibration is not None else None
        said = ("workspace clamped", f"attempt {number}", *([f"{use.file} is odd"] if use else []))
        return BuiltEngine(
            b"engine %d" % number,
            "8.5.3.1",
            (),
            said,
            timing_cache=use,
            timings=b"timings of %d" % number,
            calibration_cache=ranges,
            seconds=1.0,
        )

    def record(self, path: Path, built: BuiltEngine) -> EngineRecord:
        return build._record(path, self._context, built, self._stored, None)

    def fastest(self, options: BuildOptions) -> tuple[BuiltEngine, list[dict[str, Any]]]:
        return build_attempts.fastest(self._context, self._stored, options, Builds(self.build, self.record))


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_fastest_is_kept(best: int, raced: Raced, tmp_path: Path) -> None:
    raced({str(number): 1.0 if number == best else 2.0 for number in range(3)})
    kept, rows = Builder(context(tmp_path, "tensorrt")).fastest(BuildOptions(attempts=3))
    assert (kept.plan, kept.seconds) == (b"engine %d" % best, 3.0)
    assert rows[best] == {"milliseconds": 1.0, "lowest": 0.5, "highest": 2.0, "kept": True}
    assert [row["kept"] for row in rows] == [number == best for number in range(3)]
    assert [path.name for path in (tmp_path / "out").parent.iterdir() if "attempts" in path.name] == []


def test_where_no_race_is_possible_the_first_is_kept_with_a_warning(raced: Raced, tmp_path: Path) -> None:
    raced({})
    kept, rows = Builder(context(tmp_path, "tensorrt")).fastest(BuildOptions(attempts=2))
    assert (kept.plan, rows) == (b"engine 0", [])
    assert kept.warnings[-1] == (
        "tensorrt: the attempts could not be raced, and the first is kept: it cannot be run here"
    )


@pytest.mark.parametrize("best", [0, 1])
def test_the_first_alone_reads_and_fills_the_timing_cache(best: int, raced: Raced, tmp_path: Path) -> None:
    file = tmp_path / "t.timing"
    raced({"0": 1.0 + best, "1": 1.5})
    builder = Builder(context(tmp_path, "tensorrt"))
    kept, _ = builder.fastest(BuildOptions(attempts=2, timing_cache=file))
    assert [asked.timing_cache == file for asked in builder.asked] == [True, False]
    assert file.read_bytes() == b"timings of 0"
    assert kept.timing_cache == TimingCacheUse(file, 70, 80, 7)
    assert kept.timings == b"timings of %d" % best
    # What is said of a further attempt's own file is no use to anybody.
    assert kept.warnings == ("workspace clamped", "attempt 0", f"{file} is odd", *(["attempt 1"] if best else []))


@pytest.mark.parametrize("best", [0, 1])
def test_timings_are_known_without_a_timing_cache_too(best: int, raced: Raced, tmp_path: Path) -> None:
    raced({"0": 1.0 + best, "1": 1.5})
    builder = Builder(context(tmp_path, "tensorrt"))
    kept, _ = builder.fastest(BuildOptions(attempts=2))
    first, second = (asked.timing_cache for asked in builder.asked)
    assert None not in (first, second)
    assert first != second
    assert (kept.timing_cache, kept.timings) == (None, b"timings of %d" % best)
    assert kept.warnings == ("workspace clamped", "attempt 0", *(["attempt 1"] if best else []))


def test_tensorrt_s_calibrator_runs_once(raced: Raced, tmp_path: Path) -> None:
    def feeds() -> Iterable[dict[str, np.ndarray]]:
        raise AssertionError

    raced({"0": 1.0, "1": 2.0, "2": 3.0})
    builder = Builder(context(tmp_path, "tensorrt"))
    read: list[bytes] = []
    build_first = builder.build

    def building(options: BuildOptions) -> BuiltEngine:
        assert options.calibration is not None
        if options.calibration.cache_file is not None:
            read.append(options.calibration.cache_file.read_bytes())
        return build_first(options)

    options = replace(BuildOptions(attempts=3), calibration=NativeCalibration("entropy", feeds))
    stored = reference.load(tmp_path / "reference")
    kept, _ = build_attempts.fastest(builder._context, stored, options, Builds(building, builder.record))
    assert builder.asked[0].calibration == options.calibration
    assert read == [b"ranges", b"ranges"]
    assert kept.calibration_cache == b"ranges"
