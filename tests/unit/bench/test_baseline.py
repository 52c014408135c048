"""ONNX Runtime's CUDA provider beside an engine: which of its sessions become rows; they themselves need a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpuopt.bench import baseline
from gpuopt.bench.measuring import Settings
from gpuopt.bench.report import Row


@pytest.mark.parametrize(
    ("kind", "able", "wanted"),
    [
        ("onnxruntime cuda nhwc", {True, False}, [(False, True, ""), (True, True, "")]),
        ("onnxruntime cuda nhwc", {False}, [(False, False, ""), (True, False, "")]),
        ("onnxruntime cuda nhwc", set(), [(False, False, "no kernel"), (True, False, "no kernel")]),
        ("onnxruntime cuda nchw", {False}, [(False, False, ""), (True, False, "")]),
    ],
)
def test_biases_are_fused_in_nhwc_and_where_that_fails_it_goes_on_without(
    kind: str, able: set[bool], wanted: list[tuple[bool, bool, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_cuda(*_: Any, graph: bool, fused: bool) -> Row:
        failed = "" if fused in able else "no kernel"
        return Row(group="", name=f"{graph} {fused}", batch=1, includes="", failed=failed)

    monkeypatch.setattr(baseline, "_on_cuda", on_cuda)
    rows = baseline._onnxruntime_cuda(kind, Path("model.onnx"), {}, Settings(seconds=1.0), 1)
    assert [(row.name, row.failed) for row in rows] == [(f"{graph} {fused}", failed) for graph, fused, failed in wanted]
