"""What is measured on samples to decide whether a correction pays: SQNR, and sums over channels.

Everything is one pass, in the memory of plain inference: sums over channels are taken inside the graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from gpuopt import onnx_model
from gpuopt.backends.onnxruntime import Session

Reals = npt.NDArray[np.float64]
Feed = Mapping[str, Any]

_NO_ERROR_DB = 200.0
_MOST_KEPT = 1 << 26
_PREFIX = "gpuopt.measurement"


@dataclass(frozen=True)
class Sqnr:
    """Signal over error power in dB, the mean over the floating-point outputs.

    Attributes:
        pooled_db: powers summed over the samples; few samples with outliers decide it.
        by_sample: of each sample alone, in order; NaN where an output has no ratio.
    """

    pooled_db: float
    by_sample: tuple[float, ...]

    @property
    def db(self) -> float:
        """The mean over the samples."""
        return float(np.nanmean(self.by_sample))

    def gain_over(self, before: Sqnr) -> float:
        """The mean over the samples that both have, in dB."""
        return float(np.mean(self._gains(before)))

    def pays_over(self, before: Sqnr, least_db: float) -> bool:
        """Whether samples gain `least_db` and twice the standard error of it, and the few worst do not lose as much."""
        gains = self._gains(before)
        if gains.size < 2:
            return False
        error = float(np.std(gains, ddof=1)) / math.sqrt(gains.size)
        return self.gain_over(before) >= max(least_db, 2 * error) and self.pooled_db >= before.pooled_db - least_db

    def _gains(self, before: Sqnr) -> Reals:
        gains: Reals = np.subtract(self.by_sample, before.by_sample)
        return gains[np.isfinite(gains)]


class ExactOutputs:
    """A graph's floating-point outputs on samples that come in the same order each time.

    They are kept, up to `_MOST_KEPT` bytes; beyond that the graph runs again.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._kept: dict[int, dict[str, npt.NDArray[Any]]] = {}
        self._room = _MOST_KEPT

    def of(self, index: int, feed: Feed) -> dict[str, npt.NDArray[Any]]:
        """The outputs on the sample with this index, by name."""
        if index in self._kept:
            return self._kept[index]
        found = {name: value for name, value in self._session.run(feed).items() if value.dtype.kind == "f"}
        size = sum(value.nbytes for value in found.values())
        if size <= self._room:
            self._room -= size
            self._kept[index] = found
        return found


def sqnr(exact: ExactOutputs, approximate: Session, samples: Iterable[Feed]) -> Sqnr | None:
    """Compare two graphs' outputs; values that are not finite in either are left out.

    Args:
        exact: of the original, on these samples.
        approximate: has the same outputs.
        samples: feeds by input name.

    Returns:
        None if no output has a ratio. An output without error counts as 200 dB.
    """
    total: dict[str, tuple[float, float]] = {}
    by_sample = []
    for index, feed in enumerate(samples):
        want = exact.of(index, feed)
        got = approximate.run(feed, list(want))
        powers = {name: _powers(value, got[name]) for name, value in want.items()}
        for name, (signal, error) in powers.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = (before[0] + signal, before[1] + error)
        alone = _mean_db(powers)
        by_sample.append(math.nan if alone is None else alone)
    pooled = _mean_db(total)
    return None if pooled is None else Sqnr(pooled, tuple(by_sample))


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
        model: FP32 graph in topological order.
        axes: channel axis by tensor, from 0, or -1 for the last.
        samples: feeds by input name.
        scratch: a folder that is not there yet.

    Returns:
        float64, (channels,), by tensor.
    """
    sums = _ChannelSums(onnx_model.opset(model))
    for tensor, axis in axes.items():
        for reduction in ("ReduceMax", "ReduceMin"):
            sums.add(reduction, tensor, axis)
    found: dict[str, Reals] = {}
    session = sums.session(model, scratch)
    for feed in samples:
        values = session.run(feed, sums.outputs)
        for tensor in axes:
            top = np.maximum(values[sums.name("ReduceMax", tensor)], -values[sums.name("ReduceMin", tensor)])
            found[tensor] = np.maximum(found.get(tensor, 0.0), top.astype(np.float64))
    return found


@dataclass(frozen=True)
class Mean:
    """A mean for each channel and its squared standard error, by the spread between samples; float64, (channels,)."""

    value: Reals
    squared_error: Reals


def mean_differences(
    model: onnx.ModelProto, pairs: Mapping[str, tuple[str, str, int]], samples: Iterable[Feed], scratch: Path
) -> dict[str, Mean]:
    """Mean over samples and places of (first - second), for each channel.

    Samples weigh the same whatever their size. Two sums a channel are held.

    Args:
        model: graph in topological order.
        pairs: by any key: first tensor, second tensor (made after it), channel axis as in `channel_maxima`.
        samples: feeds by input name.
        scratch: a folder that is not there yet.

    Returns:
        By key; empty without samples.
    """
    sums = _ChannelSums(onnx_model.opset(model))
    for one, other, axis in pairs.values():
        sums.add("ReduceMean", other, axis, subtracted_from=one)
    session = sums.session(model, scratch)
    totals: dict[str, tuple[Reals, Reals]] = {}
    count = 0
    for feed in samples:
        values = session.run(feed, sums.outputs)
        count += 1
        for key, (_, other, _) in pairs.items():
            mean = values[sums.name("ReduceMean", other)].astype(np.float64)
            total, squares = totals.get(key, (0.0, 0.0))
            totals[key] = (total + mean, squares + mean**2)
    found = {}
    for key, (total, squares) in totals.items():
        mean = total / count
        spread = np.maximum(squares / count - mean**2, 0.0)
        found[key] = Mean(mean, spread / (count - 1) if count > 1 else mean**2)
    return found


class _ChannelSums:
    """Reductions to a number a channel, computed inside a graph: activations are freed as in plain inference."""

    def __init__(self, opset_version: int) -> None:
        self._axes_are_inputs = opset_version >= 18
        self._constants: dict[str, npt.NDArray[np.int64]] = {}
        self._behind: dict[str, list[onnx.NodeProto]] = {}
        self.outputs: list[str] = []

    @staticmethod
    def name(reduction: str, tensor: str) -> str:
        """The output that gives this reduction of a tensor: float32, (channels,)."""
        return f"{_PREFIX}/{reduction}/{tensor}"

    def add(self, reduction: str, tensor: str, axis: int, subtracted_from: str = "") -> None:
        """Reduce a tensor, or its difference from one that was made before it, over all axes but one."""
        name = self.name(reduction, tensor)
        nodes = self._behind.setdefault(tensor, [])
        source = tensor
        if subtracted_from:
            nodes.append(helper.make_node("Sub", [subtracted_from, tensor], [f"{name}/difference"]))
            source = f"{name}/difference"
        if axis < 0:
            nodes.append(helper.make_node("Flatten", [source], [f"{name}/rows"], axis=axis))
            others = [0]
        else:
            # Whatever the rank: the axes up to the channels' as they are, all behind it together.
            nodes.append(
                helper.make_node("Reshape", [source, self._constant([0] * (axis + 1) + [-1])], [f"{name}/rows"])
            )
            others = [other for other in range(axis + 2) if other != axis]
        if self._axes_are_inputs:
            reduced = helper.make_node(reduction, [f"{name}/rows", self._constant(others)], [name], keepdims=0)
        else:
            reduced = helper.make_node(reduction, [f"{name}/rows"], [name], keepdims=0, axes=others)
        nodes.append(reduced)
        self.outputs.append(name)

    def session(self, model: onnx.ModelProto, scratch: Path) -> Session:
        """On the graph with the reductions in it, each right behind what it reads; the model is left as it is."""
        graph = model.graph
        original, outputs, initializers = list(graph.node), len(graph.output), len(graph.initializer)
        nodes = [node for value in graph.input for node in self._behind.get(value.name, ())]
        for node in original:
            nodes.append(node)
            nodes += [added for name in node.output for added in self._behind.get(name, ())]
        # Not on a copy: the weights may be most of the memory there is.
        try:
            del graph.node[:]
            graph.node.extend(nodes)
            graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in self._constants.items())
            graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.outputs)
            return Session(onnx_model.save(model, scratch), optimization="basic", lean=True)
        finally:
            del graph.node[:], graph.output[outputs:], graph.initializer[initializers:]
            graph.node.extend(original)

    def _constant(self, values: list[int]) -> str:
        name = f"{_PREFIX}/{'_'.join(map(str, values))}"
        self._constants[name] = np.array(values, np.int64)
        return name
