"""One pass of samples through the FP32 graph: a range for every watched activation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from gpuopt import onnx_model
from gpuopt.backends.onnxruntime import Session
from gpuopt.calibration.collectors import RangeCollector, TensorRange
from gpuopt.errors import DataError, QuantizationError

AfterSample = Callable[[int, Mapping[str, Any], Mapping[str, float]], None]


def calibrate(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    samples: Iterable[Mapping[str, Any]],
    collector: RangeCollector,
    scratch: Path,
    after_sample: AfterSample = lambda count, feed, amax: None,
) -> dict[str, TensorRange]:
    """Choose a range for every tensor. Memory holds one sample's activations and the collector's histograms.

    Args:
        model: FP32 graph with the types of its tensors; left as it is.
        tensors: float32 activations, graph inputs among them; the result keeps their order.
        samples: feeds by input name.
        collector: empty; it decides the method.
        scratch: a folder that is not there yet, for the watched graph.
        after_sample: told the number of samples so far, the feed, and the largest magnitude of every tensor on it.

    Raises:
        QuantizationError: the graph gives NaN or infinity on a sample.
        DataError: of the reader.
    """
    inputs = {spec.name for spec in onnx_model.input_specs(model)}
    watched = [name for name in tensors if name not in inputs]
    session = _watching_session(model, watched, scratch)
    for count, feed in enumerate(samples):
        values = session.run(feed, watched)
        values.update({name: feed[name] for name in tensors if name in inputs})
        amax = {}
        for name in tensors:
            try:
                amax[name] = collector.update(name, values[name])
            except DataError as error:
                raise QuantizationError(
                    f"the FP32 graph gives NaN or infinity in '{name}' on sample {count}",
                    "Check that the calibration data is scaled as in training.",
                ) from error
        after_sample(count + 1, feed, amax)
    found = collector.ranges()
    return {name: found[name] for name in tensors if name in found}


def _watching_session(model: onnx.ModelProto, watched: Sequence[str], scratch: Path) -> Session:
    """A session on the graph with the watched activations as outputs."""
    watching = onnx.ModelProto()
    watching.CopyFrom(model)
    types = {value.name: value for value in [*model.graph.value_info, *model.graph.output]}
    outputs = {value.name for value in model.graph.output}
    watching.graph.output.extend(types[name] for name in watched if name not in outputs)
    return Session(onnx_model.save(watching, scratch), optimization="basic")
