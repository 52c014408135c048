"""Which nodes cost accuracy in INT8: every one quantized alone, and the model as a whole."""

from __future__ import annotations

from dataclasses import asdict

from gpuopt import onnx_model, reference
from gpuopt.artifact import StageOutcome
from gpuopt.quantization import macs, sensitivity, variants
from gpuopt.quantization.samples import open_samples
from gpuopt.stages.context import StageContext
from gpuopt.storage import write_json

_TOLD = ("rank", "position", "node", "op_type", "own_sqnr_db", "output_sqnr_db", "accumulated_sqnr_db", "macs_share")


def run(context: StageContext) -> StageOutcome:
    """Make `sensitivity`, or nothing where the accuracy budget is `held` with everything in INT8.

    What is finished stands in the journal, so that a run that was stopped goes on where it was.

    Raises:
        DataError: of the samples.
        QuantizationError, BuildError: a node cannot be quantized or run alone.
    """
    if "held" in context.artifacts:
        return StageOutcome({"skipped": "the accuracy budget holds with everything in INT8"})
    subject = variants.of_context(context)
    reader = open_samples(context, onnx_model.input_specs(subject.model), context.samples)
    stored = reference.load(context.folder("reference"))
    work = macs.of_reference(subject.model, stored, context.output / "shapes")
    journal = sensitivity.Journal(context.journal)
    resumed = len(journal.figures)
    measured = sensitivity.measure(
        subject, reader, context.output / "scratch", journal, lambda done, total: context.progress.advance(done, total)
    )
    found = sensitivity.Sensitivity(
        samples=measured.samples,
        data=reader.description,
        whole=measured.whole,
        int8_macs_share=macs.share(work, subject.nodes),
        layers=sensitivity.ranked(subject, measured, work),
    )
    write_json(context.made("sensitivity") / sensitivity.SENSITIVITY_FILE, found.to_json())
    facts = {
        "samples": measured.samples,
        "data": reader.description,
        "nodes": len(subject.nodes),
        "resumed_nodes": resumed,
        "costliest": [layer.node for layer in found.layers[:3]],
        "whole_output_sqnr_db": measured.whole.output_sqnr_db,
        "layers": [{key: value for key, value in asdict(layer).items() if key in _TOLD} for layer in found.layers],
    }
    return StageOutcome(facts)
