"""Samples through the FP32 graph: a range for every watched activation, within a limit of memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from gpuopt import onnx_model
from gpuopt.backends.onnxruntime import Session
from gpuopt.calibration.collectors import RangeCollector, TensorRange
from gpuopt.calibration.memory import MIB, peak_bytes, release_freed, reset_peak, resident_bytes
from gpuopt.calibration.statistics import GraphStatistics
from gpuopt.errors import DataError, QuantizationError, RequirementError

Feed = Mapping[str, Any]
_MARGIN = 1.05
"""What a prediction has to leave free: allocators round up."""
_Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Seen:
    """One sample that went through the graph.

    Attributes:
        number: of the sample, from 1.
        feed: arrays by input name.
        magnitudes: the largest |x| of each activation watched in this pass, in this sample.
        passes: how many passes over the samples there will be, as far as is known.
        this_pass: from 1; each sample is seen once in each.
    """

    number: int
    feed: Feed
    magnitudes: Mapping[str, float]
    this_pass: int
    passes: int


@dataclass(frozen=True)
class Estimate:
    """What the first samples say of the whole run; `None` seconds where the number of samples is not known."""

    seconds: float | None
    peak_bytes: int


@dataclass(frozen=True)
class RunOptions:
    """How to run.

    Attributes:
        total: samples to come, where known; for the estimate.
        max_memory: the most bytes by which the process may grow. Activations that do not fit beside
            each other are watched one group after the other, in as many passes over the samples.
        providers: ONNX Runtime's execution providers, first choice first.
        seen: told of every sample.
        estimated: told once, after the first two samples.
    """

    total: int | None = None
    max_memory: int | None = None
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    seen: Callable[[Seen], None] = lambda sample: None
    estimated: Callable[[Estimate], None] = lambda estimate: None


@dataclass(frozen=True)
class Calibration:
    """The result of a run.

    Attributes:
        ranges: by tensor name, in the order asked for; without those that never had a value.
        samples: how many there were.
        passes: how often each went through the graph.
        provider: the execution provider that was at work.
        seconds: the whole run.
        peak_bytes: the most by which the process grew.
    """

    ranges: dict[str, TensorRange]
    samples: int
    passes: int
    provider: str
    seconds: float
    peak_bytes: int


def calibrate(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    samples: Iterable[Feed],
    collector: RangeCollector,
    scratch: Path,
    options: RunOptions | None = None,
) -> Calibration:
    """Choose a range for every tensor. Memory holds one sample's activations and the collector's histograms.

    Args:
        model: FP32 graph with the types of its tensors.
        tensors: float32 activations, graph inputs among them.
        samples: feeds by input name; iterated anew in every pass.
        collector: empty; it decides the method.
        scratch: a folder that is not there yet, for the watched graph.

    Raises:
        QuantizationError: the graph gives NaN or infinity on a sample.
        RequirementError: `max_memory` is too little for even one tensor at a time.
        DataError: of the reader; or passes differ in their number of samples.
    """
    return _Run(model, tensors, samples, collector, scratch, options or RunOptions()).result()


@dataclass(frozen=True)
class _Sizes:
    """What a sample of certain shapes takes, in bytes.

    Attributes:
        watched: of each watched tensor its whole size, and what stays of it to the end of a run.
        all: all tensors of the graph that are known, together.
    """

    watched: Mapping[str, tuple[int, int]]
    all: int


@dataclass(frozen=True)
class _Plain:
    """What plain inference takes, in bytes: until the first run is over, between runs, and in a further run."""

    opening: int = 0
    holding: int = 0
    running: int = 0
    sample: int = 1
    """`_Sizes.all` of that sample."""

    def need(self, sizes: _Sizes, beside: int) -> int:
        """For a sample of other shapes, with other arrays beside it: working memory grows as the tensors do."""
        return max(self.opening, self.holding + int(self.running * sizes.all / self.sample)) + beside


class _TooLarge(Exception):  # noqa: N818 - a signal to use smaller groups, not a failure
    """A sample's activations do not fit in memory beside each other."""


class _Run:
    def __init__(
        self,
        model: onnx.ModelProto,
        tensors: Sequence[str],
        samples: Iterable[Feed],
        collector: RangeCollector,
        scratch: Path,
        options: RunOptions,
    ) -> None:
        self._model = model
        self._tensors = list(tensors)
        self._samples = samples
        self._collector = collector
        self._scratch = scratch
        self._options = options
        self._inputs = {spec.name for spec in onnx_model.input_specs(model)}
        self._sizes: dict[_Shapes, _Sizes] = {}
        self._plain = _Plain()
        self._provider = ""
        self._estimated = False

    def result(self) -> Calibration:
        started = time.monotonic()
        first = next(iter(self._samples), None) if self._options.max_memory is not None else None
        if first is not None:
            # What ONNX Runtime loads once for a process is no memory of this calibration.
            self._session([]).run(first)
            release_freed()
        reset_peak()
        before = resident_bytes()
        waiting = self._groups(first)
        done: list[list[str]] = []
        count = 0
        while waiting:
            group = waiting.pop(0)
            if self._options.max_memory is not None:
                release_freed()
            try:
                found = self._pass(group, before, len(done) + 1, len(done) + 1 + len(waiting))
            except _TooLarge:
                for name in group:
                    self._collector.forget(name)
                middle = len(group) // 2
                waiting[:0] = [group[:middle], group[middle:]]
            else:
                if done and found != count:
                    raise DataError(
                        f"pass {len(done) + 1} over the calibration data has {found} samples, the first {count}",
                        "The data must give the same samples each time they are read.",
                    )
                count = found
                done.append(group)
        ranges = self._collector.ranges()
        return Calibration(
            ranges={name: ranges[name] for name in self._tensors if name in ranges},
            samples=count,
            passes=len(done),
            provider=self._provider,
            seconds=time.monotonic() - started,
            peak_bytes=max(peak_bytes() - before, 0),
        )

    def _groups(self, first: Feed | None) -> list[list[str]]:
        """The tensors of each pass: all at once, or as many as the limit lets stand beside each other."""
        if first is None:
            return [self._tensors]
        sizes = self._sizes_of(first)
        self._plain = self._measure(first, sizes.all)
        groups: list[list[str]] = [[]]
        for name in self._tensors:
            if groups[-1] and not self._fits([*groups[-1], name], sizes):
                groups.append([])
            groups[-1].append(name)
        return groups

    def _measure(self, feed: Feed, size: int) -> _Plain:
        before = resident_bytes()
        session = self._session([])
        # What the first run makes ready stays, and does not grow with the sample.
        session.run(feed)
        opening = peak_bytes() - before
        release_freed()
        holding = resident_bytes() - before
        reset_peak()
        session.run(feed)
        running = peak_bytes() - before - holding
        del session
        release_freed()
        reset_peak()
        return _Plain(opening, holding, running, max(size, 1))

    def _fits(self, group: Sequence[str], sizes: _Sizes) -> bool:
        limit = self._options.max_memory
        return limit is None or self._need(group, sizes) <= limit / _MARGIN

    def _need(self, group: Sequence[str], sizes: _Sizes) -> int:
        made = [sizes.watched[name] for name in group if name not in self._inputs]
        histograms = self._collector.bytes_per_tensor * len(self._tensors)
        # Beside what stays to the end of a run, one activation that is at work.
        return self._plain.need(sizes, sum(kept for _, kept in made) + max((whole for whole, _ in made), default=0)) + (
            histograms
        )

    def _sizes_of(self, feed: Feed) -> _Sizes:
        """By shape inference; a watched tensor on which that is silent counts as the largest of the others."""
        shapes: _Shapes = tuple((name, np.shape(feed[name])) for name in sorted(feed))
        if shapes not in self._sizes:
            known = onnx_model.concrete_shapes(self._model, dict(shapes))
            whole = {name: 4 * math.prod(shape) for name, shape in known.items()}
            watched = {name: (whole[name], self._kept(known[name])) for name in self._tensors if name in known}
            largest = max(watched.values(), default=(0, 0))
            for name in self._tensors:
                watched.setdefault(name, largest)
            self._sizes[shapes] = _Sizes(watched, sum(whole.values()))
        return self._sizes[shapes]

    def _kept(self, shape: tuple[int, ...]) -> int:
        """Bytes of a watched tensor that stay to the end of a run."""
        if self._collector.needs_all_values:
            return 4 * math.prod(shape)
        return 4 * sum(shape[:1]) * min(math.prod(shape[1:]), self._collector.values_per_slice)

    def _pass(self, group: list[str], before: int, number: int, passes: int) -> int:
        """Collect a group's values over all samples; gives their number."""
        watched = [name for name in group if name not in self._inputs]
        whole = self._collector.needs_all_values
        statistics = GraphStatistics(self._model, () if whole else watched, self._collector.values_per_slice)
        try:
            outputs = watched if whole else statistics.outputs
            session = self._session(watched if whole else ())
        finally:
            statistics.remove()
        self._provider = session.provider
        count = 0
        for count, feed in enumerate(self._samples, 1):
            started = time.monotonic()
            self._check_memory(group, feed)
            values = session.run(feed, outputs)
            magnitudes = {}
            for name in group:
                try:
                    if whole or name in self._inputs:
                        array = feed[name] if name in self._inputs else values.pop(name)
                        magnitudes[name] = self._collector.update(name, array)
                    else:
                        magnitudes[name] = self._collector.add(name, *statistics.read(name, values))
                except DataError as error:
                    raise _not_finite(name, count) from error
            del values
            if self._options.max_memory is not None:
                release_freed()
            self._options.seen(Seen(count, feed, magnitudes, number, passes))
            # The first run also warms up; the second is like those to come.
            if not self._estimated and (count == 2 or self._options.total == 1):
                self._estimated = True
                seconds, total = time.monotonic() - started, self._options.total
                self._options.estimated(
                    Estimate(None if total is None else seconds * total * passes, max(peak_bytes() - before, 0))
                )
        return count

    def _check_memory(self, group: Sequence[str], feed: Feed) -> None:
        limit = self._options.max_memory
        if limit is None or self._fits(group, sizes := self._sizes_of(feed)):
            return
        if sizes.all > self._plain.sample:
            # Told from a smaller sample, by a rule of proportion: look before turning back.
            self._plain = self._measure(feed, sizes.all)
            if self._fits(group, sizes):
                return
        if len(group) > 1:
            raise _TooLarge
        shapes = ", ".join(f"{name} {tuple(np.shape(value))}" for name, value in feed.items())
        raise RequirementError(
            f"calibration needs {self._need(group, sizes) / MIB:.0f} MiB on a sample of {shapes}, plain inference "
            f"{self._plain.need(sizes, 0) / MIB:.0f} MiB; the limit is {limit / MIB:.0f} MiB",
            "Raise --max-calibration-memory or give smaller samples.",
        )

    def _session(self, watched: Sequence[str]) -> Session:
        """A session on the graph with these activations as outputs."""
        graph = self._model.graph
        types = {value.name: value for value in [*graph.value_info, *graph.output]}
        outputs = {value.name for value in graph.output}
        added = [types[name] for name in watched if name not in outputs]
        # Not on a copy: the weights may be most of the memory there is.
        graph.output.extend(added)
        try:
            path = onnx_model.save(self._model, self._scratch)
        finally:
            del graph.output[len(outputs) :]
        limited = self._options.max_memory is not None
        # Further optimizations bring convolutions in blocked layouts, whose copies all live to the end.
        level = "basic" if limited else "all"
        return Session(path, self._options.providers, level, lean=limited)


def _not_finite(name: str, number: int) -> QuantizationError:
    return QuantizationError(
        f"the FP32 graph gives NaN or infinity in '{name}' on sample {number - 1}",
        "Check that the calibration data is scaled as in training.",
    )
