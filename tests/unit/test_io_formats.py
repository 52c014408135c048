"""Which formats are tried for inputs and outputs, which is kept, and what is said where nothing can be measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuopt import environment, io_formats, reference
from gpuopt.artifact import Artifact
from gpuopt.cache import Cache
from gpuopt.errors import BuildError, GpuoptError
from gpuopt.io_formats import LINEAR, as_shipped, candidates, why_not_measured, with_formats
from gpuopt.pipeline import Runner
from gpuopt.progress import Silent
from gpuopt.recipe import Recipe, resolve
from gpuopt.shapes import ShapeRange, TensorSpec

IMAGE = TensorSpec("image", "float32", ("batch", 3, 8, 6))
LOGITS = TensorSpec("logits", "float32", ("batch", 10))
MAP = TensorSpec("map", "float16", ("batch", 4, 8, 6))


def recipe(**sections: Any) -> Recipe:
    build = {"target": ["tensorrt", "onnxruntime"], "io_formats": "auto"}
    return resolve({"model": {"path": "m"}, "precision": "fp32", "build": build, **sections})


def test_every_candidate_gives_a_format_to_what_can_have_it() -> None:
    assert candidates((IMAGE,), (LOGITS, MAP), recipe()) == {
        "linear": {},
        "hwc": {"image": "fp32:hwc"},
        "hwc8": {"map": "fp16:hwc8"},
        "chw32": {"image": "fp32:chw32", "map": "fp16:chw32"},
    }


def test_bytes_have_one_format_besides_and_what_is_channels_last_none() -> None:
    pixels = TensorSpec("image", "uint8", (1, 3, 8, 6))
    bytes_in = recipe(layout={"input_dtype": "uint8"})
    assert candidates((pixels,), (LOGITS,), bytes_in) == {"linear": {}, "hwc": {"image": "uint8:hwc"}}
    turned = recipe(layout={"input": "nhwc"})
    assert candidates((IMAGE,), (LOGITS,), turned) == {"linear": {}}


def runner(folder: Path, chosen: Recipe) -> Runner:
    """A finished run, as far as the choice looks at it."""
    made = Runner(chosen, Cache(folder / "cache"), Silent(), "run")
    made._artifacts["reference"] = Artifact("reference", folder / "reference", "hash")
    return made


@pytest.fixture
def linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(environment, "why_not_run", lambda target: "")
    (tmp_path / "reference").mkdir()
    spec = TensorSpec("image", "float32", (1, 3, 4, 4))
    feed = {"image": np.zeros((1, 3, 4, 4), np.float32)}
    shape = ShapeRange((1, 3, 4, 4), (1, 3, 4, 4), (1, 3, 4, 4))
    interface = reference.Interface((spec,), ("y",), ({"image": shape},))
    reference.record(tmp_path / "reference", interface, lambda feed: [feed["image"]], {"profile0-min": feed}, "ONNX")
    return runner(tmp_path, with_formats(recipe(), {}))


def raced(monkeypatch: pytest.MonkeyPatch, **milliseconds: float) -> None:
    """The race needs a GPU; what follows from its times does not."""
    wobble = (0.999, 1.0, 1.001, 1.0, 0.9995, 1.0005, 1.0)
    facts = {
        "milliseconds": milliseconds,
        "rounds": {name: [ms * w for w in wobble] for name, ms in milliseconds.items()},
        "loads": 1,
        "shapes": {"image": "1x3x4x4"},
        "includes": "compute alone",
    }
    monkeypatch.setattr(io_formats, "time_in_turn", lambda running, *others: facts)


@pytest.mark.parametrize(
    ("times", "kept", "verdict"),
    [
        (
            {"linear": 1.0, "hwc": 0.8, "chw32": 0.9},
            {"image": "fp32:hwc", "y": "fp32:hwc"},
            "hwc takes 0.800 times linear's time",
        ),
        ({"linear": 1.0, "hwc": 1.0, "chw32": 1.2}, {}, "no other format is faster beyond the noise: linear is kept"),
    ],
)
def test_the_fastest_format_is_kept(
    times: dict[str, float], kept: dict[str, str], verdict: str, linear: Runner, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    raced(monkeypatch, **times)
    asked: list[str] = []

    def run(name: str, chosen: Recipe) -> tuple[Runner, GpuoptError | None]:
        asked.append(name)
        return runner(tmp_path, chosen), None

    found = io_formats.choose(linear, run, linear.cache, Silent())
    assert asked == ["io formats hwc", "io formats chw32"]
    assert found.recipe.build.io_formats == kept
    assert found.runner.recipe.build.io_formats == kept
    assert found.table["verdict"].startswith(verdict)
    assert [row["state"] for row in found.table["candidates"]] == ["measured"] * 3
    assert as_shipped(found.recipe, found.table).build.io_formats == kept


def test_what_cannot_be_built_is_out_and_told(linear: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, chosen: Recipe) -> tuple[Runner, GpuoptError | None]:
        return runner(tmp_path, chosen), BuildError(f"no {name}")

    found = io_formats.choose(linear, run, linear.cache, Silent())
    assert found.runner is linear
    assert found.table["verdict"] == "no other format can be built: linear is kept"
    assert [(row["name"], row["state"], row["reason"]) for row in found.table["candidates"]] == [
        (LINEAR, "built", ""), ("hwc", "out", "no io formats hwc"), ("chw32", "out", "no io formats chw32"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"build": {"target": ["onnxruntime"]}}, "no engine is asked for"),
        ({"build": {"target": ["tensorrt"], "enabled": False}}, "no engine is built here"),
        ({"verify": {"enabled": False}}, "no engine is run (verify.enabled is false)"),
        ({}, "no NVIDIA GPU"),
    ],
)
def test_where_nothing_can_be_measured_the_reason_is_told_and_auto_stays(
    sections: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "why_not_run", lambda target: "no NVIDIA GPU")
    asked = with_formats(recipe(**sections), {})
    assert why_not_measured(asked) == reason
    table = io_formats.unmeasured(asked)
    assert table["chosen"] == LINEAR
    assert reason in table["verdict"]
    assert as_shipped(asked, table).build.io_formats == "auto"
