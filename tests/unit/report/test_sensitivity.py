"""The table of an analysis: aligned, complete, and a setting that the recipe takes."""

from __future__ import annotations

import fnmatch
import shlex
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gpuopt.recipe import parse_setting
from gpuopt.report import sensitivity


def layer(rank: int, node: str, cost: float | None = 0.1, sqnr: float | None = 10.0) -> dict[str, Any]:
    return {
        "rank": rank,
        "position": 5 - rank,
        "node": node,
        "op_type": "Conv",
        "own_sqnr_db": sqnr,
        "output_sqnr_db": sqnr,
        "output_cosine": 0.9,
        "cost": cost,
        "accumulated_sqnr_db": None,
        "macs": 100,
        "macs_share": 0.25,
    }


def document(*layers: dict[str, Any], cost: float | None = 0.2) -> dict[str, Any]:
    whole = {"own_sqnr_db": None, "output_sqnr_db": 7.0, "output_cosine": 0.9, "cost": cost}
    return {"samples": 8, "data": "npz e.npz", "whole": whole, "int8_macs_share": 0.75, "layers": list(layers)}


def test_the_table_is_aligned_and_says_what_is_undefined() -> None:
    shown = sensitivity.render(document(layer(1, "a/long/name", None, None), layer(2, "b"), layer(3, "c", 0.0, None)))
    lines = shown.splitlines()
    assert lines[1].split() == ["1", "a/long/name", "Conv", "NaN", "25.0%"]
    assert lines[2].split() == ["2", "b", "Conv", "10.0", "10.0", "25.0%"]
    assert lines[3].split() == ["3", "c", "Conv", "25.0%"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[-3:] == [
        "all 3 nodes in INT8: output SQNR 7.0 dB, 75.0% of multiply-accumulates; 8 samples of npz e.npz",
        "costliest: a/long/name, b, c (75.0% of multiply-accumulates)",
        "to keep a/long/name, b in FP16: --set 'quantize.nodes_to_exclude=[a/long/name,b]'",
    ]


def test_nothing_is_to_be_kept_out_of_int8_where_it_costs_nothing_or_is_all_there_is() -> None:
    found = document(layer(1, "a"), layer(2, "b"))
    assert "to keep a in FP16" in sensitivity.conclusion(found)
    assert "to keep" not in sensitivity.conclusion(document(layer(1, "a")))
    found["whole"]["output_sqnr_db"] = 59.9
    assert "to keep" not in sensitivity.conclusion(found)


def test_outputs_that_became_nan_are_told() -> None:
    assert "output SQNR NaN" in sensitivity.conclusion(document(layer(1, "a"), cost=None))


def test_outputs_that_are_no_floats_are_told_by_their_agreement() -> None:
    found = document(layer(1, "a"))
    found["whole"].update(output_sqnr_db=None, cost=0.02)
    assert "98.0% of the output's values agree" in sensitivity.conclusion(found)
    found["whole"]["cost"] = 0.0
    assert "output exact" in sensitivity.conclusion(found)


@given(st.lists(st.text(st.characters(codec="ascii", min_codepoint=33), min_size=1), min_size=1, max_size=3))
def test_the_setting_names_these_nodes_whatever_they_are_called(names: list[str]) -> None:
    found = document(*(layer(rank, name) for rank, name in enumerate([*names, "another"], 1)))
    last = sensitivity.conclusion(found).splitlines()[-1]
    flag, setting = shlex.split(last.partition(" in FP16: ")[2])
    assert flag == "--set"
    key, patterns = parse_setting(setting)
    assert key == "quantize.nodes_to_exclude"
    assert len(patterns) == len(names)
    assert all(fnmatch.fnmatchcase(name, pattern) for name, pattern in zip(names, patterns, strict=True))
