"""How a bench report is told in text."""

from __future__ import annotations

import pytest

from gpuopt.bench.report import THE_CPU, BenchReport, Row, render


def report(*groups: str, gpu: str) -> BenchReport:
    rows = [Row(group=group, name=group, batch=1, includes="", failed="not here") for group in groups]
    return BenchReport(
        command=[], gpuopt_version="0.1.0", created="", subject="model.onnx", sha256="", target="tensorrt",
        library_version="10.13", gpu=gpu, shapes={"x": "1x3"}, rows=rows, memory={}, conditions={}, warnings=[],
        environment={}, seconds=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "gpu", "head"),
    [
        (("latency", "baselines"), "NVIDIA H100", "model.onnx: tensorrt 10.13 on NVIDIA H100; x 1x3"),
        (("baselines",), "NVIDIA H100", "model.onnx: baselines alone, on a machine with NVIDIA H100; x 1x3"),
        (("baselines",), THE_CPU, "model.onnx: baselines alone, on a machine without an NVIDIA GPU; x 1x3"),
    ],
)
def test_the_first_line_names_what_was_measured_and_where(groups: tuple[str, ...], gpu: str, head: str) -> None:
    assert render(report(*groups, gpu=gpu)).splitlines()[0] == head
