"""The stage as a whole: what a recipe's settings make of data and graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from gpuopt import onnx_model, recipe
from gpuopt.artifact import Artifact, StageOutcome
from gpuopt.calibration import ranges
from gpuopt.calibration.collectors import METHODS, TensorRange
from gpuopt.progress import Silent
from gpuopt.stages import calibrate
from gpuopt.stages.context import StageContext

Array = np.ndarray[Any, Any]


def network(dtype: type[np.floating[Any]] = np.float32) -> onnx.ModelProto:
    """Two convolutions over images of any number."""
    generator = np.random.default_rng(0)
    nodes, constants, name = [], [], "x"
    for index in range(2):
        weight = generator.standard_normal((16, 16, 3, 3)).astype(dtype) / 12
        constants.append(numpy_helper.from_array(weight, f"w{index}"))
        nodes.append(helper.make_node("Conv", [name, f"w{index}"], [f"c{index}"], f"conv{index}", pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"], f"relu{index}"))
        name = f"r{index}"
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    value = [helper.make_tensor_value_info(n, kind, ["n", 16, 72, 72]) for n in ("x", name)]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    return onnx_model.with_types(model)


def run(
    folder: Path, feeds: Sequence[Array], model: onnx.ModelProto | None = None, **how: Any
) -> tuple[dict[str, TensorRange], StageOutcome]:
    """The stage on one feed a file."""
    (folder / "data").mkdir(parents=True)
    for index, feed in enumerate(feeds):
        np.savez(folder / "data" / f"{index:04}.npz", x=feed)
    onnx_model.save(model or network(), folder / "onnx")
    for name in ("reference", "out"):
        (folder / name).mkdir()
    context = StageContext(
        recipe=recipe.resolve({"model": {"path": "m"}, "calibrate": {"method": "entropy", **how}}),
        artifacts={kind: Artifact(kind, folder / kind, "") for kind in ("onnx", "reference")},
        output=folder / "out",
        progress=Silent(),
        data=str(folder / "data"),
    )
    outcome = calibrate.run(context)
    return ranges.load(folder / "out/ranges" / ranges.RANGES_FILE), outcome


@pytest.mark.parametrize("method", METHODS)
def test_neither_order_nor_batch_size_matter(method: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = generator.standard_normal((64, 16, 72, 72), dtype=np.float32)
    images *= generator.uniform(0.5, 2, (64, 1, 1, 1)).astype(np.float32)
    alone, _ = run(tmp_path / "alone", np.split(images, 64), method=method)
    batched, _ = run(tmp_path / "batched", np.split(generator.permutation(images), 16), method=method)
    assert list(batched) == list(alone) == ["x", "r0"]
    # Of the input nothing but the data decides; a convolution sums up in another order in another batch.
    assert batched["x"] == alone["x"]
    assert np.isclose(batched["r0"].amax, alone["r0"].amax, rtol=1e-3)


def test_a_limit_that_was_not_kept_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = calibrate.calibrate

    def grown(*arguments: Any) -> Any:
        return replace(measured(*arguments), peak_bytes=600 << 20)

    monkeypatch.setattr(calibrate, "calibrate", grown)
    _, kept = run(tmp_path / "kept", [np.ones((1, 16, 72, 72), np.float32)], max_memory="1GiB")
    _, missed = run(tmp_path / "missed", [np.ones((1, 16, 72, 72), np.float32)], max_memory="500MiB")
    told = "calibration took 600.0 MiB, which is above the limit of 500.0 MiB"
    assert told in missed.warnings
    assert not any("limit" in warning for warning in kept.warnings)
