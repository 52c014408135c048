"""The search for what falls back: it holds what it says, with few evaluations, and keeps INT8 where it can."""

from __future__ import annotations

import math
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from gpuopt.quantization.budget import Trial, search

COSTS = st.lists(st.floats(0, 100, allow_nan=False), min_size=1, max_size=60)


def additive(costs: dict[str, float], allowed: float) -> Callable[[tuple[str, ...]], Trial]:
    """A model whose drop is the sum of what its INT8 nodes cost."""

    def evaluate(fallen: tuple[str, ...]) -> Trial:
        assert len(set(fallen)) == len(fallen)
        assert set(fallen) < set(costs), "a node stays in INT8, and no node is unknown"
        drop = sum(cost for node, cost in costs.items() if node not in fallen)
        return Trial(fallen, 1 - drop, drop <= allowed)

    return evaluate


def ranking(costs: dict[str, float]) -> list[str]:
    return sorted(costs, key=lambda node: -costs[node])


@given(COSTS, st.floats(0, 300))
def test_without_work_to_win_the_smallest_number_is_found_with_few_evaluations(
    values: list[float], allowed: float
) -> None:
    costs = {f"n{index}": value for index, value in enumerate(values)}
    order, evaluate = ranking(costs), additive(costs, allowed)
    trials = search(order, evaluate, {}, costs)
    least = next((n for n in range(1, len(order)) if evaluate(tuple(order[:n])).held), None)
    held = [trial for trial in trials if trial.held]
    if least is None:
        assert not held
        # How near it can come is known: with one node in INT8.
        assert len(order) == 1 or len(trials[-1].fallen) == len(order) - 1
    else:
        assert held[-1].fallen == tuple(order[:least])
    assert len(trials) <= 2 * math.log2(len(order)) + 2


@given(COSTS, st.floats(0, 300), st.data())
def test_the_last_trial_that_holds_is_the_best_one(values: list[float], allowed: float, data: st.DataObject) -> None:
    costs = {f"n{index}": value for index, value in enumerate(values)}
    work = {node: data.draw(st.integers(0, 1000)) for node in costs}
    evaluate = additive(costs, allowed)
    trials = search(ranking(costs), evaluate, work, costs)
    held = [trial for trial in trials if trial.held]
    if held:
        final = held[-1]
        assert evaluate(final.fallen).held
        in_int8 = [sum(work[n] for n in costs if n not in trial.fallen) for trial in held]
        prefix = search(ranking(costs), evaluate, {}, costs)
        assert set(final.fallen) <= set(next(t for t in reversed(prefix) if t.held).fallen)
        assert in_int8[-1] >= max(w for w, t in zip(in_int8, held, strict=True) if set(final.fallen) <= set(t.fallen))


def test_a_node_with_much_work_and_little_cost_goes_back_into_int8() -> None:
    """Half of the bad pair is enough, and the ranking cannot know which half."""
    costs = {"large": 3.0, "small": 2.9, "harmless": 0.1}

    def evaluate(fallen: tuple[str, ...]) -> Trial:
        held = "small" in fallen
        return Trial(fallen, float(held), held)

    trials = search(ranking(costs), evaluate, {"large": 1000, "small": 1, "harmless": 10}, costs)
    assert trials[-1] == Trial(("small",), 1.0, True)
    assert [len(trial.fallen) for trial in trials] == [1, 2, 1]


def test_what_does_no_arithmetic_is_not_tried_back() -> None:
    costs = {"add": 3.0, "conv": 2.0, "last": 1.0}
    trials = search(ranking(costs), additive(costs, 1.0), {"conv": 10, "last": 10}, costs)
    assert [trial.fallen for trial in trials] == [("add",), ("add", "conv")]


def test_the_only_node_cannot_fall_back() -> None:
    assert search(["n"], additive({"n": 1.0}, 0.0), {}, {"n": 1.0}) == []
