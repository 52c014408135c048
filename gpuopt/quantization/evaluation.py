"""The accuracy of a variant of the model: a user's metric over predictions and labels, or a default one.

Without a metric it is top-1 accuracy where there are labels and one output of shape (N, classes), top-1
agreement with the FP32 model for such an output without labels, and else the mean cosine with FP32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from gpuopt import onnx_model, reference, user_code
from gpuopt.backends.onnxruntime import Session
from gpuopt.calibration.readers import npy
from gpuopt.calibration.readers.base import SampleReader, spread
from gpuopt.comparison import Distance
from gpuopt.errors import DataError, UsageError, described
from gpuopt.quantization.samples import StoredSamples, open_samples
from gpuopt.recipe import AccuracySection
from gpuopt.reference import Array, Feed
from gpuopt.shapes import TensorSpec
from gpuopt.stages.context import StageContext
from gpuopt.tolerance import DROP_ROUNDING

Outputs = Mapping[str, Array]
Advance = Callable[[int, int | None], None]


class Metric(Protocol):
    """A figure of a model over a stream of samples; larger is better.

    Attributes:
        name: for people.
        relative: whether it compares with FP32's outputs, for which it is 1 by definition.
    """

    name: str
    relative: bool

    def add(self, outputs: Outputs, expected: Outputs) -> None:
        """Take in one sample's outputs; `expected` are FP32's, empty unless `relative`."""

    def value(self) -> float:
        """The figure of what was taken in."""


class TopOne:
    """Share of the rows whose largest score stands at the label, or where FP32 has its largest without labels."""

    def __init__(self, output: str, labels: Array | None) -> None:
        self.name = "top-1 accuracy" if labels is not None else "top-1 agreement with FP32"
        self.relative = labels is None
        self._output, self._labels = output, labels
        self._rows = self._hits = 0

    def add(self, outputs: Outputs, expected: Outputs) -> None:
        scores = outputs[self._output]
        rows = range(self._rows, self._rows + len(scores))
        found = np.argmax(scores, axis=1)
        # NaN counts as a miss: argmax would take it for the largest.
        found = np.where(np.isnan(scores).any(axis=1), -1, found)
        if self._labels is None:
            right = np.argmax(expected[self._output], axis=1)
        else:
            right = self._labels[rows.start : rows.stop]
        if len(right) != len(rows):
            raise DataError(
                f"output '{self._output}' has {rows.stop} rows so far, and there are {rows.start + len(right)} labels",
                "Give --metric package.module:function where a sample has not one label.",
            )
        self._hits += int(np.count_nonzero(found == right))
        self._rows = rows.stop

    def value(self) -> float:
        return self._hits / self._rows


class MeanCosine:
    """Cosine with FP32's outputs (of values that are no floats: the share of equal ones), mean over outputs and
    samples; 0 for a sample with NaN."""

    name = "mean cosine with FP32"
    relative = True

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, outputs: Outputs, expected: Outputs) -> None:
        for name, wanted in expected.items():
            distance = Distance()
            distance.add(outputs[name], wanted)
            if distance.relative_error == 0:
                self._sum += 1.0
            elif wanted.dtype.kind != "f":
                self._sum += max(0.0, 1.0 - distance.relative_error)
            else:
                self._sum += distance.cosine or 0.0
            self._count += 1

    def value(self) -> float:
        return self._sum / self._count


class UserMetric:
    """`package.module:function` over all predictions, an array or a dict of arrays by output, and the labels."""

    relative = False

    def __init__(self, name: str, labels: Array | None, files: set[str]) -> None:
        """`files` receives what the code opens for reading, on which its result depends."""
        self.name, self._labels, self._files = name, labels, files
        with user_code.files_opened() as opened:
            self._function = _function(name)
        files.update(opened)
        self._kept: dict[str, list[Array]] = {}

    def add(self, outputs: Outputs, expected: Outputs) -> None:
        for name, value in outputs.items():
            self._kept.setdefault(name, []).append(value)

    def value(self) -> float:
        stacked = {name: _stacked(name, parts) for name, parts in self._kept.items()}
        predictions = next(iter(stacked.values())) if len(stacked) == 1 else stacked
        try:
            with user_code.files_opened() as opened:
                value = float(self._function(predictions, self._labels))
            self._files.update(opened)
        except Exception as error:  # the user's code may raise anything
            raise UsageError(
                f"the metric {self.name} fails: {described(error)}",
                "It is called with predictions (an array, or a dict of arrays by output name) and labels (None where\n"
                "there are none), each with the samples along axis 0, and returns a number, larger is better.",
            ) from error
        if not math.isfinite(value):
            raise UsageError(
                f"the metric {self.name} returned {value}",
                "Return a finite number, larger is better; check what it divides by.",
            )
        return value


@dataclass(frozen=True)
class Score:
    """A metric's value and how many samples it is of."""

    value: float
    samples: int


@dataclass(frozen=True)
class Evaluation:
    """A metric over fixed samples.

    Attributes:
        samples: opened anew for each pass; memory holds one sample and, for a user's metric, the predictions.
        metric: a new, empty one for each pass.
        stored: FP32's outputs, for a metric that is relative to them.
        files: what a user's metric opened for reading so far.
    """

    samples: SampleReader
    metric: Callable[[], Metric]
    stored: StoredSamples | None
    files: set[str]

    @property
    def name(self) -> str:
        return self.metric().name

    @property
    def counts_rows(self) -> bool:
        """Whether the metric is a share of the samples, which cannot move by less than one of them."""
        return isinstance(self.metric(), TopOne)

    def score(self, model: onnx.ModelProto, folder: Path, advance: Advance = lambda done, total: None) -> Score:
        """The metric of a graph in ONNX Runtime, as its users run it.

        Args:
            folder: for the graph's file.

        Raises:
            UsageError: the user's metric fails or gives NaN.
            DataError, QuantizationError: of the samples.
        """
        session, metric, count = Session(onnx_model.save(model, folder)), self.metric(), 0
        total = self.samples.total if self.stored is None else len(self.stored)
        for feed, expected in self.stored or ((feed, {}) for feed in self.samples):
            metric.add(session.run(feed), expected)
            count += 1
            advance(count, total)
        return Score(metric.value(), count)


def within(exact: float, value: float, max_drop: float) -> bool:
    """Whether a metric dropped by no more than `max_drop`; rounding of the last digits does not count."""
    return exact - value <= max_drop + DROP_ROUNDING


def open_evaluation(
    context: StageContext, model: onnx.ModelProto, scratch: Path, advance: Advance = lambda done, total: None
) -> Evaluation:
    """The evaluation that a recipe asks for; a metric relative to FP32 runs the FP32 graph here, once.

    Args:
        model: FP32 graph.
        scratch: a folder that is not there yet.

    Raises:
        DataError: there is no data, the labels are missing or their number is not that of the samples.
        UsageError: the metric cannot be imported, or labels come without a metric for outputs that are no scores.
    """
    settings = context.recipe.accuracy
    inputs = onnx_model.input_specs(model)
    reader = open_samples(context, inputs, context.samples)
    outputs = reference.load(context.folder("reference")).outputs
    labels = _labels(settings, context, inputs, _rows(reader, inputs)) if settings.labels else None
    files: set[str] = set()
    metric = _metric(settings, outputs, labels, files)
    stored = None
    if metric().relative:
        stored = StoredSamples.record(model, _told(reader, advance), scratch)
    return Evaluation(reader, metric, stored, files)


def _told(reader: SampleReader, advance: Advance) -> Iterator[Feed]:
    for done, feed in enumerate(reader, 1):
        yield feed
        advance(done, reader.total)


def _metric(
    settings: AccuracySection, outputs: Sequence[TensorSpec], labels: Array | None, files: set[str]
) -> Callable[[], Metric]:
    if settings.metric:
        name = settings.metric
        return lambda: UserMetric(name, labels, files)
    scores = outputs[0].name if len(outputs) == 1 and _is_scores(outputs[0]) else None
    if scores is not None and (labels is None or labels.ndim == 1):
        return lambda: TopOne(scores, labels)
    if labels is not None:
        listed = ", ".join(f"{spec.name} {'x'.join(map(str, spec.shape))}" for spec in outputs)
        raise UsageError(
            f"labels (of shape {labels.shape}) without a metric are class numbers of one output of shape (N, classes); "
            f"the model gives {listed}",
            "Give --metric package.module:function, called with predictions and labels.",
        )
    return MeanCosine


def _is_scores(spec: TensorSpec) -> bool:
    return spec.dtype.startswith("float") and len(spec.shape) == 2 and spec.shape[1] != 1


def _rows(reader: SampleReader, inputs: Sequence[TensorSpec]) -> list[int]:
    """The batch size of every sample, from one pass over the data.

    A pass of its own, since labels that do not fit are told before minutes of inference.
    """
    first = inputs[0].name
    return [feed[first].shape[0] if feed[first].ndim else 1 for feed in reader]


def _labels(
    settings: AccuracySection, context: StageContext, inputs: Sequence[TensorSpec], rows: Sequence[int]
) -> Array:
    """The labels of the evaluated rows, in their order."""
    name = settings.labels or ""
    labels = _read_labels(name, context.data)
    whole = open_samples(context, inputs, None)
    available = whole.total
    positions: Sequence[int] = range(len(rows))
    expected = sum(rows)
    if available is not None and available != len(rows):
        positions = spread(available, len(rows))
        if len(set(rows)) > 1:
            raise DataError(
                "labels of samples of unequal batch sizes cannot be told apart when only some samples are evaluated",
                "Leave accuracy.samples out, or give samples of one batch size.",
            )
        expected = available * rows[0]
    if whole.rest and len(labels) == expected + whole.rest:
        labels = labels[:expected]
    if len(labels) != expected and not (available is None and len(labels) > expected and len(rows) == context.samples):
        raise DataError(
            f"{name} holds {len(labels)} labels for {expected} evaluation samples",
            "Give one label for each row of the evaluation data, in the same order.",
        )
    size = rows[0]
    if len(positions) * size == len(labels) or len(set(rows)) > 1 or available is None:
        return labels[: sum(rows)]
    picked: Array = np.concatenate([labels[p * size : (p + 1) * size] for p in positions])
    return picked


def _read_labels(name: str, data: str | None) -> Array:
    hint = "Give an .npy file of numbers, or the name of an array in the .npz of --evaluation-data."
    where = f"labels '{name}'"
    try:
        if Path(name).is_file():
            labels: Array = np.asarray(npy.map_file(Path(name)))
        else:
            with npy.open_archive(Path(data or ""), where) as archive:
                found = npy.members(archive, where)
                with npy.open_member(archive, found[name], where) as stream:
                    labels = npy.read_whole(stream, found[name].file_size, None, where)
        if labels.ndim == 0:
            raise ValueError("it holds a single value")
    except DataError as error:
        raise DataError(f"labels '{name}' cannot be read: {error.message}", hint) from error
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"labels '{name}' cannot be read: {described(error)}", hint) from error
    return labels.reshape(-1) if labels.shape[1:] == (1,) else labels


def _function(name: str) -> Callable[[Any, Any], Any]:
    module_name, _, function = name.partition(":")
    try:
        found: Callable[[Any, Any], Any] = getattr(user_code.imported(module_name), function)
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"the metric {name} cannot be imported: {described(error)}",
            "It is looked for in the current folder, PYTHONPATH and what is installed.",
        ) from error
    if not callable(found):
        raise UsageError(f"the metric {name} is a {type(found).__name__}, not a function", "Name a function.")
    return found


def _stacked(name: str, parts: Sequence[Array]) -> Array:
    try:
        return np.concatenate([part if part.ndim else part[np.newaxis] for part in parts])
    except ValueError as error:
        shapes = sorted({part.shape[1:] for part in parts})[:3]
        raise UsageError(
            f"the predictions of output '{name}' cannot be stacked for the metric: they have the shapes {shapes}",
            "Give evaluation samples of one shape, or leave the metric out.",
        ) from error
