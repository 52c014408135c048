"""Which precision ships, and which nodes go back to FP16 for speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpuopt import environment
from gpuopt.artifact import Artifact
from gpuopt.bench.measuring import Race
from gpuopt.cache import Cache
from gpuopt.environment import Gpu
from gpuopt.errors import RequirementError
from gpuopt.pipeline import Runner
from gpuopt.precision import (
    Candidate,
    Choice,
    Contest,
    fastest,
    measured_target,
    race_key,
    slower_nodes,
    with_precision,
)
from gpuopt.progress import Silent
from gpuopt.recipe import Recipe, resolve


def raced(**milliseconds: float) -> Race:
    wobble = (0.999, 1.0, 1.001, 1.0, 0.9995, 1.0005, 1.0)
    return Race(milliseconds, {name: tuple(ms * w for w in wobble) for name, ms in milliseconds.items()})


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({"fp32": 3.0, "fp16": 1.5, "int8": 1.0}, "int8"),
        ({"fp32": 3.0, "fp16": 1.5, "int8": 1.6}, "fp16"),
        ({"fp32": 3.0, "fp16": 1.5, "mixed": 1.2, "int8": 1.3}, "mixed"),
        ({"fp32": 3.0, "fp16": 1.5, "int8": 1.5}, "fp16"),
        ({"fp32": 1.0, "fp16": 1.0, "int8": 1.0}, "fp32"),
        ({"int8": 1.0}, "int8"),
    ],
)
def test_the_fastest_ships_and_of_equals_the_more_precise(times: dict[str, float], winner: str) -> None:
    assert fastest(raced(**times)) == winner


def layer(name: str, nodes: list[str], milliseconds: float, computes: bool = True) -> dict[str, Any]:
    return {"name": name, "onnx_nodes": nodes, "milliseconds": milliseconds, "computes": computes}


def test_a_node_that_int8_makes_slower_is_found() -> None:
    int8 = [layer("a + r", ["a", "r"], 1.0), layer("b", ["b"], 2.0)]
    fp16 = [layer("a", ["a"], 1.5), layer("r", ["r"], 0.5), layer("b", ["b"], 1.0)]
    assert slower_nodes(int8, fp16, ["a", "b"]) == ["b"]


def test_what_stands_before_a_layer_counts_for_it() -> None:
    int8 = [
        layer("a", ["a"], 1.0),
        layer("Reformatting CopyNode for Input Tensor 0 to b", [], 0.6, computes=False),
        layer("b", ["b"], 0.8),
        layer("/c/Conv_output_0_QuantizeLinear", [], 0.5, computes=False),
        layer("/c/Conv", ["/c/Conv"], 0.7),
    ]
    fp16 = [layer("a", ["a"], 1.0), layer("b", ["b"], 1.0), layer("/c/Conv", ["/c/Conv"], 1.0)]
    assert slower_nodes(int8, fp16, ["a", "b", "/c/Conv"]) == ["b", "/c/Conv"]


def test_nodes_that_share_a_layer_are_judged_together() -> None:
    int8 = [layer("a + add", ["a", "add"], 1.0), layer("b", ["b"], 0.9)]
    fp16 = [layer("a", ["a"], 0.9), layer("b + add", ["b", "add"], 1.2)]
    assert slower_nodes(int8, fp16, ["a", "b"]) == []


def test_a_budget_belongs_to_int8_alone() -> None:
    recipe = resolve({"model": {"path": "m.onnx"}, "precision": "auto", "accuracy": {"max_drop": 0.01}})
    assert with_precision(recipe, "fp16").accuracy.max_drop is None
    assert with_precision(recipe, "int8").accuracy.max_drop == 0.01


class Decided(Contest):
    """A race whose candidates need no engines, and whose winner is known."""

    def _made(self, name: str, recipe: Recipe, excluded: tuple[str, ...] = ()) -> Candidate:
        return Candidate(name, recipe, Runner(recipe, self.cache, self.progress, name), None, excluded)

    def _decide(self, candidates: Mapping[str, Candidate], target: str) -> Choice:
        return Choice(candidates[self.run_name])


@pytest.mark.parametrize(
    ("winner", "accuracy", "told"),
    [("fp16", {"max_drop": 0.01}, True), ("int8", {"max_drop": 0.01}, False), ("fp32", {"max_drop": 0.01}, False),
     ("fp16", {}, False)],
)  # fmt: skip
def test_fp16_that_ships_beside_a_budget_is_told(
    tmp_path: Path, winner: str, accuracy: dict[str, Any], told: bool
) -> None:
    tree = {"model": {"path": "m.onnx"}, "precision": "auto", "build": {"target": ["onnxruntime"]}}
    contest = Decided(resolve({**tree, "accuracy": accuracy}), Cache(tmp_path), Silent(), winner, lambda runner: None)
    said = contest.choose().out
    assert len(said) == told
    assert all("the accuracy budget of 0.01 is INT8's alone" in line for line in said)


def test_a_race_is_run_again_where_anything_that_decides_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = {"subject int8": Artifact("engine", tmp_path, "a")}
    gpu = Gpu("NVIDIA L40S", "8.9", "12.4")
    found = {"tensorrt": "10.3.0"}
    modules = {"cuda.bindings"}
    monkeypatch.setattr(environment, "gpus", lambda: [gpu])
    monkeypatch.setattr(environment, "version_of", found.get)
    monkeypatch.setattr(environment, "has_module", lambda name: name in modules)

    def key() -> dict[str, str]:
        return race_key("tensorrt", 3.0, artifacts)

    seen = [key()]
    gpu = replace(gpu, driver_version="13.0")
    seen.append(key())
    gpu = replace(gpu, name="NVIDIA L40")
    seen.append(key())
    found["tensorrt"] = "10.3.1"
    seen.append(key())
    modules.clear()
    seen.append(key())
    artifacts["subject int8"] = Artifact("engine", tmp_path, "b")
    seen.append(key())
    assert all(one != other for index, one in enumerate(seen) for other in seen[:index])
    assert key() == seen[-1]
    found["onnxruntime"] = "1.22"
    before = race_key("onnxruntime", 3.0, artifacts)
    found["onnxruntime"] = "1.23"
    assert race_key("onnxruntime", 3.0, artifacts) != before


def test_engines_that_cannot_run_here_cannot_be_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve({"model": {"path": "m.onnx"}, "build": {"target": ["tensorrt-rtx", "onnxruntime"]}})
    monkeypatch.setattr(environment, "gpus", list)
    with pytest.raises(RequirementError, match="cannot be run here: no NVIDIA GPU"):
        measured_target(recipe)
    alone = resolve({"model": {"path": "m.onnx"}, "build": {"target": ["onnxruntime"]}})
    assert measured_target(alone) == "onnxruntime"
