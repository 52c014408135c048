"""Halving: what is left fails, and does not without any one of its elements."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuopt.reduction.halving import Part, reduce


def never() -> bool:
    return False


@pytest.mark.parametrize("guilty", [{0}, {99}, {41}, {3, 90}, {0, 49, 50, 99}, set(range(100))])
def test_what_is_left_are_the_guilty(guilty: set[int]) -> None:
    found = reduce(100, lambda part: guilty <= set(part), never)
    assert set(found.kept) == guilty
    assert found.finished


def test_one_guilty_of_a_thousand_takes_few_tries() -> None:
    assert reduce(1000, lambda part: 617 in part, never).tries <= 24


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 39), min_size=1), st.sets(st.integers(0, 39), min_size=1))
def test_no_element_can_be_left_out_also_where_two_causes_are_there(one: set[int], other: set[int]) -> None:
    def fails(part: Part) -> bool:
        return one <= set(part) or other <= set(part)

    found = reduce(40, fails, never)
    assert fails(found.kept)
    assert not any(fails(tuple(k for k in found.kept if k != left)) for left in found.kept)


def test_no_part_is_tried_twice_and_the_time_is_kept() -> None:
    seen: list[Part] = []

    def fails(part: Part) -> bool:
        seen.append(part)
        return {1, 62} <= set(part)

    found = reduce(64, fails, lambda: len(seen) >= 5)
    assert len(seen) == len(set(seen)) == found.tries == 5
    assert not found.finished
    assert {1, 62} <= set(found.kept)
