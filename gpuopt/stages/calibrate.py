"""Run the FP32 graph over the calibration samples and choose a range for every quantizable activation."""

from __future__ import annotations

import itertools
import time

import onnx

from gpuopt import onnx_model, placement
from gpuopt.artifact import StageOutcome
from gpuopt.backends.onnxruntime import Session
from gpuopt.calibration import ranges
from gpuopt.calibration.collectors import RangeCollector
from gpuopt.calibration.readers.images import ImageFolder
from gpuopt.calibration.reading import open_for_model
from gpuopt.errors import DataError, QuantizationError
from gpuopt.stages.context import StageContext

_FEW_SAMPLES = 32


def run(context: StageContext) -> StageOutcome:
    """Make `ranges`. Memory holds one sample's activations and one histogram a tensor, whatever the number of samples.

    Raises:
        DataError: no samples, or samples that do not fit the model or hold NaN.
        QuantizationError: the graph gives NaN on the data.
    """
    settings = context.recipe.calibrate
    model = onnx_model.load(context.folder("onnx"))
    specs = onnx_model.input_specs(model)
    if any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        raise QuantizationError(
            "the graph holds Q/DQ or dequantized weights already", "Use --precision fp16: it keeps them as they are."
        )
    known = onnx_model.float_tensors(model)
    with_outputs = context.recipe.quantize.format == "qoperator"
    tensors = [name for name in placement.candidate_tensors(model, with_outputs) if name in known]
    inputs = {spec.name for spec in specs}
    watched = [name for name in tensors if name not in inputs]
    session = _watching_session(model, watched, context)
    reader = open_for_model(context, specs)
    collector = RangeCollector(settings.method, settings.percentile)
    count, started = 0, time.monotonic()
    for feed in itertools.islice(reader, settings.samples):
        values = session.run(feed, watched)
        values.update({name: feed[name] for name in tensors if name in inputs})
        for name in tensors:
            try:
                collector.update(name, values[name])
            except DataError as error:
                raise QuantizationError(
                    f"the FP32 graph gives NaN or infinity in '{name}' on sample {count}",
                    "Check that the calibration data is scaled as in training.",
                ) from error
        count += 1
        context.progress.advance(
            count, settings.samples if reader.total is None else min(reader.total, settings.samples)
        )
    if count == 0:
        raise DataError(f"{reader.description}: no samples", "Give at least one; a few hundred are usual.")
    found = collector.ranges()
    ordered = {name: found[name] for name in tensors if name in found}
    about = {"method": settings.method, "samples": count, "data": reader.description}
    ranges.save(context.made("ranges") / ranges.RANGES_FILE, ordered, about)
    warnings = []
    if isinstance(reader, ImageFolder) and settings.images is None:
        warnings.append("images are prepared as for ImageNet; the recipe's calibrate.images chooses otherwise")
    if settings.random:
        warnings.append("INT8 ranges come from random data: a smoke test, not a release")
    elif count < _FEW_SAMPLES:
        warnings.append(f"only {count} calibration samples: ranges may be too narrow; a few hundred are usual")
    facts = {
        **about,
        "tensors": len(ordered),
        "random": settings.random,
        "samples_per_second": round(count / max(time.monotonic() - started, 1e-9), 1),
    }
    return StageOutcome(facts, tuple(warnings))


def _watching_session(model: onnx.ModelProto, watched: list[str], context: StageContext) -> Session:
    """A session on the graph with the watched activations as outputs."""
    types = {value.name: value for value in [*model.graph.value_info, *model.graph.output]}
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(types[name] for name in watched if name not in outputs)
    folder = context.output / "watched"
    return Session(onnx_model.save(model, folder), optimization="basic")
