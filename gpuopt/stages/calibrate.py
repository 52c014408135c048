"""Run the FP32 graph over the calibration samples and choose a range for every quantizable activation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from gpuopt import graph_layout, onnx_model
from gpuopt.artifact import StageOutcome
from gpuopt.backends.onnxruntime import execution_providers
from gpuopt.calibration import data_checks, first_layers, ranges, reuse
from gpuopt.calibration.collectors import RangeCollector, TensorRange
from gpuopt.calibration.data_checks import DataChecks, Finding
from gpuopt.calibration.memory import MIB
from gpuopt.calibration.readers.images import ImageFolder
from gpuopt.calibration.reading import open_for_model
from gpuopt.calibration.run import Calibration, Estimate, RunOptions, Seen, calibrate
from gpuopt.deployed_form import form_of_input
from gpuopt.errors import DataError, RequirementError
from gpuopt.quantization import equalization, existing, placement
from gpuopt.reference import Array, Feed
from gpuopt.stages.context import StageContext
from gpuopt.storage import sha256_file

_SECONDS_WORTH_TELLING = 2.0


def run(context: StageContext) -> StageOutcome:
    """Make `ranges`: from the recipe's ranges file, else from one pass over the data.

    Memory holds one sample's activations and one histogram a tensor, whatever the number of samples.

    A graph with Q/DQ of its own has its ranges: nothing is made and no data is asked for.

    Raises:
        DataError: no samples, or samples that do not fit the model or hold NaN; what the data checks find, if the
            recipe is strict; a ranges file that is none or another model's.
        QuantizationError: the graph gives NaN on the data.
        RequirementError: it cannot be done within `max_memory`, or on the provider that was asked for.
    """
    settings = context.recipe.calibrate
    model = onnx_model.load(context.folder("onnx"))
    if existing.holds_quantization(model):
        unused = ("the calibration data plays no part: the model holds Q/DQ of its own",) if context.data else ()
        return StageOutcome({"quantized_before": True}, unused)
    known = onnx_model.float_tensors(model)
    with_outputs = context.recipe.quantize.format == "qoperator"
    narrow = context.recipe.quantize.min_channels
    tensors = [name for name in placement.candidate_tensors(model, with_outputs, narrow) if name in known]
    if settings.ranges is not None:
        return _reuse(context, Path(settings.ranges), model, tensors)
    return _measure(context, model, tensors)


def _measure(context: StageContext, model: onnx.ModelProto, tensors: Sequence[str]) -> StageOutcome:
    settings = context.recipe.calibrate
    if settings.random and settings.strict:
        data_checks.refuse(data_checks.of_random_data())
    reader = open_for_model(context, onnx_model.input_specs(model))
    planned = reader.total or settings.samples
    stored = first_layers.load(context.folder("reference"))
    listener = _Listener(context, planned, DataChecks(list(first_layers.merged(stored, first_layers.of_graph(model)))))
    providers = execution_providers(settings.provider)
    options = RunOptions(planned, settings.max_memory, providers, listener.seen, listener.estimated)
    undecided = settings.method == "auto"
    method = "entropy" if undecided else settings.method
    collector = RangeCollector(method, settings.percentile, values_per_slice=settings.values)
    found = calibrate(model, tensors, reader, collector, context.output / "watched", options)
    if settings.provider == "cuda" and found.provider != "CUDAExecutionProvider":
        raise RequirementError(
            "ONNX Runtime could not start its CUDA execution provider",
            "Check the driver and the CUDA libraries with --debug, or take --set calibrate.provider=cpu.",
        )
    if found.samples == 0:
        raise DataError(f"{reader.description}: no samples", "Give at least one; a few hundred are usual.")
    findings = listener.findings()
    about = {
        "method": settings.method,
        "samples": found.samples,
        "data": reader.description,
        "equalized": equalization.mark_of(model),
    }
    folder = context.made("ranges")
    # Whatever bytes the data have: these are INT8 already, and with the scale 1 nothing is lost.
    exact = {name: TensorRange(-127.0, 127.0, "bytes") for name in graph_layout.exact_int8_tensors(model)}
    exact = {name: known for name, known in exact.items() if name in found.ranges}
    if undecided:
        for candidate in ranges.METHODS_TO_CHOOSE_FROM:
            found_by = collector.ranges(candidate)
            ordered = {name: exact.get(name, found_by[name]) for name in found.ranges}
            ranges.save(folder / ranges.candidate_file(candidate), ordered, {**about, "method": candidate})
    else:
        ranges.save(folder / ranges.RANGES_FILE, {**found.ranges, **exact}, about)
    warnings = []
    if isinstance(reader, ImageFolder) and settings.images is None and not reader.gives_bytes:
        warnings.append("images are prepared as for ImageNet; the recipe's calibrate.images chooses otherwise")
    if providers[0] != found.provider:
        warnings.append(f"{providers[0]} did not start: calibrated on {found.provider}")
    if settings.max_memory is not None and found.peak_bytes > settings.max_memory:
        warnings.append(
            f"calibration took {found.peak_bytes / MIB:.1f} MiB, which is above the limit of "
            f"{settings.max_memory / MIB:.1f} MiB"
        )
    warnings += [finding.message for finding in findings]
    facts = {
        **about,
        "random": settings.random,
        **listener.facts(found),
        "findings": [finding.to_json() for finding in findings],
    }
    return StageOutcome(facts, tuple(warnings))


class _Listener:
    """Watches a run: progress and data checks while it goes on, findings and figures at the end."""

    def __init__(self, context: StageContext, planned: int, checks: DataChecks) -> None:
        self._progress = context.progress
        self._settings = context.recipe.calibrate
        self._layout = context.recipe.layout
        self._planned = planned
        self._checks = checks
        self._checked = 0
        self._estimate: Estimate | None = None

    def seen(self, sample: Seen) -> None:
        # A pass that is begun again, or a further one, brings the same samples.
        if sample.number > self._checked:
            self._checked = sample.number
            # What is checked is what the original model would see.
            self._checks.sample(sample.number - 1, self._original(sample.feed))
            self._checks.activations(sample.magnitudes)
            if self._settings.strict and not self._settings.random and sample.number == data_checks.EARLY_SAMPLES:
                data_checks.refuse(self._checks.early())
        done = (sample.this_pass - 1) * self._planned + sample.number
        self._progress.advance(done, sample.passes * self._planned)

    def _original(self, feed: Feed) -> dict[str, Array]:
        return {name: form_of_input(self._layout, name).original(value) for name, value in feed.items()}

    def estimated(self, estimate: Estimate) -> None:
        self._estimate = estimate
        if estimate.seconds is not None and estimate.seconds > _SECONDS_WORTH_TELLING:
            self._progress.line(
                f"calibrate: up to {self._planned} samples, about {estimate.seconds:.0f} s "
                f"and {estimate.peak_bytes / MIB:.0f} MiB"
            )

    def findings(self) -> tuple[Finding, ...]:
        """What the data checks found.

        Raises:
            DataError: anything, and the recipe is strict.
        """
        found = data_checks.of_random_data() if self._settings.random else self._checks.findings()
        if self._settings.strict:
            data_checks.refuse(found)
        return found

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


def _reuse(context: StageContext, path: Path, model: onnx.ModelProto, wanted: Sequence[str]) -> StageOutcome:
    """Make `ranges` of a file; no data are read."""
    file = ranges.read(path)
    if file.equalized != equalization.mark_of(model):
        made_for = f"a graph equalised by '{file.equalized}'" if file.equalized else "a graph that is not equalised"
        raise DataError(
            f"{file.origin} is for {made_for}, and this one is {equalization.mark_of(model) or 'not'}",
            "Ranges can be used again for the same graph: make them and use them with --equalize off.",
        )
    everything = {name for node in model.graph.node for name in (*node.input, *node.output)}
    fitting = reuse.match(file, wanted, everything)
    methods = ", ".join(dict.fromkeys(r.method for r in fitting.ranges.values()))
    about = {"method": methods, "data": file.origin, "equalized": file.equalized}
    ranges.save(context.made("ranges") / ranges.RANGES_FILE, fitting.ranges, about)
    facts = {
        **about,
        "tensors": len(fitting.ranges),
        "random": False,
        "ranges_file": {
            "name": path.name,
            "sha256": sha256_file(path),
            "without_range": list(fitting.missing),
            "not_in_graph": list(fitting.unknown),
        },
    }
    return StageOutcome(facts, fitting.warnings)
