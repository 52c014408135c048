"""Run the FP32 graph over the calibration samples and choose a range for every quantizable activation."""

from __future__ import annotations

import itertools
import time

from gpuopt import onnx_model
from gpuopt.artifact import StageOutcome
from gpuopt.calibration import ranges
from gpuopt.calibration.collectors import RangeCollector
from gpuopt.calibration.readers.images import ImageFolder
from gpuopt.calibration.reading import open_for_model
from gpuopt.calibration.run import calibrate
from gpuopt.errors import DataError
from gpuopt.quantization import existing, placement
from gpuopt.stages.context import StageContext

_FEW_SAMPLES = 32


def run(context: StageContext) -> StageOutcome:
    """Make `ranges`. Memory holds one sample's activations and one histogram a tensor, whatever the number of samples.

    A graph with Q/DQ of its own has its ranges: nothing is made and no data is asked for.

    Raises:
        DataError: no samples, or samples that do not fit the model or hold NaN.
        QuantizationError: the graph gives NaN on the data.
    """
    settings = context.recipe.calibrate
    model = onnx_model.load(context.folder("onnx"))
    specs = onnx_model.input_specs(model)
    if existing.holds_quantization(model):
        unused = ("the calibration data plays no part: the model holds Q/DQ of its own",) if context.data else ()
        return StageOutcome({"quantized_before": True}, unused)
    known = onnx_model.float_tensors(model)
    with_outputs = context.recipe.quantize.format == "qoperator"
    narrow = context.recipe.quantize.min_channels
    tensors = [name for name in placement.candidate_tensors(model, with_outputs, narrow) if name in known]
    reader = open_for_model(context, specs)
    total = settings.samples if reader.total is None else min(reader.total, settings.samples)
    count, started = 0, time.monotonic()

    def after_sample(done: int) -> None:
        nonlocal count
        count = done
        context.progress.advance(done, total)

    found = calibrate(
        model,
        tensors,
        itertools.islice(reader, settings.samples),
        RangeCollector(settings.method, settings.percentile),
        context.output / "watched",
        after_sample,
    )
    if count == 0:
        raise DataError(f"{reader.description}: no samples", "Give at least one; a few hundred are usual.")
    about = {"method": settings.method, "samples": count, "data": reader.description}
    ranges.save(context.made("ranges") / ranges.RANGES_FILE, found, about)
    warnings = []
    if isinstance(reader, ImageFolder) and settings.images is None:
        warnings.append("images are prepared as for ImageNet; the recipe's calibrate.images chooses otherwise")
    if settings.random:
        warnings.append("INT8 ranges come from random data: a smoke test, not a release")
    elif count < _FEW_SAMPLES:
        warnings.append(f"only {count} calibration samples: ranges may be too narrow; a few hundred are usual")
    facts = {
        **about,
        "tensors": len(found),
        "random": settings.random,
        "samples_per_second": round(count / max(time.monotonic() - started, 1e-9), 1),
    }
    return StageOutcome(facts, tuple(warnings))
