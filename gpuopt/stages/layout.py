"""The deployed form of inputs and outputs: channels last, bytes; in the graph and in the reference."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

import numpy as np
import onnx

from gpuopt import deployed_form, graph_layout, onnx_model, reference
from gpuopt.artifact import ONNX_FILE, StageOutcome
from gpuopt.backends.onnxruntime import Session
from gpuopt.calibration import first_layers
from gpuopt.comparison import SAME, first_difference
from gpuopt.deployed_form import TensorForm
from gpuopt.errors import ExportError, described
from gpuopt.interface import facts_of
from gpuopt.reference import Reference
from gpuopt.stages.context import StageContext


def run(context: StageContext) -> StageOutcome:
    """Make `onnx` and `reference` in the form in which the model is deployed.

    Raises:
        UsageError: a tensor that is named has no layout, or bytes are asked for where the model takes none.
        ExportError: the graph in the deployed form computes something else.
    """
    layout = context.recipe.layout
    stored = reference.load(context.folder("reference"))
    inputs = deployed_form.input_forms(layout, stored.inputs)
    outputs = deployed_form.output_forms(layout, stored.outputs)
    model = onnx_model.load(context.folder("onnx"))
    before = Session(context.folder("onnx") / ONNX_FILE, optimization="none")
    own = graph_layout.transposes(model)
    normalized = graph_layout.set_form(model, inputs, outputs, context.recipe.precision == "int8")
    inserted = graph_layout.transposes(model) - own
    scratch = context.output / "moved"
    reason = ""
    if inserted:
        model, reason = graph_layout.without_needless_transposes(model, scratch)
    counts = graph_layout.Transposes(own, inserted, graph_layout.transposes(model), reason)
    shutil.rmtree(scratch, ignore_errors=True)
    path = onnx_model.save(onnx_model.with_types(model), context.made("onnx"))
    try:
        onnx_model.check(path)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"the graph in the deployed form is not valid: {described(error)}",
            "This is a defect of gpuopt; leave out --input-layout and --output-layout.",
        ) from error
    deployed = reference.restated(
        context.made("reference"),
        stored,
        reference.Restatement(
            inputs=tuple(inputs[spec.name].spec(spec) for spec in stored.inputs),
            outputs=tuple(outputs[spec.name].spec(spec) for spec in stored.outputs),
            profiles=deployed_form.profiles(inputs, stored.profiles),
            input_value=lambda name, value: inputs[name].deployed(value),
            output_value=lambda name, value: outputs[name].deployed(value),
        ),
    )
    first = stored.folder / first_layers.FILE
    if first.is_file():
        shutil.copyfile(first, deployed.folder / first_layers.FILE)
    session = Session(path, optimization="none")
    if found := first_difference(session, deployed, SAME):
        raise ExportError(
            f"the graph in the deployed form does not compute what the model does: {found}",
            "Check mean, std and scale: values far from the training data are rounded away.",
        )
    facts = {
        **facts_of(deployed),
        "transposes": counts.to_json(),
        "normalization": {name: one.to_json() for name, one in normalized.items()},
        "largest_difference": _largest_difference(before, session, (stored, deployed), outputs),
    }
    return StageOutcome(facts)


def _largest_difference(
    before: Session, after: Session, stored: tuple[Reference, Reference], outputs: Mapping[str, TensorForm]
) -> float:
    """Between the graphs of both forms, node by node, relative to the output's largest value; 0: bit for bit equal.

    Args:
        stored: the reference in the original's form and in the deployed one.
    """
    worst = 0.0
    original, deployed = stored
    for one, other in zip(original.corners, deployed.corners, strict=True):
        found = after.run(deployed.feed(other))
        for name, value in before.run(original.feed(one)).items():
            expected = outputs[name].deployed(value)
            if not np.array_equal(expected, found[name], equal_nan=value.dtype.kind == "f"):
                wanted, got = expected.astype(np.float64), found[name].astype(np.float64)
                scale = float(np.max(np.abs(wanted), initial=0.0)) or 1.0
                worst = max(worst, float(np.max(np.abs(wanted - got), initial=0.0)) / scale)
    return worst
