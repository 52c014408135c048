"""Reports with measurements and gates, for what renders and judges them."""

from __future__ import annotations

from typing import Any

from gpuopt import gates
from gpuopt.recipe import Recipe, resolve, set_value
from gpuopt.report.model import BenchmarkReport, Estimate, Report
from tests.unit.report.test_rendering import passing


def recipe(**settings: Any) -> Recipe:
    """A recipe by keys, with `__` for the dot."""
    tree: dict[str, Any] = {"model": {"path": "m.pt"}, "precision": "int8", "build": {"target": ["onnxruntime"]}}
    for key, value in settings.items():
        set_value(tree, key.replace("__", "."), value)
    return resolve(tree)


def benchmark(p99_ms: float = 4.0, **changes: Any) -> BenchmarkReport:
    """Of `model.onnx` on a CPU, around half of the p99."""

    def estimate(value: float) -> Estimate:
        return Estimate(value=value, low=value * 0.98, high=value * 1.02)

    values = {
        "target": "onnxruntime",
        "file": "model.onnx",
        "where": "CPU, Example 9000",
        "library_version": "1.31.1",
        "driver_version": "",
        "shapes": {"image": "8x3x32x32"},
        "batch": 8,
        "includes": "a whole call of ONNX Runtime on the CPU",
        "seconds": 2.0,
        "cuda_graph": None,
        "latency_p50_ms": estimate(p99_ms / 2),
        "latency_p90_ms": estimate(p99_ms * 0.7),
        "latency_p95_ms": estimate(p99_ms * 0.8),
        "latency_p99_ms": estimate(p99_ms),
        "throughput_samples_per_second": estimate(8000 / p99_ms * 2),
        "timings_ms": [p99_ms / 2 + index % 7 / 100 for index in range(200)],
        "host_to_device_ms": None,
        "compute_ms": None,
        "device_to_host_ms": None,
        "device_memory_bytes": None,
        "was_steady": True,
        "conditions": {"cpu_load": 0.5, "cpus": 2},
    }
    return BenchmarkReport.model_validate({**values, **changes})


def gated(asked: Recipe, **changes: Any) -> Report:
    """The passing report with a benchmark, judged by a recipe."""
    before = passing().model_copy(update={"benchmarks": [benchmark()], **changes})
    found = gates.evaluate(before, asked)
    return before.model_copy(update={"gates": found, "gate_mode": asked.gates.mode})
