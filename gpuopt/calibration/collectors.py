"""Ranges of activations for symmetric INT8, estimated in one pass with bounded memory.

Every method but `minmax` reads a histogram of |x| whose upper edge is a power of two. When a larger
value arrives, the edge is doubled as often as needed and the counts are folded by pairs. A bin index
is floor(|x| * 2^k); scaling by a power of two is exact, and

    floor(floor(|x| * 2^k) / 2) == floor(|x| * 2^(k - 1)),

so folding and binning commute: the histogram depends on the multiset of the values only, neither on
their order nor on how they were cut into batches.

Extremes are taken over every value. Into the histograms of `entropy` and `mse`, which weigh the shape
of a distribution, go at most `values_per_slice` values of each slice along the first axis (of a
sample, in a batch), evenly spread over it: a choice that depends on shapes alone, and so again on
neither order nor batches. Where the batch is not the first axis (attention with the sequence first),
that holds as long as a slice has no more values than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuopt.calibration.statistics import share
from gpuopt.errors import DataError, UsageError

METHODS = ("minmax", "entropy", "percentile", "mse")

_Counts = npt.NDArray[np.int64]
_Reals = npt.NDArray[np.float64]

_CHUNK = 1 << 16
"""Elements binned at a time: the work space stays near 1 MB, inside the second-level cache."""

_WEIGHED = ("entropy", "mse")
"""Methods that weigh the shape of a distribution, for which a share of the values will do."""

_LEVELS = 127
"""Positive levels of symmetric INT8; -128 is not used."""

_ENTROPY_MOST_CLIPPED = 1e-3
_ENTROPY_LEVELS = 128
"""Levels of |x| that the entropy method compares with, zero included."""

_COARSE = 1024
_FINE = 32
_BLOCK = 256
"""Candidate thresholds weighed at a time; a block's table holds `_BLOCK` x 128 numbers."""

_FIXED_BYTES = 64
"""What a tensor holds besides its histogram: minimum, maximum, three counts and an exponent."""


@dataclass(frozen=True)
class TensorRange:
    """The interval that a tensor's INT8 codes have to cover, and the method that chose it."""

    low: float
    high: float
    method: str

    @property
    def amax(self) -> float:
        """The larger magnitude of the two ends; 0 for a tensor that was all zeros."""
        return max(abs(self.low), abs(self.high))


@dataclass
class _Summary:
    """What is kept of one tensor."""

    low: float = math.inf
    high: float = -math.inf
    count: int = 0
    zeros: int = 0
    exponent: int | None = None
    """The histogram covers [0, 2^exponent); None until a value other than zero was seen."""
    histogram: _Counts | None = None
    """Counts of the values other than zero, by magnitude."""

    @property
    def amax(self) -> float:
        return max(abs(self.low), abs(self.high))


class RangeCollector:
    """Collects the values of many tensors and states a range for each.

    Args:
        method: one of `METHODS`.

            - `minmax`: the exact minimum and maximum.
            - `percentile`: the smallest `amax` such that at least `percentile` % of |x| (zeros
              included) are <= `amax`, overestimated by at most one bin and never above the exact
              maximum. A bin is at most max|x| / (2 * bins) wide. Where the percentile falls among
              the zeros, the exact maximum is taken, for a range of zero could hold nothing else.
            - `entropy`: the threshold with the smallest Kullback-Leibler divergence between the
              clipped distribution and its 128-level quantization (S. Migacz, "8-bit Inference with
              TensorRT", GTC 2017).
            - `mse`: the threshold with the smallest expected squared error of rounding to 127
              levels and clipping, with values spread evenly inside a bin.
        percentile: per cent, in (0, 100]; used by `percentile` only.
        values_per_slice: for `entropy` and `mse`, the most values of each slice along a tensor's
            first axis that enter its histogram; 0: all. For values drawn at random the distribution
            function so estimated from n of them is off by more than e with a probability of at most
            2 exp(-2 n e^2) (Dvoretzky, Kiefer, Wolfowitz; Massart 1990); the extremes are exact.
        bins: resolution of the histogram, a power of two from 128 on. 4 * bins counters are held a
            tensor, of which more than 2 * bins always lie below the largest magnitude.

    Raises:
        UsageError: an unknown method, or a percentile or number of bins out of range.
    """

    def __init__(
        self,
        method: str,
        percentile: float = 99.99,
        bins: int = 2048,
        values_per_slice: int = 0,
    ) -> None:
        if method not in METHODS:
            raise UsageError(f"'{method}' is not a calibration method", f"Choose one of {', '.join(METHODS)}.")
        if not 0 < percentile <= 100:
            raise UsageError(
                f"a calibration percentile of {percentile} is out of range",
                "Give a number above 0 and up to 100, such as 99.99.",
            )
        if bins < 128 or bins & (bins - 1):
            raise UsageError(
                f"{bins} histogram bins cannot be folded",
                "Give a power of two from 128 on, such as 2048.",
            )
        self.method = method
        self.percentile = percentile
        self._size = 4 * bins
        self._bits = self._size.bit_length() - 1
        self._tensors: dict[str, _Summary] = {}
        self.values_per_slice = values_per_slice if method in _WEIGHED else 0
        # Kept between calls: fresh temporaries of this size cost more in page faults than the binning.
        self._magnitudes = np.empty(0 if method == "minmax" else _CHUNK, np.float64)
        self._indices = np.empty(self._magnitudes.size, np.intp)

    @property
    def bytes_per_tensor(self) -> int:
        """The most that one tensor's statistics take."""
        return _FIXED_BYTES + (0 if self.method == "minmax" else self._size * 8)

    @property
    def nbytes(self) -> int:
        """Bytes held: the work space and a constant for each tensor that was seen."""
        return (
            self._magnitudes.nbytes
            + self._indices.nbytes
            + sum(
                _FIXED_BYTES + (0 if one.histogram is None else one.histogram.nbytes) for one in self._tensors.values()
            )
        )

    def forget(self, name: str) -> None:
        """Drop what was seen of a tensor."""
        self._tensors.pop(name, None)

    @property
    def needs_all_values(self) -> bool:
        """Whether `update` has to see whole tensors; where not, `add` with extremes and a share will do."""
        return self.method != "minmax" and not self.values_per_slice

    def update(self, name: str, values: npt.NDArray[Any]) -> float:
        """Add the values of one tensor.

        Args:
            name: the tensor.
            values: float16, float32 or float64, of any shape and memory order; may be empty.

        Returns:
            The largest magnitude among the values; 0 for none.

        Raises:
            DataError: `values` are not floating point, or hold NaN or an infinity.
        """
        if not np.issubdtype(values.dtype, np.floating):
            raise DataError(
                f"tensor '{name}' has dtype {values.dtype}, ranges are for floating point only",
                "Leave integer tensors out of the calibration.",
            )
        extremes = [(float(chunk.min()), float(chunk.max())) for chunk in _chunks(values)]
        low = min((low for low, _ in extremes), default=math.inf)
        high = max((high for _, high in extremes), default=-math.inf)
        if any(math.isnan(one) for one, _ in extremes):
            low = high = math.nan
        return self.add(name, low, high, share(values, self.values_per_slice))

    def add(self, name: str, low: float, high: float, values: npt.NDArray[Any] | None) -> float:
        """Add the extremes of one tensor's values, and those of them that enter its histogram.

        Args:
            name: the tensor.
            low, high: exact, over all values; NaN if any value is; low > high if there is none.
            values: floating point, none beyond the extremes; not looked at for `minmax`.

        Returns:
            The largest magnitude; 0 for none.

        Raises:
            DataError: an extreme is NaN or infinite.
        """
        if low > high:
            self._tensors.setdefault(name, _Summary())
            return 0.0
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(
                f"tensor '{name}' holds NaN or infinite values",
                "Check the calibration data and that the FP32 model itself gives finite outputs.",
            )
        summary = self._tensors.setdefault(name, _Summary())
        # Adding zero turns -0.0 into 0.0, whose order among equals is not defined.
        summary.low, summary.high = min(summary.low, low + 0.0), max(summary.high, high + 0.0)
        top = max(-low, high)
        if self.method != "minmax" and values is not None:
            summary.count += values.size
            self._cover(summary, top)
            for chunk in _chunks(values):
                self._bin(summary, chunk)
        return top + 0.0

    def ranges(self, method: str | None = None) -> dict[str, TensorRange]:
        """A range for each tensor that had at least one value.

        Args:
            method: another than the collector's own; `entropy` and `mse` collect the same, and all know `minmax`.

        Returns:
            By tensor name; low == -high except for `minmax`. (0, 0) for a tensor of zeros only.
        """
        chosen = method or self.method
        if chosen not in ("minmax", self.method) and not {chosen, self.method} <= set(_WEIGHED):
            raise ValueError(f"a collector for {self.method} cannot state ranges by {chosen}")
        return {name: self._range(one, chosen) for name, one in self._tensors.items() if one.low <= one.high}

    def _cover(self, summary: _Summary, top: float) -> None:
        """Let the histogram reach beyond a magnitude; zero needs none."""
        if top == 0:
            return
        exponent = math.frexp(top)[1]  # The smallest with top < 2^exponent.
        if summary.histogram is None or summary.exponent is None:
            summary.histogram = np.zeros(self._size, np.int64)
            summary.exponent = exponent
        elif exponent > summary.exponent:
            _fold(summary.histogram, exponent - summary.exponent)
            summary.exponent = exponent

    def _bin(self, summary: _Summary, chunk: npt.NDArray[Any]) -> None:
        """Count values whose magnitudes the histogram covers."""
        nonzero = int(np.count_nonzero(chunk))
        summary.zeros += chunk.size - nonzero
        if summary.histogram is None or summary.exponent is None:
            return
        magnitudes = np.abs(chunk, out=self._magnitudes.view(chunk.dtype)[: chunk.size])
        shift = self._bits - summary.exponent
        if shift < np.finfo(chunk.dtype).maxexp:
            magnitudes *= magnitudes.dtype.type(math.ldexp(1.0, shift))
        else:  # Only subnormal numbers so far: 2^shift itself would overflow.
            np.ldexp(magnitudes, shift, out=magnitudes)
        indices = self._indices[: chunk.size]
        np.copyto(indices, magnitudes, casting="unsafe")
        summary.histogram += np.bincount(indices, minlength=self._size)
        summary.histogram[0] -= chunk.size - nonzero

    def _range(self, summary: _Summary, method: str) -> TensorRange:
        if method == "minmax":
            return TensorRange(summary.low, summary.high, method)
        amax = summary.amax
        if summary.histogram is not None and summary.exponent is not None:
            unit = summary.exponent - self._bits
            peak = math.ldexp(amax, -unit)
            histogram = summary.histogram
            if not histogram[int(peak)]:
                # The largest value need not be among those that were counted.
                histogram = histogram.copy()
                histogram[int(peak)] = 1
            if method == "percentile":
                edge = self._percentile_edge(summary, histogram, peak)
            elif method == "entropy":
                edge = _entropy_edge(histogram, peak)
            else:
                edge = _mse_edge(histogram, peak)
            if edge < peak:
                # A subnormal threshold may round to zero, which no scale can be made of.
                amax = math.ldexp(edge, unit) or amax
        return TensorRange(0.0 - amax, amax, method)

    def _percentile_edge(self, summary: _Summary, histogram: _Counts, peak: float) -> float:
        # As a decimal fraction: 99.99 / 100 * 10000 in floating point may miss 9999.
        rank = math.ceil(Fraction(str(self.percentile)) * summary.count / 100)
        if rank <= summary.zeros:
            return peak
        return int(np.searchsorted(np.cumsum(histogram), rank - summary.zeros)) + 1.0


def _chunks(values: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """One-dimensional float32 or float64 pieces, whatever the memory order, without a whole copy."""
    if not values.size:
        return
    dtype: np.dtype[Any] = np.dtype(np.float64 if values.dtype.itemsize > 4 else np.float32)
    if values.dtype == dtype and values.flags.c_contiguous:
        flat = values.reshape(-1)
        yield from (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))
        return
    with np.nditer(
        [values],
        flags=["external_loop", "buffered"],
        op_flags=[["readonly"]],
        op_dtypes=[dtype],
        casting="same_kind",
        order="K",
        buffersize=_CHUNK,
    ) as pieces:
        for piece in pieces:
            yield np.asarray(piece)


def _fold(histogram: _Counts, doublings: int) -> None:
    """Let the counts cover a range 2^doublings times as wide, in place."""
    width = min(1 << min(doublings, 62), histogram.size)
    folded = histogram.reshape(-1, width).sum(axis=1)
    histogram[: folded.size] = folded
    histogram[folded.size :] = 0


def _entropy_edge(histogram: _Counts, peak: float) -> float:
    """The threshold, in bins, that loses the least information.

    For a candidate of i bins, P is the histogram's first i bins with everything above counted into
    the last one, Q the same bins without that, merged to 128 levels and spread again over the bins
    that were not empty. With h the counts, S and Z the sum and the number of non-empty bins of a
    level, `out` the counts above and T the total,

        T * KL(P || Q) = sum p log p - sum S log(S / Z) - out * log(S_last / Z_last)
                         - T log T + T log(T - out),

    where p are P's counts; all sums over bins come from running totals. A candidate whose last bin
    is empty has Q = 0 where P > 0, an infinite divergence, and is left out.

    Zeros are not in the histogram: every symmetric scale represents zero exactly, and the spike that
    a ReLU leaves at zero would outweigh the shape of all other values.
    """
    # Folded once, to the talk's resolution: `bins` to 2 * `bins` up to the largest magnitude.
    counts = histogram.reshape(-1, 2).sum(axis=1)
    used = int(peak) // 2 + 1
    counts = counts[:used].astype(np.float64)
    filled = np.flatnonzero(counts[_ENTROPY_LEVELS - 1 :]) + _ENTROPY_LEVELS
    below = np.concatenate([[0.0], np.cumsum(counts)])
    present = np.concatenate([[0.0], np.cumsum(counts > 0)])
    surprise = np.concatenate([[0.0], np.cumsum(_xlogx(counts))])
    total = below[-1]
    # A candidate that clips much of the data may still look alike in shape: where values stay away
    # from zero, one whose only filled bin holds the smallest of them has no divergence at all.
    filled = filled[total - below[filled] <= _ENTROPY_MOST_CLIPPED * total]
    best, edge = math.inf, used
    for start in range(0, filled.size, _BLOCK):
        ends = filled[start : start + _BLOCK]
        # Bin b of i belongs to level floor(128 b / i).
        cuts = -(-np.arange(_ENTROPY_LEVELS + 1) * ends[:, None] // _ENTROPY_LEVELS)
        sums = np.diff(below[cuts], axis=1)
        spread = np.log(np.maximum(sums, 1.0) / np.maximum(np.diff(present[cuts], axis=1), 1.0))
        last, out = counts[ends - 1], total - below[ends]
        divergence = (
            surprise[ends]
            - _xlogx(last)
            + _xlogx(last + out)
            - np.einsum("ij,ij->i", sums, spread)
            - out * spread[:, -1]
            + total * np.log((total - out) / total)
        ) / total
        # From the widest down and with a margin for rounding: among equals, clip the least.
        position = int(ends.size - 1 - np.argmin(divergence[::-1]))
        if divergence[position] <= best + 1e-12:
            best, edge = min(best, float(divergence[position])), int(ends[position])
    return 2.0 * edge


def _xlogx(values: _Reals) -> _Reals:
    """x log x with its limit 0 at 0, for counts."""
    result: _Reals = values * np.log(np.maximum(values, 1.0))
    return result


def _mse_edge(histogram: _Counts, peak: float) -> float:
    """The threshold, in bins, with the smallest expected squared error.

    With step s = threshold / 127 the quantized magnitude is q(x) = s * #{l < 127: x > (l + 1/2) s},
    clipping included. Let G0(t) and G1(t) be the integrals of the density and of x times the density
    above t. Summing by parts over the steps,

        E[(x - q)^2] = E[x^2] - 2 s sum_l G1((l + 1/2) s) + s^2 sum_l (2 l + 1) G0((l + 1/2) s).
    """
    counts = histogram[: int(peak) + 1].astype(np.float64)
    centres = np.arange(counts.size) + 0.5
    mass = np.concatenate([np.cumsum(counts[::-1])[::-1], [0.0]])
    moment = np.concatenate([np.cumsum((counts * centres)[::-1])[::-1], [0.0]])
    halves = np.arange(_LEVELS) + 0.5

    def errors(thresholds: _Reals) -> _Reals:
        steps = thresholds / _LEVELS
        points = steps[:, None] * halves
        bins = points.astype(np.intp)
        past = points - bins
        inside = counts[bins] * past
        above = mass[bins] - inside
        moments = moment[bins] - inside * (bins + 0.5 * past)
        gains = -2.0 * steps * moments.sum(axis=1) + 2.0 * steps**2 * (above @ halves)
        return np.asarray(gains)

    def smallest(thresholds: _Reals) -> float:
        found = np.concatenate([errors(thresholds[i : i + _BLOCK]) for i in range(0, thresholds.size, _BLOCK)])
        return float(thresholds[::-1][np.argmin(found[::-1])])

    coarse = smallest(peak * np.arange(1, _COARSE + 1) / _COARSE)
    near = coarse + peak * np.arange(-_FINE, _FINE + 1) / (_COARSE * _FINE)
    return smallest(np.unique(np.clip(near, peak / (_COARSE * _FINE), peak)))
