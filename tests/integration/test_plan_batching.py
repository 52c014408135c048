"""`gpuopt plan-batching` as a command: stdout, files, exit codes; and its plan in a model repository."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gpuopt.triton import schema
from tests.conftest import Gpuopt

QUICK = ("--max-batch-size", "8", "--max-queue-delay", "0ms")
"""Leaves next to nothing to the search."""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "latencies.csv"
    path.write_text("batch,p50_ms,p99_ms\n1,2.0,2.4\n4,3.2,3.6\n8,5.0,5.6\n")
    return path


def test_a_plan_goes_into_a_repository(gpuopt: Gpuopt, table: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    example = tmp_path / "example.pbtxt"
    example.write_text(
        "max_batch_size: 8 dynamic_batching { preferred_batch_size: [4, 8] max_queue_delay_microseconds: 20000 "
        "preserve_ordering: true }"
    )
    result = gpuopt(
        "plan-batching", table, "--rate", 400, "--target", "p99=30ms", "--against", example, "-o", plan,
        "--plot", tmp_path / "plan.svg",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    assert "holds p99 of 30 ms" in result.stdout
    found = json.loads(plan.read_text())
    assert found["holds"]
    assert found["at_load"]["p99_ms"] <= 30
    assert found["at_load"]["p99_ms"] < found["against"]["at_load"]["p99_ms"]
    assert found["capacity"] > found["against"]["capacity"] * 0.99
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")

    arguments = ("-p", "fp32", "-t", "onnxruntime", "--min-shapes", "1x3x16x16", "--opt-shapes", "8x3x16x16",
                 "--max-shapes", "8x3x16x16", "-q", "-o", tmp_path / "m.gpuopt")  # fmt: skip
    compiled = gpuopt("compile", "tests.integration.small:small_net", *arguments)
    assert compiled.code == 0, compiled.stderr
    written = gpuopt("triton", tmp_path / "m.gpuopt", "-o", tmp_path / "r", "--plan", plan, "--json")
    assert written.code == 0, written.stderr
    config, block = schema.parse(written.report()["config"], "it"), schema.parse(found["config"], "it")
    assert config.max_batch_size == block.max_batch_size
    assert config.dynamic_batching == block.dynamic_batching
    assert config.instance_group == block.instance_group


def test_a_trace_and_limits_of_the_queue(gpuopt: Gpuopt, table: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    times = np.cumsum(np.random.default_rng(0).gamma(0.25, 4 / 300, 3000))
    trace.write_text("arrival\n" + "\n".join(f"{time:.6f}" for time in times))
    result = gpuopt(
        "plan-batching", table, "--trace", trace, "--target", "p95=60ms", "--max-drop", "5%", "--max-queue-size", "50",
        *QUICK, "--json",
    )  # fmt: skip
    found = result.report()
    assert found["load"]["distribution"] == "trace"
    assert found["load"]["requests"] == 3000
    assert found["settings"]["max_queue_size"] == 50
    assert "max_queue_size: 50" in found["config"]


def test_a_load_that_is_too_much_is_told_with_the_plan(gpuopt: Gpuopt, table: Path) -> None:
    result = gpuopt("plan-batching", table, "--rate", 9000, "--target", "p99=30ms", *QUICK, "--json")
    assert result.code == 13
    assert not result.report()["holds"]
    assert "no settings hold 9000 requests/s" in result.stderr
    assert "spread the load over" in result.stderr


def test_a_mistake_has_its_exit_code_and_three_lines(gpuopt: Gpuopt, table: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    rate = ("--rate", "10")
    for code, arguments in (
        (2, (table, "--target", "p99=30ms")),
        (2, (table, *rate, "--target", "30ms")),
        (2, (table, *rate, "--target", "p99=30ms", "--max-batch-size", "64")),
        (2, (table, *rate, "--target", "p99=30ms", "--max-queue-size", "5000000000")),
        (2, (table, *rate, "--target", "p99=30ms", "--burstiness", "2")),
        (2, (table, *rate, "--target", "p99=30ms", "--plot", "plan.pdf")),
        (2, (table, *rate, "--target", "p99=30ms", "--against", tmp_path / "none.pbtxt")),
        (4, (tmp_path / "empty.csv", *rate, "--target", "p99=30ms")),
        (4, (table, "--trace", tmp_path / "empty.csv", "--target", "p99=30ms")),
        (10, (tmp_path / "none.csv", *rate, "--target", "p99=30ms")),
        (13, (table, *rate, "--target", "p99=1ms", *QUICK)),
    ):  # fmt: skip
        result = gpuopt("plan-batching", *arguments)
        assert result.code == code, (arguments, result.stderr)
        lines = [line for line in result.stderr.splitlines() if not line.startswith("plan: ")]
        assert 1 <= len(lines) <= 3
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
