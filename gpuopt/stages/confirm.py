"""The metric of the graph as it ships: bias correction changes it after the accuracy budget was found to hold."""

from __future__ import annotations

import json

from gpuopt import onnx_model
from gpuopt.artifact import StageOutcome
from gpuopt.errors import AccuracyError
from gpuopt.quantization import evaluation
from gpuopt.stages.context import StageContext
from gpuopt.stages.measure import ACCURACY_FILE


def run(context: StageContext) -> StageOutcome:
    """Make nothing; say the metric.

    Raises:
        AccuracyError: the budget holds no longer.
        DataError, UsageError: of samples, labels and metric.
    """
    before = json.loads((context.folder("accuracy") / ACCURACY_FILE).read_text())
    exact = onnx_model.load(context.folder("float_onnx"))
    scratch = context.output / "scratch"
    evaluated = evaluation.open_evaluation(context, exact, scratch / "samples", context.progress.advance)
    shipped = onnx_model.load(context.folder("onnx"))
    value = evaluated.score(shipped, scratch / "graph", context.progress.advance).value
    if not evaluation.within(before["fp32"], value, before["max_drop"]):
        raise AccuracyError(
            f"the accuracy budget held until the biases were corrected: {before['metric']} is {before['fp32']:.6g} "
            f"in FP32 and {value:.6g} now, and a drop of {before['max_drop']:g} is allowed",
            "Use --bias-correction off.",
        )
    return StageOutcome({"metric": before["metric"], "value": value})
