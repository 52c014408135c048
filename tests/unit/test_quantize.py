"""`gpuopt quantize` short of running it: where it stops, where it writes, what it prints."""

from __future__ import annotations

from typing import Any

import pytest

from gpuopt import recipe
from gpuopt.pipeline import plan
from gpuopt.quantize import output_folder
from gpuopt.report import placement


def wanted(**sections: Any) -> recipe.Recipe:
    return recipe.resolve({"model": {"path": "models/net.pt2"}, "build": {"target": ["tensorrt-rtx"]}, **sections})


@pytest.mark.parametrize(
    ("sections", "last"),
    [({}, "cast"), ({"cast": {"remainder": "fp32"}}, "correct"), ({"precision": "fp32"}, "simplify")],
)
def test_the_plan_ends_before_engines_also_where_the_last_stage_does_not_apply(
    sections: dict[str, Any], last: str
) -> None:
    assert plan(wanted(**sections), "cast")[-1].label == last
    assert plan(wanted(**sections))[-1].label == "verify"


def test_the_folder_lies_beside_the_model() -> None:
    assert str(output_folder(wanted())) == "models/net.quantized"
    assert str(output_folder(wanted(model={"factory": "package.nets:make"}))) == "make.quantized"


NODES = [
    {"node": "conv", "op_type": "Conv", "quantized": True, "reason": "", "note": "weights per channel"},
    {"node": "a_softmax", "op_type": "Softmax", "quantized": False, "reason": "needs its range", "note": ""},
]


def test_a_line_a_node_in_columns() -> None:
    assert placement.render(NODES).splitlines() == [
        "conv       Conv     INT8   weights per channel",
        "a_softmax  Softmax  float  needs its range",
    ]
    assert placement.render([]) == ""


def test_the_summary_says_what_and_where() -> None:
    facts = {"quantized_nodes": 1, "candidate_nodes": 2, "quantized_before": True, "repaired": ["a bias"]}
    document = {"quantization": facts, "files": ["engine.onnx", "model.onnx"]}
    assert placement.summary(document, "out").splitlines() == [
        "INT8         1 of 2 candidate nodes",
        "ranges       the model's own Q/DQ; nothing was calibrated",
        "repaired     a bias",
        "written      out/engine.onnx",
        "written      out/model.onnx",
    ]
