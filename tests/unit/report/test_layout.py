"""What the reports say of the deployed form, of I/O formats and of ONNX Runtime's own layouts."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from gpuopt.report import html, markdown, terminal
from gpuopt.report.model import Report, StageReport
from gpuopt.report.schema import json_schema
from tests.unit.report.test_rendering import passing

LAYOUT: dict[str, Any] = {
    "inputs": [
        {"name": "image", "dtype": "uint8", "profiles": [dict.fromkeys(("min", "opt", "max"), "1x224x224x3")]},
    ],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": "1x1000"}],
    "transposes": {"own": 2, "inserted": 1, "cancelled": 0, "left": 3, "reason": "none can be cancelled"},
    "normalization": {"image": {"factor": "weights", "center": "Sub", "reason": "'/conv1/Conv' pads"}},
    "largest_difference": 2.1e-7,
}
FORMATS: dict[str, Any] = {
    "target": "tensorrt",
    "shapes": {"image": "1x3x224x224"},
    "includes": "compute alone",
    "candidates": [
        {
            "name": name, "state": state, "reason": reason, "formats": formats, "as_built": formats,
            "milliseconds": milliseconds, "lowest": milliseconds, "highest": milliseconds,
        }
        for name, state, reason, formats, milliseconds in (
            ("linear", "measured", "", {"image": "fp16:chw"}, 0.5),
            ("hwc8", "measured", "", {"image": "fp16:hwc8"}, 0.4),
            ("chw32", "out", "it cannot be built", {}, None),
        )
    ],
    "chosen": "hwc8",
    "verdict": "hwc8 takes 0.800 times linear's time (0.790 to 0.810): it is kept",
}  # fmt: skip
KERNELS = {"model.onnx": {"nchwc": 53, "nhwc": 0, "reorders": 2, "nodes": 80}}


@pytest.fixture
def report() -> Report:
    base = passing()
    stage = StageReport(
        name="layout", target=None, cached=False, reason="first run", seconds=0.1, facts=LAYOUT, warnings=[]
    )
    verification = {**(base.verification or {}), "layout_kernels": KERNELS}
    stages = [*base.stages, stage]
    return base.model_copy(update={"stages": stages, "format_race": FORMATS, "verification": verification})


def test_every_report_tells_of_the_deployed_form(report: Report) -> None:
    pages = {"markdown": markdown.render(report), "html": html.render(report)}
    for text in pages.values():
        for said in (
            "uint8",
            "1x224x224x3",
            "2 of the model",
            "1 inserted, 0 cancelled, 3 left (none can be cancelled)",
            "scale / std in the first Conv",
            "mean / scale in a Sub",
            "up to 2.1e-07",
            "53 work on blocks of channels",
            "fp16:hwc8",
            "it cannot be built",
            "Hwc8 takes 0.800 times linear",
        ):
            assert said in text, said
    assert "**hwc8**" in pages["markdown"]
    lines = terminal.render(report, "out")
    assert "input        image uint8 1x224x224x3" in lines
    assert "I/O formats  hwc8 takes 0.800 times linear's time" in lines


def test_it_fits_the_schema(report: Report) -> None:
    jsonschema.Draft202012Validator(json_schema("report")).validate(report.model_dump(mode="json"))
