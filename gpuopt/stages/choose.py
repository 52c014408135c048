"""Which calibration method's ranges lose least at the model's outputs."""

from __future__ import annotations

import shutil
from dataclasses import replace

import onnx

from gpuopt import onnx_model
from gpuopt.artifact import ONNX_FILE, StageOutcome
from gpuopt.backends.onnxruntime import Session
from gpuopt.calibration import ranges
from gpuopt.calibration.held_out import MOST_SAMPLES
from gpuopt.calibration.readers.base import SampleReader
from gpuopt.calibration.reading import open_for_model
from gpuopt.quantization import measurement
from gpuopt.quantization.measurement import ExactOutputs, Sqnr
from gpuopt.quantization.variants import Variants
from gpuopt.stages.context import StageContext

LEAST_GAIN_DB = 1.0
"""SQNR that a method has to be better by than `minmax`, which clips none of the calibration data.

Methods that clip look better on the samples that chose their ranges than on others.
"""


def run(context: StageContext) -> StageOutcome:
    """Make `ranges` of those that the calibration left to choose from; nothing where it left no choice.

    Each method's graph runs in ONNX Runtime on some of the calibration samples; the SQNR of its outputs decides.

    Raises:
        DataError: of the samples.
        QuantizationError: the quantizer fails.
    """
    if "ranges" not in context.artifacts or (context.folder("ranges") / ranges.RANGES_FILE).exists():
        return StageOutcome()
    model = onnx_model.load(context.folder("onnx"))
    samples = _samples(context, model)
    exact = ExactOutputs(Session(context.folder("onnx") / ONNX_FILE))
    methods = ranges.METHODS_TO_CHOOSE_FROM
    found: dict[str, Sqnr | None] = {}
    for number, method in enumerate(methods):
        context.progress.advance(number, len(methods))
        found[method] = _sqnr(context, model, method, exact, samples)
    chosen = best(found)
    shutil.copyfile(
        context.folder("ranges") / ranges.candidate_file(chosen), context.made("ranges") / ranges.RANGES_FILE
    )
    figures = {method: None if sqnr is None else round(sqnr.db, 2) for method, sqnr in found.items()}
    return StageOutcome({"method": chosen, "sqnr_db": figures, "samples": _count(found)})


def best(found: dict[str, Sqnr | None]) -> str:
    """The method with the highest SQNR; `minmax` unless another beats it by `LEAST_GAIN_DB` and not by chance."""
    safe = found["minmax"]
    if safe is None:
        return "minmax"
    better = {m: s for m, s in found.items() if s is not None and s.pays_over(safe, LEAST_GAIN_DB)}
    return max(better, key=lambda method: better[method].db, default="minmax")


def _samples(context: StageContext, model: onnx.ModelProto) -> SampleReader:
    settings = context.recipe.calibrate
    fewer = settings.model_copy(update={"samples": min(settings.samples, MOST_SAMPLES)})
    recipe = context.recipe.model_copy(update={"calibrate": fewer})
    return open_for_model(replace(context, recipe=recipe), onnx_model.input_specs(model))


def _sqnr(
    context: StageContext, model: onnx.ModelProto, method: str, exact: ExactOutputs, samples: SampleReader
) -> Sqnr | None:
    known = ranges.load(context.folder("ranges") / ranges.candidate_file(method))
    variants = Variants(model, context.recipe.quantize, known, context.recipe.has_fp16_scales)
    if not variants.nodes:
        return None
    scratch = context.output / "trial"
    session = Session(onnx_model.save(variants.in_int8(variants.nodes), scratch))
    shutil.rmtree(scratch)
    return measurement.sqnr(exact, session, samples)


def _count(found: dict[str, Sqnr | None]) -> int:
    """How many samples decided."""
    return max((len(sqnr.by_sample) for sqnr in found.values() if sqnr is not None), default=0)
