"""What INT8 costs in the metric: the FP32 graph and the graph with everything in INT8, over the evaluation data."""

from __future__ import annotations

from gpuopt import user_code
from gpuopt.artifact import StageOutcome
from gpuopt.quantization import evaluation, variants
from gpuopt.stages.context import StageContext
from gpuopt.storage import write_json

ACCURACY_FILE = "accuracy.json"


def run(context: StageContext) -> StageOutcome:
    """Make `accuracy`, and `held` where the drop is within the budget.

    Raises:
        DataError: of the samples or labels.
        UsageError: the metric fails or gives NaN.
        QuantizationError: nothing can be quantized.
    """
    settings = context.recipe.accuracy
    allowed = settings.max_drop or 0.0
    subject = variants.of_context(context)
    scratch = context.output / "scratch"
    evaluated = evaluation.open_evaluation(context, subject.model, scratch / "samples", context.progress.advance)
    int8 = evaluated.score(subject.in_int8(subject.nodes), scratch / "int8", context.progress.advance)
    exact = 1.0
    if not evaluated.metric().relative:
        exact = evaluated.score(subject.model, scratch / "fp32", context.progress.advance).value
    held = evaluation.within(exact, int8.value, allowed)
    facts = {
        "metric": evaluated.name,
        "samples": int8.samples,
        "data": evaluated.samples.description,
        "max_drop": allowed,
        "fp32": exact,
        "int8": int8.value,
        "held": held,
    }
    write_json(context.made("accuracy") / ACCURACY_FILE, facts)
    if held:
        write_json(context.made("held") / "held.json", True)
    warnings = []
    if settings.data is None:
        warnings.append("the accuracy budget is measured on the calibration data: --evaluation-data gives it other")
    if not settings.metric and evaluated.counts_rows and 0 < allowed * int8.samples < 1:
        warnings.append(f"{int8.samples} evaluation samples cannot show a drop of {allowed:.3%}: one of them is more")
    read = user_code.dependencies(evaluated.files) if settings.metric else None
    return StageOutcome(facts, tuple(warnings), read)
