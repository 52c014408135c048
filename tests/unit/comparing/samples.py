"""Reports as `gpuopt compile` writes them on a GPU, made up."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuopt.bench.statistics import summarize
from gpuopt.report.model import (
    BenchmarkReport,
    EngineReport,
    Estimate,
    GateReport,
    ModelReport,
    Report,
    StageReport,
)

ENGINE = "model.tensorrt.engine"


def timings(seed: int, scale: float = 1.0, count: int = 2000) -> list[float]:
    """Milliseconds of single inferences: noise, clocks that wander, an inference in 500 that is held up."""
    generator = np.random.default_rng(seed)
    walk = np.cumsum(generator.normal(size=count))
    found = scale * np.exp(generator.normal(0, 0.02, count)) * (1 + 0.01 * walk / np.abs(walk).max())
    held_up = generator.random(count) < 0.002
    found[held_up] *= generator.uniform(1.5, 4, held_up.sum())
    return [round(float(value), 6) for value in found]


def benchmark(seed: int = 0, scale: float = 1.0, count: int = 2000, **changes: Any) -> BenchmarkReport:
    """One of the TensorRT engine."""
    taken = timings(seed, scale, count)
    found = summarize(taken)
    percentiles = {
        f"latency_p{percent}_ms": Estimate(value=p.value, low=p.low, high=p.high)
        for percent, p in found.percentiles.items()
    }
    rate = 8000 / found.mean
    whole = BenchmarkReport(
        target="tensorrt",
        file=ENGINE,
        where="NVIDIA H100 80GB HBM3",
        library_version="10.13.0",
        driver_version="13.0",
        shapes={"image": "8x3x224x224"},
        batch=8,
        includes="compute alone, as a CUDA graph",
        seconds=2.0,
        cuda_graph=True,
        **percentiles,
        throughput_samples_per_second=Estimate(value=rate, low=rate * 0.995, high=rate * 1.004),
        timings_ms=taken,
        host_to_device_ms=0.1,
        compute_ms=1.0,
        device_to_host_ms=0.1,
        device_memory_bytes=50 << 20,
        was_steady=True,
        conditions={},
    )
    return whole.model_copy(update=changes)


def gate(name: str = "latency_p99_ms", verdict: str = "passed", value: float | None = 1.0) -> GateReport:
    """One of the TensorRT engine."""
    return GateReport.model_validate(
        {
            "name": name,
            "target": "tensorrt",
            "where": "",
            "verdict": verdict,
            "value": value,
            "limit": 1.1,
            "margin": None,
            "sense": "at most",
            "unit": "ms",
            "reason": "",
            "exit_code": 13,
        }
    )


def outputs(sqnr_db: float | None, name: str = "logits", **graph: str) -> list[dict[str, Any]]:
    """Figures of one output at two corners, the second the worse."""
    return [
        {
            **graph,
            "corner": corner,
            "output": name,
            "shape": [1, 10],
            "shape_equal": True,
            "finite": True,
            "cosine": 0.9991 if index == 0 else 0.9987,
            "sqnr_db": sqnr_db if sqnr_db is None else sqnr_db + 2 - 2 * index,
            "agreement": None,
            "max_abs_error": 0.01,
        }
        for index, corner in enumerate(("profile0-min", "profile0-max"))
    ]


def report(
    *benchmarks: BenchmarkReport,
    sqnr_db: float | None = 31.0,
    size_bytes: int = 12_000_000,
    accuracy: float = 0.9867,
    output: str = "logits",
    **changes: Any,
) -> Report:
    """A passed run with an engine, `model.onnx` and the graph that the engine was built from."""
    coverage = {"time_share": {"int8": 0.92, "fp16": 0.08}, "layers": {"int8": 20, "fp16": 3}}
    proof = {"outputs": outputs(sqnr_db, output), "coverage": coverage, "device_memory_bytes": 30 << 20}
    verification = {
        "outputs": [*outputs(sqnr_db, output, graph="model.onnx"), *outputs(sqnr_db, output, graph="engine.onnx")]
    }
    facts: dict[str, dict[str, Any]] = {
        "export": {"inputs": [{"name": "image"}], "outputs": [{"name": output}]},
        "fallback": {"metric": "top-1 accuracy", "samples": 450, "int8": 0.9, "final": accuracy},
        "build": {"target": "tensorrt", "build_seconds": 41.5},
        "verify": verification,
    }
    whole = Report(
        command=["gpuopt", "compile", "model.pt"],
        gpuopt_version="0.1.0",
        created="2026-01-02T03:04:05+00:00",
        status="passed",
        error=None,
        model=ModelReport(path="models/model.pt", factory=None, kind="exported program", sha256="ab" * 32),
        precision="int8",
        bundle="models/model.gpuopt",
        stages=[
            StageReport(name=name, target=None, cached=False, reason="first run", seconds=1.0, facts=said)
            for name, said in facts.items()
        ],
        engines=[
            EngineReport(
                target="tensorrt",
                file=ENGINE,
                size_bytes=size_bytes,
                sha256="cd" * 32,
                status="verified",
                library_version="10.13.0",
                compute_capabilities=["9.0"],
                note="",
                proof=proof,
            ),
            EngineReport(
                target="onnxruntime",
                file="model.onnx",
                size_bytes=900,
                sha256="ef" * 32,
                status="verified",
                library_version="1.31.1",
                compute_capabilities=[],
                note="",
            ),
        ],
        verification=verification,
        benchmarks=list(benchmarks),
        gates=[gate()],
        warnings=["only 8 calibration samples"],
        environment={},
        seconds=9.5,
    )
    return whole.model_copy(update=changes)
