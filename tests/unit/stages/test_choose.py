"""The calibration method is chosen by what it loses at the model's outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from gpuopt import onnx_model
from gpuopt.artifact import Artifact
from gpuopt.calibration import ranges
from gpuopt.calibration.collectors import TensorRange
from gpuopt.progress import Silent
from gpuopt.quantization.measurement import Sqnr
from gpuopt.recipe import resolve
from gpuopt.stages import choose
from gpuopt.stages.context import StageContext
from tests.unit.stages.test_quantize import KNOWN, small_network


def context(folder: Path, known: dict[str, dict[str, TensorRange]]) -> StageContext:
    model = onnx_model.with_types(small_network())
    graph = onnx_model.save(model, folder / "onnx")
    assert onnx.load(str(graph))
    (folder / "ranges").mkdir()
    for name, one in known.items():
        ranges.save(folder / "ranges" / name, one, {})
    data = folder / "data.npz"
    np.savez(data, x=np.random.default_rng(0).standard_normal((40, 2, 16, 8, 8), dtype=np.float32))
    (folder / "out").mkdir()
    recipe = resolve({"model": {"factory": "a:b"}, "quantize": {"min_channels": 8}})
    artifacts = {kind: Artifact(kind, folder / kind, "") for kind in ("onnx", "ranges")}
    return StageContext(recipe, artifacts, folder / "out", Silent(), str(data))


def with_factor(factor: float) -> dict[str, TensorRange]:
    known = {**KNOWN, "x": TensorRange(-5, 5, "minmax"), "m": TensorRange(-4, 4, "minmax")}
    return {name: TensorRange(r.low * factor, r.high * factor, r.method) for name, r in known.items()}


@pytest.mark.parametrize("winner", ranges.METHODS_TO_CHOOSE_FROM)
def test_the_ranges_that_lose_least_win(winner: str, tmp_path: Path) -> None:
    # The others clip nearly everything.
    known = {
        ranges.candidate_file(method): with_factor(1.0 if method == winner else 0.05)
        for method in ranges.METHODS_TO_CHOOSE_FROM
    }
    made = context(tmp_path, known)
    outcome = choose.run(made)
    assert outcome.facts["method"] == winner
    assert outcome.facts["samples"] == 40
    figures: dict[str, Any] = outcome.facts["sqnr_db"]
    assert max(figures, key=lambda method: figures[method]) == winner
    assert ranges.load(tmp_path / "out/ranges" / ranges.RANGES_FILE) == known[ranges.candidate_file(winner)]


def test_ranges_without_a_choice_stay(tmp_path: Path) -> None:
    made = context(tmp_path, {ranges.RANGES_FILE: with_factor(1.0)})
    assert choose.run(made).facts == {}
    assert not (tmp_path / "out/ranges").exists()


def test_minmax_wins_where_the_others_are_hardly_better() -> None:
    def sqnr(db: float) -> Sqnr:
        return Sqnr(db, tuple(db + 0.01 * i for i in range(8)))

    assert choose.best({"minmax": sqnr(30), "entropy": sqnr(30.9), "mse": sqnr(29)}) == "minmax"
    assert choose.best({"minmax": sqnr(30), "entropy": sqnr(31.5), "mse": sqnr(32)}) == "mse"
    assert choose.best({"minmax": None, "entropy": None, "mse": None}) == "minmax"
