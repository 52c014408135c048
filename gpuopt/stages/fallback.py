"""Which nodes fall back to FP16, in order of cost, so that the accuracy budget holds."""

from __future__ import annotations

import json
import math

from gpuopt import reference
from gpuopt.artifact import StageOutcome
from gpuopt.errors import AccuracyError
from gpuopt.quantization import budget, evaluation, macs, sensitivity, variants
from gpuopt.quantization.budget import Trial
from gpuopt.stages.context import StageContext
from gpuopt.stages.measure import ACCURACY_FILE
from gpuopt.storage import write_json

FALLBACK_FILE = "fallback.json"


def run(context: StageContext) -> StageOutcome:
    """Make `fallback`, the nodes that stay out of INT8; nothing where the budget holds without.

    Raises:
        AccuracyError: the budget holds for no set of nodes that leaves one in INT8.
        DataError, UsageError: of samples, labels and metric.
    """
    before = json.loads((context.folder("accuracy") / ACCURACY_FILE).read_text())
    if before["held"]:
        return StageOutcome({**before, "final": before["int8"], "fell_back": [], "steps": []})
    subject = variants.of_context(context)
    found = sensitivity.load(context.folder("sensitivity") / sensitivity.SENSITIVITY_FILE)
    scratch = context.output / "scratch"
    evaluated = evaluation.open_evaluation(context, subject.model, scratch / "samples", context.progress.advance)
    work = macs.of_reference(subject.model, reference.load(context.folder("reference")), scratch / "shapes")

    def evaluate(fallen: tuple[str, ...]) -> Trial:
        graph = subject.in_int8(set(subject.nodes) - set(fallen))
        value = evaluated.score(graph, scratch / "trial", context.progress.advance).value
        held = evaluation.within(before["fp32"], value, before["max_drop"])
        verdict = "holds" if held else "does not hold"
        context.progress.line(
            f"fallback: {len(fallen)} of {len(subject.nodes)} in FP16: {before['metric']} {value:.6g}, {verdict}"
        )
        return Trial(fallen, value, held)

    ranking = [layer.node for layer in found.layers]
    # A residual does not stay alone behind its convolution, and the search is to leave something in INT8.
    while len(ranking) > 1 and not subject.left_without(ranking[:-1]):
        ranking.pop()
    trials = budget.search(
        ranking,
        evaluate,
        work,
        {layer.node: math.inf if layer.cost is None else layer.cost for layer in found.layers},
    )
    final = next((trial for trial in reversed(trials) if trial.held), None)
    if final is None:
        raise _out_of_reach(before, trials, len(subject.nodes))
    write_json(context.made("fallback") / FALLBACK_FILE, list(final.fallen))
    facts = {
        **before,
        "final": final.value,
        "fell_back": list(final.fallen),
        "steps": [{"in_fp16": list(t.fallen), "metric": t.value, "held": t.held} for t in trials],
        "int8_macs_share_before": macs.share(work, subject.nodes),
        "int8_macs_share": macs.share(work, set(subject.nodes) - set(final.fallen)),
    }
    return StageOutcome(facts)


def load(context: StageContext) -> tuple[str, ...]:
    """The nodes that fell back; none where there is no budget, or it held."""
    if "fallback" not in context.artifacts:
        return ()
    return tuple(json.loads((context.folder("fallback") / FALLBACK_FILE).read_text()))


def _out_of_reach(before: dict[str, float], trials: list[Trial], nodes: int) -> AccuracyError:
    nearest = max([Trial((), before["int8"], False), *trials], key=lambda trial: trial.value)
    missing = before["fp32"] - nearest.value - before["max_drop"]
    return AccuracyError(
        f"the accuracy budget cannot be held: {before['metric']} is {before['fp32']:.6g} in FP32, "
        f"{before['int8']:.6g} in INT8 and at best {nearest.value:.6g}, with {len(nearest.fallen)} of {nodes} nodes "
        f"in FP16: {missing:.3g} too low for a drop of {before['max_drop']:g}",
        "Allow a larger --max-accuracy-drop, calibrate with more data or another --calibration-method,\n"
        "or use --precision fp16.",
    )
