"""Which nodes fall back to FP16 so that a metric stays within a budget, found with few evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_MOST_RETURNS = 12
"""How many nodes are tried back in INT8, one evaluation each."""


@dataclass(frozen=True)
class Trial:
    """One evaluation of the whole model.

    Attributes:
        fallen: nodes in FP16, in the order in which they fell back.
        value: the metric.
        held: whether it is within the budget.
    """

    fallen: tuple[str, ...]
    value: float
    held: bool


def search(
    ranking: Sequence[str],
    evaluate: Callable[[tuple[str, ...]], Trial],
    work: Mapping[str, int],
    cost: Mapping[str, float],
) -> list[Trial]:
    """Let nodes fall back, costliest first, until the budget holds; then return to INT8 what it can spare.

    The number of nodes doubles until the budget holds, and is bisected from there: for a metric that does not fall
    when more nodes leave INT8 it is the smallest that holds, after at most 2 log2(n) + 2 evaluations. Then nodes with
    much work for their cost go back into INT8 one at a time, each kept there if the budget still holds. The last of
    the ranking stays in INT8 in any case: without any node there is nothing to search.

    Args:
        ranking: the nodes in INT8 that may fall and the one that may not, costliest first; with all of them in INT8
            the budget does not hold.
        evaluate: measures the model with these nodes in FP16.
        work: multiply-accumulates of every node.
        cost: error power over signal power that each brings alone.

    Returns:
        Every trial in order. The last that holds is the result; none holds: the budget cannot be held.
    """
    trials: list[Trial] = []

    def tried(fallen: Sequence[str]) -> Trial:
        trials.append(evaluate(tuple(fallen)))
        return trials[-1]

    most = len(ranking) - 1
    failing, count = 0, min(1, most)
    while count > failing and not tried(ranking[:count]).held:
        failing, count = count, min(2 * count, most)
    if not trials or not trials[-1].held:
        return trials
    best = trials[-1]
    while count - failing > 1:
        middle = (failing + count) // 2
        trial = tried(ranking[:middle])
        if trial.held:
            best, count = trial, middle
        else:
            failing = middle
    if count > 1:
        _give_back(best, tried, work, cost)
    return trials


def _give_back(
    best: Trial, tried: Callable[[Sequence[str]], Trial], work: Mapping[str, int], cost: Mapping[str, float]
) -> None:
    # The last to fall was found to be needed, by the evaluation without it.
    worth = {node: work.get(node, 0) / max(cost.get(node, 0.0), 1e-30) for node in best.fallen[:-1]}
    for node in sorted(worth, key=lambda n: -worth[n])[:_MOST_RETURNS]:
        if worth[node] <= 0:
            break
        trial = tried([n for n in best.fallen if n != node])
        if trial.held:
            best = trial
