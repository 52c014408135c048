"""Run the FP32 graph over the calibration samples and choose a range for every quantizable activation."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from gpuopt import onnx_model
from gpuopt.artifact import StageOutcome
from gpuopt.calibration import data_checks, first_layers, ranges, reuse
from gpuopt.calibration.collectors import RangeCollector
from gpuopt.calibration.data_checks import DataChecks
from gpuopt.calibration.readers.images import ImageFolder
from gpuopt.calibration.reading import open_for_model
from gpuopt.calibration.run import calibrate
from gpuopt.errors import DataError, QuantizationError
from gpuopt.quantization import placement
from gpuopt.stages.context import StageContext
from gpuopt.storage import sha256_file


def run(context: StageContext) -> StageOutcome:
    """Make `ranges`. Memory holds one sample's activations and one histogram a tensor, whatever the number of samples.

    Raises:
        DataError: no samples, or samples that do not fit the model or hold NaN; what the data checks find, if the
            recipe is strict; a ranges file that is none or another model's.
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
    if settings.ranges is not None:
        return _reuse(context, Path(settings.ranges), model, tensors)
    if settings.random and settings.strict:
        data_checks.refuse(data_checks.of_random_data())
    reader = open_for_model(context, specs)
    total = settings.samples if reader.total is None else min(reader.total, settings.samples)
    count, started = 0, time.monotonic()
    stored = first_layers.load(context.folder("reference"))
    checks = DataChecks(list(first_layers.merged(stored, first_layers.of_graph(model))))

    def after_sample(done: int, feed: Mapping[str, Any], amax: Mapping[str, float]) -> None:
        nonlocal count
        count = done
        checks.sample(done - 1, feed)
        checks.activations(amax)
        if settings.strict and done == data_checks.EARLY_SAMPLES and not settings.random:
            data_checks.refuse(checks.early())
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
    findings = data_checks.of_random_data() if settings.random else checks.findings()
    if settings.strict:
        data_checks.refuse(findings)
    about = {"method": settings.method, "samples": count, "data": reader.description}
    ranges.save(context.made("ranges") / ranges.RANGES_FILE, found, about)
    warnings = []
    if isinstance(reader, ImageFolder) and settings.images is None:
        warnings.append("images are prepared as for ImageNet; the recipe's calibrate.images chooses otherwise")
    warnings += [finding.message for finding in findings]
    facts = {
        **about,
        "tensors": len(found),
        "random": settings.random,
        "samples_per_second": round(count / max(time.monotonic() - started, 1e-9), 1),
        "findings": [finding.to_json() for finding in findings],
    }
    return StageOutcome(facts, tuple(warnings))


def _reuse(context: StageContext, path: Path, model: onnx.ModelProto, wanted: Sequence[str]) -> StageOutcome:
    """Make `ranges` of a file; no data are read."""
    file = ranges.read(path)
    everything = {name for node in model.graph.node for name in (*node.input, *node.output)}
    fitting = reuse.match(file, wanted, everything)
    methods = ", ".join(dict.fromkeys(r.method for r in fitting.ranges.values()))
    about = {"method": methods, "data": file.origin}
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
