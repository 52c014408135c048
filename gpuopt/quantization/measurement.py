"""What is measured on samples to decide whether a correction pays: SQNR, and sums over channels.

Everything is one pass with memory for one sample's activations, whatever the number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from gpuopt import onnx_model
from gpuopt.backends.onnxruntime import Session

Reals = npt.NDArray[np.float64]
Feed = Mapping[str, Any]

_NO_ERROR_DB = 200.0


@dataclass(frozen=True)
class Sqnr:
    """Signal over error power in dB, the mean over the floating-point outputs.

    Attributes:
        db: powers summed over the samples.
        by_sample: of each sample alone, in order.
    """

    db: float
    by_sample: tuple[float, ...]

    def gains_over(self, before: Sqnr, least_db: float) -> bool:
        """Whether this is better by `least_db`, and on the single samples by more than twice the standard error."""
        gains = np.subtract(self.by_sample, before.by_sample)
        if gains.size < 2:
            return False
        error = float(np.std(gains, ddof=1)) / math.sqrt(gains.size)
        return self.db - before.db >= least_db and float(np.mean(gains)) > 2 * error


def sqnr(exact: Session, approximate: Session, samples: Iterable[Feed]) -> Sqnr | None:
    """Compare two graphs' outputs; values that are not finite in either are left out.

    Returns:
        None if no output has a ratio. An output without error counts as 200 dB.
    """
    total: dict[str, tuple[float, float]] = {}
    by_sample = []
    for feed in samples:
        want, got = exact.run(feed), approximate.run(feed)
        powers = {name: _powers(value, got[name]) for name, value in want.items() if value.dtype.kind == "f"}
        for name, (signal, error) in powers.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = (before[0] + signal, before[1] + error)
        if (alone := _mean_db(powers)) is not None:
            by_sample.append(alone)
    db = _mean_db(total)
    return None if db is None else Sqnr(db, tuple(by_sample))


def _powers(want: npt.NDArray[Any], got: npt.NDArray[Any]) -> tuple[float, float]:
    one, other = want.astype(np.float64), got.astype(np.float64)
    usable = np.isfinite(one) & np.isfinite(other)
    return float(np.sum(one[usable] ** 2)), float(np.sum((one[usable] - other[usable]) ** 2))


def _mean_db(powers: Mapping[str, tuple[float, float]]) -> float | None:
    ratios = [
        min(10 * math.log10(signal / error), _NO_ERROR_DB) if error > 0 else _NO_ERROR_DB
        for signal, error in powers.values()
        if signal > 0
    ]
    return sum(ratios) / len(ratios) if ratios else None


def channel_maxima(
    model: onnx.ModelProto, axes: Mapping[str, int], samples: Iterable[Feed], scratch: Path
) -> dict[str, Reals]:
    """Largest |x| of every channel of some activations.

    Args:
        model: FP32 graph; left as it is.
        axes: channel axis by tensor.
        scratch: a folder that is not there yet.

    Returns:
        float64, (channels,), by tensor.
    """
    session = watching(model, list(axes), scratch)
    found: dict[str, Reals] = {}
    for feed in samples:
        for name, value in session.run(feed, list(axes)).items():
            others = tuple(axis for axis in range(value.ndim) if axis != axes[name])
            top = np.abs(value).max(axis=others, initial=0.0).astype(np.float64)
            found[name] = np.maximum(found[name], top) if name in found else top
    return found


@dataclass(frozen=True)
class Mean:
    """A mean for each channel and its squared standard error, by the spread between samples; float64, (channels,)."""

    value: Reals
    squared_error: Reals


def mean_differences(
    session: Session, pairs: Mapping[str, tuple[str, str, int]], samples: Iterable[Feed]
) -> dict[str, Mean]:
    """Mean over samples and places of (first - second), for each channel.

    Samples weigh the same whatever their size. Two sums a channel are held.

    Args:
        session: shows the tensors below as outputs.
        pairs: by any key: first tensor, second tensor, channel axis.

    Returns:
        By key; empty without samples.
    """
    sums: dict[str, tuple[Reals, Reals]] = {}
    count = 0
    shown = list(dict.fromkeys(name for one, other, _ in pairs.values() for name in (one, other)))
    for feed in samples:
        values = session.run(feed, shown)
        count += 1
        for key, (one, other, axis) in pairs.items():
            difference = values[one].astype(np.float64) - values[other]
            places = tuple(a for a in range(difference.ndim) if a != axis % difference.ndim)
            mean = difference.mean(axis=places)
            total, squares = sums.get(key, (0.0, 0.0))
            sums[key] = (total + mean, squares + mean**2)
    found = {}
    for key, (total, squares) in sums.items():
        mean = total / count
        spread = np.maximum(squares / count - mean**2, 0.0)
        found[key] = Mean(mean, spread / (count - 1) if count > 1 else mean**2)
    return found


def watching(model: onnx.ModelProto, tensors: Sequence[str], scratch: Path) -> Session:
    """A session on the graph as written, with float32 activations as further outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    outputs = {value.name for value in model.graph.output}
    for name in dict.fromkeys(tensors):
        if name not in outputs:
            copy.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    return Session(onnx_model.save(copy, scratch), optimization="basic")
