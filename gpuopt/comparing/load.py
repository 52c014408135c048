"""A report of `gpuopt compile`, from a bundle or a file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from gpuopt import bundle
from gpuopt.errors import StorageError
from gpuopt.report.model import BenchmarkReport, Estimate, Report, read_report

_MOST_TIMINGS = 2000
HINT = "Name a bundle, or a report.json that 'gpuopt compile' wrote."


def load(path: Path) -> Report:
    """Read a report; every hash of a bundle is checked first.

    Raises:
        StorageError: it is not there, damaged, or of another schema.
    """
    if path.is_dir():
        bundle.open_bundle(path)
        path = path / bundle.REPORT_FILE
    report = read_report(path, HINT)
    for benchmark in report.benchmarks:
        if not all(math.isfinite(value) and value > 0 for value in _measured(benchmark)):
            raise StorageError(f"{path} is damaged: the benchmark of {benchmark.target} has times that are none", HINT)
        if len(benchmark.timings_ms) > _MOST_TIMINGS:
            raise StorageError(
                f"{path} is damaged: the benchmark of {benchmark.target} has more than {_MOST_TIMINGS} timings", HINT
            )
    return report


def _measured(benchmark: BenchmarkReport) -> Iterator[float]:
    yield from benchmark.timings_ms
    for estimate in (getattr(benchmark, name) for name in type(benchmark).model_fields):
        if isinstance(estimate, Estimate):
            yield from (value for value in (estimate.value, estimate.low, estimate.high) if value is not None)
