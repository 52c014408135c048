"""Loads: when requests arrive."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from gpuopt.batching.batcher import Floats
from gpuopt.errors import DataError, UsageError
from gpuopt.storage import storage_errors

Distribution = Literal["poisson", "uniform", "bursty", "trace"]
_BURSTINESS = 3.0
_FEWEST = 100
_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Load:
    """Arrivals, up to their rate.

    Attributes:
        rate: requests a second.
        burstiness: coefficient of variation of the gaps (standard deviation over mean): 1 for Poisson, 0 for uniform.
        gaps: of a trace, mean 1; empty for the others, which are drawn.
    """

    distribution: Distribution
    rate: float
    burstiness: float
    gaps: Floats

    def arrivals(self, rate: float, count: int, seed: int = 0) -> Floats:
        """Seconds of arrivals at another rate: the same gaps, stretched.

        Args:
            count: requests; a trace is repeated or cut to it.
        """
        if self.distribution == "trace":
            gaps = np.resize(self.gaps, count)
        elif self.distribution == "uniform":
            gaps = np.ones(count)
        else:
            # Gamma gaps: shape 1 / cv^2, scale cv^2, so that their mean is 1. A shape of 1 is exponential.
            shape = 1 / self.burstiness**2
            gaps = np.random.default_rng(seed).gamma(shape, 1 / shape, count)
        return np.cumsum(gaps) / rate

    @property
    def length(self) -> int | None:
        """Requests of a trace; None where there are as many as one likes."""
        return len(self.gaps) if self.distribution == "trace" else None


def make(rate: float | None, distribution: str | None, burstiness: float | None, trace: Path | None) -> Load:
    """A load from the flags.

    Raises:
        UsageError: rate and trace exclude each other, and one of them is needed.
        DataError, StorageError: the trace cannot be read.
    """
    if trace is not None:
        if rate is not None or distribution is not None or burstiness is not None:
            raise UsageError(
                "--trace has its own rate and distribution", "Leave --rate, --distribution and --burstiness out."
            )
        return read_trace(trace)
    if rate is None:
        raise UsageError("there is no load", "Give --rate with requests a second, or --trace with a CSV of arrivals.")
    if burstiness is not None and distribution != "bursty":
        raise UsageError("--burstiness belongs to --distribution bursty", "Give both, or neither.")
    if distribution == "uniform":
        return Load("uniform", rate, 0.0, np.empty(0))
    if distribution == "bursty":
        return Load("bursty", rate, burstiness or _BURSTINESS, np.empty(0))
    return Load("poisson", rate, 1.0, np.empty(0))


def read_trace(path: Path) -> Load:
    """Arrivals from the first column of a CSV file, seconds, ascending; a first line without a number is its head.

    Raises:
        StorageError: it cannot be read.
        DataError: a line has no number, times fall, or there are fewer than 100.
    """
    with storage_errors("read", path):
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path} is larger than 1 GiB", "Cut it: a million requests are plenty.")
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        arrivals = np.asarray(_times(path, text))
    except csv.Error as error:
        raise DataError(f"{path} is no CSV: {error}", "The first column has seconds of arrivals.") from error
    if len(arrivals) < _FEWEST:
        raise DataError(f"{path} has {len(arrivals)} arrivals", f"Give at least {_FEWEST}: percentiles need them.")
    if not np.isfinite(arrivals).all() or (np.diff(arrivals) < 0).any():
        raise DataError(f"{path}: the times do not ascend", "Sort them; seconds in the first column.")
    if arrivals[-1] == arrivals[0]:
        raise DataError(f"{path}: all requests arrive at once", "Give their times in seconds.")
    gaps = np.diff(arrivals, prepend=arrivals[0])
    mean = float(gaps[1:].mean())
    gaps[0] = mean
    return Load("trace", 1 / mean, float(gaps[1:].std() / mean), gaps / mean)


def _times(path: Path, text: str) -> list[float]:
    times = []
    for number, row in enumerate(csv.reader(io.StringIO(text)), 1):
        if not row or not row[0].strip():
            continue
        try:
            times.append(float(row[0]))
        except ValueError:
            if number == 1:
                continue
            raise DataError(
                f"{path}, line {number}: '{row[0][:40]}' is no time", "The first column has seconds of arrivals."
            ) from None
    return times
