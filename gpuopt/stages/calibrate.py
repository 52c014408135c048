"""Run the FP32 graph over the calibration samples and choose a range for every quantizable activation."""

from __future__ import annotations

from gpuopt import onnx_model
from gpuopt.artifact import StageOutcome
from gpuopt.backends.onnxruntime import execution_providers
from gpuopt.calibration import ranges
from gpuopt.calibration.collectors import RangeCollector
from gpuopt.calibration.memory import MIB
from gpuopt.calibration.readers.images import ImageFolder
from gpuopt.calibration.reading import open_for_model
from gpuopt.calibration.run import Calibration, Estimate, RunOptions, Seen, calibrate
from gpuopt.errors import DataError, QuantizationError, RequirementError
from gpuopt.quantization import placement
from gpuopt.recipe import CalibrateSection
from gpuopt.stages.context import StageContext

_FEW_SAMPLES = 32
_FEWEST_VALUES = 1 << 14
"""Of a tensor and sample in a histogram, however many samples there are."""
_SECONDS_WORTH_TELLING = 2.0


def run(context: StageContext) -> StageOutcome:
    """Make `ranges`. Memory holds one sample's activations and one histogram a tensor, whatever the number of samples.

    Raises:
        DataError: no samples, or samples that do not fit the model or hold NaN.
        QuantizationError: the graph gives NaN on the data.
        RequirementError: it cannot be done within `max_memory`, or on the provider that was asked for.
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
    reader = open_for_model(context, specs)
    planned = reader.total or settings.samples
    talk = _Talk(context, planned)
    options = RunOptions(
        planned, settings.max_memory, execution_providers(settings.provider), talk.seen, talk.estimated
    )
    collector = RangeCollector(
        settings.method, settings.percentile, values_per_slice=values_per_slice(settings, planned)
    )
    found = calibrate(model, tensors, reader, collector, context.output / "watched", options)
    if settings.provider == "cuda" and found.provider != "CUDAExecutionProvider":
        raise RequirementError(
            "ONNX Runtime could not start its CUDA execution provider",
            "Check the driver and the CUDA libraries with --debug, or take --set calibrate.provider=cpu.",
        )
    if found.samples == 0:
        raise DataError(f"{reader.description}: no samples", "Give at least one; a few hundred are usual.")
    about = {"method": settings.method, "samples": found.samples, "data": reader.description}
    ranges.save(context.made("ranges") / ranges.RANGES_FILE, found.ranges, about)
    warnings = []
    if isinstance(reader, ImageFolder) and settings.images is None:
        warnings.append("images are prepared as for ImageNet; the recipe's calibrate.images chooses otherwise")
    if settings.random:
        warnings.append("INT8 ranges come from random data: a smoke test, not a release")
    elif found.samples < _FEW_SAMPLES:
        warnings.append(f"only {found.samples} calibration samples: ranges may be too narrow; a few hundred are usual")
    if options.providers[0] != found.provider:
        warnings.append(f"{options.providers[0]} did not start: calibrated on {found.provider}")
    facts = {**about, "random": settings.random, **talk.facts(found)}
    return StageOutcome(facts, tuple(warnings))


def values_per_slice(settings: CalibrateSection, samples: int) -> int:
    """Values of a tensor that each of so many samples adds to its histogram; 0: all of them."""
    return settings.values and max(_FEWEST_VALUES, -(-settings.values // samples))


class _Talk:
    """Progress while it runs, figures at the end."""

    def __init__(self, context: StageContext, planned: int) -> None:
        self._progress = context.progress
        self._planned = planned
        self._estimate: Estimate | None = None

    def seen(self, sample: Seen) -> None:
        done = (sample.this_pass - 1) * self._planned + sample.number
        self._progress.advance(done, sample.passes * self._planned)

    def estimated(self, estimate: Estimate) -> None:
        self._estimate = estimate
        if estimate.seconds is not None and estimate.seconds > _SECONDS_WORTH_TELLING:
            self._progress.line(
                f"calibrate: up to {self._planned} samples, about {estimate.seconds:.0f} s "
                f"and {estimate.peak_bytes / MIB:.0f} MiB"
            )

    def facts(self, found: Calibration) -> dict[str, object]:
        estimate = self._estimate
        return {
            "tensors": len(found.ranges),
            "provider": found.provider,
            "passes": found.passes,
            "samples_per_second": round(found.samples * found.passes / max(found.seconds, 1e-9), 1),
            "peak_mib": round(found.peak_bytes / MIB, 1),
            "estimated_peak_mib": round(estimate.peak_bytes / MIB, 1) if estimate else None,
            "estimated_seconds": round(estimate.seconds, 1) if estimate and estimate.seconds else None,
        }
