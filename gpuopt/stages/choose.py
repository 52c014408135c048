"""Which calibration method's ranges lose least at the model's outputs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from gpuopt import onnx_model
from gpuopt.artifact import ONNX_FILE, StageOutcome
from gpuopt.backends.onnxruntime import Session
from gpuopt.calibration import ranges
from gpuopt.calibration.held_out import MOST_SAMPLES
from gpuopt.calibration.readers.base import Feed
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
    samples = _samples(context)
    exact = ExactOutputs(Session(context.folder("onnx") / ONNX_FILE))
    methods = ranges.METHODS_TO_CHOOSE_FROM
    found: dict[str, Sqnr | None] = {}
    for number, method in enumerate(methods):
        context.progress.advance(number, len(methods))
        found[method] = _sqnr(context, method, exact, samples)
    chosen = best(found)
    shutil.copyfile(
        context.folder("ranges") / ranges.candidate_file(chosen), context.made("ranges") / ranges.RANGES_FILE
    )
    figures = {method: None if sqnr is None else round(sqnr.db, 2) for method, sqnr in found.items()}
    return StageOutcome({"method": chosen, "sqnr_db": figures, "samples": len(samples)})


def best(found: dict[str, Sqnr | None]) -> str:
    """The method with the highest SQNR; `minmax` unless another beats it by `LEAST_GAIN_DB` and not by chance."""
    safe = found["minmax"]
    if safe is None:
        return "minmax"
    better = {m: s for m, s in found.items() if s is not None and s.pays_over(safe, LEAST_GAIN_DB)}
    return max(better, key=lambda method: better[method].db, default="minmax")


def _samples(context: StageContext) -> list[Feed]:
    settings = context.recipe.calibrate
    fewer = settings.model_copy(update={"samples": min(settings.samples, MOST_SAMPLES)})
    recipe = context.recipe.model_copy(update={"calibrate": fewer})
    specs = onnx_model.input_specs(onnx_model.load(context.folder("onnx")))
    return list(open_for_model(replace(context, recipe=recipe), specs))


def _sqnr(context: StageContext, method: str, exact: ExactOutputs, samples: list[Feed]) -> Sqnr | None:
    settings = context.recipe.quantize
    known = ranges.load(context.folder("ranges") / ranges.candidate_file(method))
    fp16 = settings.format == "qdq" and context.recipe.cast.remainder == "fp16"
    variants = Variants(onnx_model.load(context.folder("onnx")), settings, known, fp16)
    if not variants.nodes:
        return None
    scratch: Path = context.output / "trial"
    session = Session(onnx_model.save(variants.in_int8(variants.nodes), scratch))
    shutil.rmtree(scratch)
    return measurement.sqnr(exact, session, samples)
