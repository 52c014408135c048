"""Checks of calibration data for the classic mistakes, on the way through the samples, in bounded memory.

Every check is silent unless its evidence is strong: a warning that is often wrong is soon read by nobody.
Per sample there is one pass over the inputs, and of the activations only their largest magnitudes are read.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gpuopt.calibration.first_layers import FirstConv
from gpuopt.errors import DataError

FEW_SAMPLES = 32
EARLY_SAMPLES = 8
"""After so many samples, scale and layout can be judged: `DataChecks.early`."""

_Array = npt.NDArray[Any]

_MOST_REMEMBERED = 1 << 16
_MOST_COMPARED = 1 << 12
_POINTS = 256
"""Elements of a sample that stand for it where it is compared with others."""

_NEAR = 0.02
"""Samples are near-duplicates below this root mean square difference, in standard deviations of the sample."""

_DUPLICATES_ALLOWED = 0.01
_NEAR_DUPLICATES_ALLOWED = 0.05

_PLACES = 32
"""Outputs of the first Conv that are computed a sample."""

_FACTOR = 8.0
_FACTOR_WITH_TRACES = 3.0
"""Standard deviations that differ so much are another scale; the smaller one where the values look unscaled, too."""

_SHIFT = 8.0
"""A mean that lies so many of the training's standard deviations away is another offset."""

_LARGE_OUTPUT = 8.0
"""Root mean square of a first Conv's outputs above which 8-bit pixels are taken for unscaled."""

_LAYOUT_SAMPLES = 16
_LAYOUT_ROWS = 32
_REPEATING = 0.6
_ROUGH = 2.0

_GROWTH_SAMPLES = 16
"""From this number on growth is judged; fewer are too few in any case."""

_GREW = 0.1
_GREW_SHARE = 0.5
"""Ranges grow where this share of them grew by `_GREW` in the last quarter or third of the samples."""

_FURTHER_SHARE = 0.5
"""Fewer further samples than this share of those that were given are not worth a word."""

_SETTLED = 0.01
_HORIZON = 32
"""Settled: another `_HORIZON` samples are expected to widen the range by less than `_SETTLED`."""

_MOST_FURTHER = 10_000


@dataclass(frozen=True)
class Finding:
    """Something that is probably wrong with the data.

    Attributes:
        check: which check found it, such as `duplicates`.
        message: one line with the numbers that it rests on.
        evidence: the same numbers, for programs; JSON values only.
        severity: `warning`; `error` where the run was strict about its data.
    """

    check: str
    message: str
    evidence: Mapping[str, Any]
    severity: str = "warning"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def of_random_data() -> tuple[Finding, ...]:
    """The one finding about random data: nothing else that is found in them means anything."""
    return (Finding("random-data", "INT8 ranges come from random data: a smoke test, not a release", {}),)


def refuse(findings: Sequence[Finding]) -> None:
    """Make an error of findings, for runs that are strict about their data.

    Raises:
        DataError: there is one; the message is the first one's.
    """
    if findings:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise DataError(
            f"{findings[0].message}{more}",
            "Correct the data; or leave out --strict-calibration, and it is a warning.",
        )


@dataclass
class _Input:
    """What is kept of one floating-point input; the arrays have one value a channel."""

    sums: _Array
    squares: _Array
    lows: _Array
    highs: _Array
    count: int = 0
    zeros: list[int] = field(default_factory=list)
    """The first samples that are zero throughout."""
    zero_samples: int = 0
    whole: bool = True
    """Whether all values so far are whole numbers."""
    steps: list[tuple[float, float]] = field(default_factory=list)
    """Of the first samples: mean difference of neighbours along the width, and of values C apart."""
    roughness: list[tuple[float, float, float]] = field(default_factory=list)
    """Of the first samples: mean difference of neighbours along channels, height and width."""


@dataclass
class _Outputs:
    """Sums over the computed outputs of a first Conv, one a channel."""

    sums: _Array
    squares: _Array
    count: int = 0


class DataChecks:
    """Sees every sample once and says at the end what is probably wrong with them.

    Args:
        convs: the Conv that reads an input, for every input that one reads. Such inputs, N x C x spatial
            axes, are images, sound or the like, and what is checked of channels, layout, scale and
            near-duplicates is checked of them alone.
    """

    def __init__(self, convs: Sequence[FirstConv] = ()) -> None:
        self._convs = {conv.input: conv for conv in convs}
        self._inputs: dict[str, _Input] = {}
        self._outputs: dict[str, _Outputs] = {}
        self._count = 0
        self._slices = 0
        self._alone = False
        self._seen: dict[bytes, int] = {}
        self._duplicates: list[tuple[int, int]] = []
        self._near_duplicates: list[tuple[int, int]] = []
        self._known = _Known()
        self._growth = _Growth()

    def sample(self, index: int, feed: Mapping[str, _Array]) -> None:
        """Add one sample.

        Args:
            index: its number, from 0, for messages.
            feed: values by input name, finite.
        """
        self._count += 1
        self._slices += _slices(feed)
        self._alone = len(feed) == 1
        digest = hashlib.blake2b(digest_size=16)
        points = []
        for name, values in sorted(feed.items()):
            if not np.issubdtype(values.dtype, np.floating) or not values.size:
                _add_bytes(digest, name, values)
                continue
            moments = self._add_floats(name, values, index)
            if values.nbytes <= 1 << 16:
                _add_bytes(digest, name, values)
            else:
                # A whole hash of a large sample takes longer than all other checks: equal sums, extremes
                # and checksum make the same statement.
                digest.update(f"{name}{values.shape}{zlib.crc32(np.ascontiguousarray(values).data)}".encode())
                digest.update(moments)
            if name in self._convs and values.size >= _POINTS:
                places = np.linspace(0, values.size - 1, _POINTS).astype(np.intp)
                points.append(values.reshape(-1)[places].astype(np.float32))
        first = self._seen.get(digest.digest())
        if first is not None:
            self._duplicates.append((index, first))
            return
        if len(self._seen) < _MOST_REMEMBERED:
            self._seen[digest.digest()] = index
        if len(points) == len(feed):
            near = self._known.near(index, np.concatenate(points))
            if near is not None:
                self._near_duplicates.append((index, near))

    def activations(self, amax: Mapping[str, float]) -> None:
        """Add the largest magnitude of each watched tensor on the sample."""
        self._growth.add(amax)

    def early(self) -> tuple[Finding, ...]:
        """What a few samples suffice for: scale and layout."""
        return tuple(finding for name in self._inputs for finding in (*self._layout(name), *self._scale(name)))

    def findings(self) -> tuple[Finding, ...]:
        """Everything that is probably wrong, the worst first."""
        found = [*self.early()]
        for name in self._inputs:
            found += self._constant(name) + self._zero(name)
        found += self._repeated() + self._few() + self._growth.finding()
        return tuple(found)

    def _add_floats(self, name: str, values: _Array, index: int) -> bytes:
        """Update the input's moments; the sample's own moments as bytes."""
        conv = self._convs.get(name)
        channels = values.shape[1] if conv is not None and values.ndim > 2 else 1
        cut = values.reshape(values.shape[0], channels, -1) if channels > 1 else values.reshape(1, 1, -1)
        # FP16 overflows at 65504, which the pixels of one image exceed together.
        dtype = cut.dtype if cut.itemsize > 2 else np.float32
        sums = cut.sum(axis=(0, 2), dtype=dtype).astype(np.float64)
        squares = np.einsum("ncx,ncx->c", cut, cut, dtype=dtype).astype(np.float64)
        lows, highs = cut.min(axis=(0, 2)), cut.max(axis=(0, 2))
        kept = self._inputs.get(name)
        if kept is None:
            kept = self._inputs[name] = _Input(np.zeros(channels), np.zeros(channels), lows.copy(), highs.copy())
        if kept.sums.size == channels:
            kept.sums += sums
            kept.squares += squares
            np.minimum(kept.lows, lows, out=kept.lows)
            np.maximum(kept.highs, highs, out=kept.highs)
            kept.count += values.size // channels
        if not lows.any() and not highs.any():
            kept.zero_samples += 1
            if len(kept.zeros) < 8:
                kept.zeros.append(index)
        kept.whole = kept.whole and _is_whole(values)
        if conv is not None:
            self._add_outputs(conv, values, index)
            if len(kept.steps) < _LAYOUT_SAMPLES:
                _add_layout(kept, values)
        return b"".join(part.tobytes() for part in (sums, squares, lows, highs))

    def _add_outputs(self, conv: FirstConv, values: _Array, index: int) -> None:
        outputs = conv.outputs_at(values, _PLACES, index)
        if outputs is None:
            return
        channels = outputs.shape[1]
        kept = self._outputs.setdefault(conv.input, _Outputs(np.zeros(channels), np.zeros(channels)))
        kept.sums += outputs.sum(axis=0)
        kept.squares += np.square(outputs).sum(axis=0)
        kept.count += len(outputs)

    def _scale(self, name: str) -> list[Finding]:
        """Compare the first Conv's outputs with what the BatchNorm behind it saw in training."""
        if name not in self._outputs:
            return []
        conv, kept, outputs = self._convs[name], self._inputs[name], self._outputs[name]
        low, high = float(kept.lows.min()), float(kept.highs.max())
        bytes_like = low >= 0 and high > 8 and kept.whole
        spread = {
            "input": name,
            "low": low,
            "high": high,
            "mean": float(kept.sums.sum() / (kept.count * kept.sums.size)),
            "whole_numbers": kept.whole,
        }
        shown = f"values {low:.4g} to {high:.4g}, mean {spread['mean']:.4g}" + (", whole numbers" * kept.whole)
        means = outputs.sums / outputs.count
        if conv.norm is None:
            size = math.sqrt(float(np.mean(outputs.squares / outputs.count)))
            if not (bytes_like and 127 < high <= 255 and size > _LARGE_OUTPUT):
                return []
            message = (
                f"'{name}' looks like unscaled 8-bit pixels: {shown}; the first Conv's outputs have a root mean "
                f"square of {size:.3g}. Scale the data as in training"
            )
            return [Finding("scale", message, {**spread, "first_conv_rms": size})]
        variances = np.maximum(outputs.squares / outputs.count - np.square(means), 0)
        alive = conv.norm.variance > 1e-6 * np.median(conv.norm.variance)
        trained = np.sqrt(conv.norm.variance[alive].astype(np.float64))
        if not trained.size:
            return []
        ratio = float(np.median(np.sqrt(variances[alive]) / trained))
        shift = float(np.median(np.abs(means[alive] - conv.norm.mean[alive]) / trained))
        traces = (ratio > 1 and low >= 0 and high > 8) or (ratio < 1 and low >= 0 and high <= 1)
        factor = _FACTOR_WITH_TRACES if traces else _FACTOR
        if 1 / factor < ratio < factor and shift < _SHIFT:
            return []
        layer = f"'{conv.norm.name}'" if conv.norm.name else "the first BatchNorm"
        message = (
            f"'{name}' is not scaled as in training: at {layer} its standard deviation is {ratio:.3g} times, and its "
            f"mean {shift:.3g} standard deviations off, what training left there ({shown})"
        )
        evidence = {**spread, "norm": conv.norm.name, "std_ratio": ratio, "mean_shift_in_std": shift}
        return [Finding("scale", message, evidence)]

    def _layout(self, name: str) -> list[Finding]:
        kept = self._inputs[name]
        if kept.steps:
            near, apart = (float(value) for value in np.mean(kept.steps, axis=0))
            # In images that were not cut apart, what lies further away differs more.
            agreeing = sum(b < a for a, b in kept.steps)
            if apart < _REPEATING * near and agreeing >= 0.9 * len(kept.steps):
                channels = kept.sums.size
                message = (
                    f"'{name}' seems to hold HWC images reshaped, not transposed, to CHW: along the width every "
                    f"{_ordinal(channels)} value differs by {apart:.3g}, neighbours by {near:.3g}"
                )
                evidence = {"input": name, "period": channels, "step": near, "step_a_period_apart": apart}
                return [Finding("layout", message, evidence)]
        if kept.roughness:
            along = [float(value) for value in np.mean(kept.roughness, axis=0)]
            if all(c <= 1.5 * h and w > _ROUGH * max(c, h) for c, h, w in kept.roughness):
                message = (
                    f"'{name}' seems to be NHWC where the model takes NCHW: neighbours differ by {along[2]:.3g} along "
                    f"the last axis, by {along[0]:.3g} and {along[1]:.3g} along the two before"
                )
                return [Finding("layout", message, {"input": name, "differences_along_axes": along})]
        return []

    def _constant(self, name: str) -> list[Finding]:
        kept = self._inputs[name]
        if name not in self._convs or kept.zero_samples == self._count:
            return []
        flat = [int(channel) for channel in np.flatnonzero(kept.lows == kept.highs)]
        if not flat:
            return []
        value = float(kept.lows[flat[0]])
        which = "all channels are" if len(flat) == kept.lows.size else _channels(flat)
        message = f"'{name}': {which} constant over all {self._count} samples (value {value:.4g})"
        return [Finding("constant-channel", message, {"input": name, "channels": flat, "value": value})]

    def _zero(self, name: str) -> list[Finding]:
        kept = self._inputs[name]
        # Beside other inputs, one that feeds no Conv may be a state, a mask or a time.
        if not kept.zeros or not (name in self._convs or self._alone):
            return []
        some = ", ".join(map(str, kept.zeros[:4])) + (", ..." if kept.zero_samples > 4 else "")
        message = f"'{name}' is all zeros in {kept.zero_samples} of {self._count} samples (sample {some})"
        evidence = {"input": name, "count": kept.zero_samples, "samples": kept.zeros}
        return [Finding("all-zero", message, evidence)]

    def _repeated(self) -> list[Finding]:
        found = []
        exact, near = len(self._duplicates), len(self._near_duplicates)
        if exact > _DUPLICATES_ALLOWED * self._count:
            which = _pairs(self._duplicates)
            message = (
                f"{exact} of {self._count} samples repeat an earlier one exactly ({which}): "
                f"{self._count - exact} different ones are left"
            )
            found.append(Finding("duplicates", message, {"count": exact, "pairs": self._duplicates[:8]}))
        if near > _NEAR_DUPLICATES_ALLOWED * self._count:
            which = _pairs(self._near_duplicates)
            message = f"{near} of {self._count} samples hardly differ from an earlier one ({which})"
            found.append(Finding("near-duplicates", message, {"count": near, "pairs": self._near_duplicates[:8]}))
        return found

    def _few(self) -> list[Finding]:
        if self._slices >= FEW_SAMPLES:
            return []
        message = f"only {self._slices} calibration samples: ranges may be too narrow; a few hundred are usual"
        return [Finding("few-samples", message, {"samples": self._slices, "at_least": FEW_SAMPLES})]


class _Known:
    """Earlier samples, for comparison: their points, means and standard deviations."""

    def __init__(self) -> None:
        self._count = 0
        self._numbers: list[int] = []
        self._points = np.empty((0, 0), np.float32)
        self._moments = np.empty((0, 2), np.float64)

    def near(self, index: int, points: _Array) -> int | None:
        """Remember a sample; the number of an earlier one that it hardly differs from."""
        mean, deviation = float(points.mean()), float(points.std())
        # Of masks and drawings on an even ground too few points tell one from another.
        telling = np.count_nonzero(points != np.median(points))
        if telling < points.size // 4 or (self._count and self._points.shape[1] != points.size):
            return None
        known = self._moments[: self._count]
        # Equal samples have equal moments: that leaves few to compare with.
        candidates = np.flatnonzero(np.all(np.abs(known - (mean, deviation)) <= _NEAR * deviation, axis=1))
        if candidates.size:
            differences = np.square(self._points[candidates] - points).mean(axis=1)
            best = int(np.argmin(differences))
            if differences[best] <= (_NEAR * deviation) ** 2:
                return self._numbers[int(candidates[best])]
        if self._count < _MOST_COMPARED:
            self._grow(points.size)
            self._points[self._count] = points
            self._moments[self._count] = mean, deviation
            self._numbers.append(index)
            self._count += 1
        return None

    def _grow(self, width: int) -> None:
        if self._count == len(self._points):
            rows = max(64, 2 * self._count)
            points, moments = np.empty((rows, width), np.float32), np.empty((rows, 2))
            if self._count:
                points[: self._count], moments[: self._count] = self._points, self._moments
            self._points, self._moments = points, moments


class _Growth:
    """The largest magnitude so far of every tensor, at sample counts 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._amax: _Array = np.empty(0)
        self._count = 0
        self._at: list[int] = []
        self._snapshots: list[_Array] = []

    def add(self, amax: Mapping[str, float]) -> None:
        if not self._count:
            self._names = list(amax)
            self._amax = np.zeros(len(self._names))
        self._count += 1
        np.maximum(self._amax, [amax.get(name, 0.0) for name in self._names], out=self._amax)
        if _is_checkpoint(self._count):
            self._at.append(self._count)
            self._snapshots.append(self._amax.copy())

    def finding(self) -> list[Finding]:
        """Whether ranges still grew at the end, and how many more samples would settle them.

        The model is amax(n) = a + b log n, fitted by least squares to the second half of the samples'
        checkpoints and the end: so grow the extremes of values with an exponential tail.
        """
        if self._count < _GROWTH_SAMPLES or not self._names:
            return []
        since = max(i for i, at in enumerate(self._at) if at <= 0.75 * self._count)
        final = np.maximum(self._amax, np.finfo(np.float64).tiny)
        grew = (self._amax - self._snapshots[since]) / final
        growing = np.flatnonzero(grew >= _GREW)
        if growing.size < _GREW_SHARE * len(self._names):
            return []
        further = self._further(final)
        if further is not None and further < _FURTHER_SHARE * self._count:
            return []
        name = self._names[int(np.argmax(grew))]
        amount = f"more than {_MOST_FURTHER}" if further is None else f"about {further}"
        message = (
            f"ranges still grow: in the last {self._count - self._at[since]} of {self._count} samples "
            f"{growing.size} of {len(self._names)} tensors grew by {_GREW:.0%} or more ('{name}' by {grew.max():.0%}); "
            f"{amount} more samples would settle them"
        )
        evidence = {
            "samples": self._count,
            "since_sample": self._at[since],
            "growing_tensors": int(growing.size),
            "tensors": len(self._names),
            "most": {"tensor": name, "growth": float(grew.max())},
            "further_samples": further,
            "model": f"amax = a + b log(n); settled: {_HORIZON} more samples widen 9 of 10 tensors by less than "
            f"{_SETTLED:.0%}",
        }
        return [Finding("growing-ranges", message, evidence)]

    def _further(self, final: _Array) -> int | None:
        """Samples until 9 of 10 tensors are settled; None beyond `_MOST_FURTHER`."""
        first = max(0, len(self._at) // 2 - 1)
        counts, amax = [*self._at[first:]], [*self._snapshots[first:]]
        if counts[-1] != self._count:
            counts.append(self._count)
            amax.append(self._amax)
        logs = np.log(counts)
        values = np.stack(amax) / final
        centred = logs - logs.mean()
        slopes = np.maximum(centred @ (values - values.mean(axis=0)) / (centred @ centred), 0)
        starts = values.mean(axis=0) - slopes * logs.mean()

        def settled(count: int) -> bool:
            expected = slopes * math.log1p(_HORIZON / count) / np.maximum(starts + slopes * math.log(count), 1e-12)
            return bool(np.quantile(expected, 0.9) < _SETTLED)

        low, high = self._count, self._count + _MOST_FURTHER
        if not settled(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if settled(middle) else (middle, high)
        return high - self._count


def _slices(feed: Mapping[str, _Array]) -> int:
    """How many samples a feed is: a batch of them, where its inputs agree on the length of a first axis."""
    lengths = {values.shape[0] if values.ndim > 1 else 1 for values in feed.values()}
    return lengths.pop() if len(lengths) == 1 else 1


def _is_checkpoint(count: int) -> bool:
    """Powers of two, and those times 3/2."""
    odd = count // (count & -count)
    return odd == 1 or odd == 3


def _add_bytes(digest: Any, name: str, values: _Array) -> None:
    digest.update(f"{name}{values.shape}".encode())
    digest.update(np.ascontiguousarray(values).tobytes())


def _is_whole(values: _Array) -> bool:
    flat = values.reshape(-1)
    head = flat[:1024]
    return bool(np.all(head == np.floor(head))) and bool(np.all(flat == np.floor(flat)))


def _add_layout(kept: _Input, values: _Array) -> None:
    """Note how much neighbours differ, in the first image of a sample N x C x H x W."""
    if values.ndim != 4:
        return
    image = values[0].astype(np.float32)
    channels, height, width = image.shape
    if channels == width > 4 and height > 4:
        kept.roughness.append(tuple(float(np.abs(np.diff(image, axis=axis)).mean()) for axis in range(3)))  # type: ignore[arg-type]
    if 2 <= channels <= 4 and width >= 4 * channels:
        rows = image[:, :: max(1, height // _LAYOUT_ROWS)]
        near = float(np.abs(rows[..., 1:] - rows[..., :-1]).mean())
        apart = float(np.abs(rows[..., channels:] - rows[..., :-channels]).mean())
        kept.steps.append((near, apart))


def _channels(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"channel {shown} is" if len(numbers) == 1 else f"channels {shown} are"


def _ordinal(number: int) -> str:
    return {2: "2nd", 3: "3rd"}.get(number, f"{number}th")


def _pairs(pairs: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(f"sample {one} is {other}" for one, other in pairs[:3])
    return shown + (", ..." if len(pairs) > 3 else "")
