"""A report with everything in it, the size of a ResNet-50's; its figures are invented."""

from __future__ import annotations

import math
import random
from typing import Any

from gpuopt.report.model import BenchmarkReport, Estimate, Failure, GateReport, Report, StageReport
from tests.unit.report.test_rendering import budgeted

LAYERS = 60


def _layers(generator: random.Random) -> list[dict[str, Any]]:
    rows = []
    for place in range(LAYERS):
        stage, block, part = place // 15 + 1, place % 15 // 3, place % 3 + 1
        node = f"/layer{stage}/layer{stage}.{block}/conv{part}/Conv"
        is_reformat = place % 17 == 16
        rows.append(
            {
                "name": f"Reformatting CopyNode for Input Tensor 0 to {node}"
                if is_reformat
                else f"{node} + PWN(/relu)",
                "kind": "Reformat" if is_reformat else "CaskConvolution",
                "precision": "fp16" if is_reformat or place in (0, 28, 59) else "int8",
                "tactic": "" if is_reformat else f"sm90_xmma_fprop_implicit_gemm_interleaved_i8i8_tilesize{64 << part}",
                "onnx_nodes": [] if is_reformat else [node, "/relu", f"{node}_bias", "/add", "/quantize"],
                "computes": not is_reformat,
                "milliseconds": round(generator.uniform(0.002, 0.01), 5),
            }
        )
    return rows


def _row(corner: str, batch: int, sqnr: float) -> dict[str, Any]:
    return {
        "corner": corner,
        "output": "logits",
        "shape": [batch, 1000],
        "shape_equal": True,
        "finite": True,
        "cosine": 1 - 10 ** (-sqnr / 10) / 2,
        "sqnr_db": sqnr,
        "agreement": None,
        "max_abs_error": 0.043,
    }


def _proof(generator: random.Random) -> dict[str, Any]:
    return {
        "target": "tensorrt",
        "file": "model.tensorrt.engine",
        "gpu": "Example GPU",
        "io_formats": {"image": "float32, row-major linear", "logits": "float32, row-major linear"},
        "device_memory_bytes": 6_422_528,
        "passed": True,
        "failures": [],
        "warnings": [],
        "reference": "PyTorch",
        "limits": {"min_cosine": 0.95, "min_agreement": 0.9, "min_sqnr_db": 10.0, "batch_tolerance": 0.05},
        "outputs": [
            {**_row(corner, batch, sqnr), "profile": 0}
            for corner, batch, sqnr in (
                ("profile0-min", 1, 37.6),
                ("profile0-opt", 8, 38.2),
                ("profile0-max", 16, 38.9),
            )
        ],
        "batch_invariance": {"checked": True, "batch": 16, "worst_relative_error": 2.1e-6, "failures": []},
        "repeats_equal": True,
        "coverage": {
            "layers": {"int8": 54, "fp16": 3},
            "layer_share": {"int8": 54 / 57, "fp16": 3 / 57},
            "time_share": {"int8": 0.921, "fp16": 0.079},
            "reformats": 3,
            "quantizations": 1,
            "overhead_time_share": 0.031,
            "milliseconds": 0.347,
        },
        "layers": _layers(generator),
    }


def _timings(generator: random.Random, middle: float) -> list[float]:
    found = [middle * (1 + generator.lognormvariate(-4.2, 0.7)) for _ in range(1990)]
    return [*found, *(middle * generator.uniform(1.3, 2.5) for _ in range(10))]


def _benchmark(generator: random.Random, target: str, file: str, middle: float, on_gpu: bool) -> BenchmarkReport:
    timings = _timings(generator, middle)
    ordered = sorted(timings)

    def percentile(part: float) -> Estimate:
        value = ordered[math.floor(part * (len(ordered) - 1))]
        return Estimate(value=value, low=value * 0.998, high=value * 1.003)

    return BenchmarkReport(
        target=target,
        file=file,
        where="Example GPU" if on_gpu else "CPU, Example Processor",
        library_version="10.13.0" if on_gpu else "1.31.1",
        driver_version="13.0" if on_gpu else "",
        shapes={"image": "8x3x224x224"},
        batch=8,
        includes="end to end: copies in, compute, copies out" if on_gpu else "a whole call of ONNX Runtime",
        seconds=3.0,
        cuda_graph=True if on_gpu else None,
        latency_p50_ms=percentile(0.5),
        latency_p90_ms=percentile(0.9),
        latency_p95_ms=percentile(0.95),
        latency_p99_ms=percentile(0.99),
        throughput_samples_per_second=Estimate(value=8000 / middle, low=7900 / middle, high=8100 / middle),
        timings_ms=timings,
        host_to_device_ms=0.094 if on_gpu else None,
        compute_ms=0.347 if on_gpu else None,
        device_to_host_ms=0.009 if on_gpu else None,
        device_memory_bytes=16_777_216 if on_gpu else None,
        was_steady=on_gpu,
        conditions={
            "sm_mhz": [1755, 1980] if on_gpu else None,
            "celsius": [41, 47] if on_gpu else None,
            "held_back": {},
            "other_processes": [],
            "cpu_load": 0.8,
            "note": "" if on_gpu else "no NVIDIA GPU",
        },
    )


def _gate(name: str, unit: str, value: float | None, limit: float, sense: Any, where: str = "") -> GateReport:
    room = None if value is None else value - limit if sense == "at least" else limit - value
    return GateReport(
        name=name,
        target="" if name == "calibration_warnings" else "tensorrt",
        where=where,
        verdict="unknown" if room is None else "passed" if room >= 0 else "failed",
        value=value,
        limit=limit,
        margin=room,
        sense=sense,
        unit=unit,
        reason="the GPU does not tell" if value is None else "",
        exit_code=13 if unit == "ms" else 8,
    )


def _gates(p99: float) -> list[GateReport]:
    return [
        _gate("sqnr_db", "dB", 37.6, 10.0, "at least", "logits at profile0-min"),
        _gate("cosine", "", 0.99991, 0.95, "at least", "logits at profile0-min"),
        _gate("precision_coverage", "share", 0.921, 0.8, "at least"),
        _gate("latency_p99_ms", "ms", p99, 0.6, "at most"),
        _gate("engine_size_bytes", "bytes", 26_214_400, 33_554_432, "at most"),
        _gate("calibration_warnings", "", 0, 2, "at most"),
    ]


def _sensitivity(generator: random.Random) -> dict[str, Any]:
    found = [
        {
            "position": place,
            "node": f"/layer{place // 15 + 1}/layer{place // 15 + 1}.{place % 15 // 3}/conv{place % 3 + 1}/Conv",
            "op_type": "Conv",
            "own_sqnr_db": generator.uniform(34, 44),
            "output_sqnr_db": generator.uniform(45, 62),
            "accumulated_sqnr_db": 44 - place / 9 + generator.uniform(-1.5, 1.5),
            "macs_share": 1 / LAYERS,
        }
        for place in range(LAYERS)
    ]
    found.sort(key=lambda layer: layer["output_sqnr_db"])
    layers = [{"rank": rank, **layer} for rank, layer in enumerate(found, 1)]
    return {"samples": 32, "data": "npz calibration.npz, 256 samples", "nodes": LAYERS, "layers": layers}


def _race() -> dict[str, Any]:
    rows = [("fp32", 0.984, 128.4), ("fp16", 0.458, 61.7), ("int8", 0.361, 37.6), ("mixed", 0.355, 39.1)]
    return {
        "target": "tensorrt",
        "shapes": {"image": "8x3x224x224"},
        "includes": "compute alone, as a CUDA graph: inputs and outputs stay on the GPU, the next inference waits",
        "candidates": [
            {
                "name": name,
                "state": "measured",
                "reason": "",
                "milliseconds": time,
                "lowest": time * 0.985,
                "highest": time * 1.02,
                "lowest_sqnr_db": sqnr,
                "back_in_fp16": ["/layer1/layer1.0/conv1/Conv"] if name == "mixed" else [],
            }
            for name, time, sqnr in rows
        ],
        "ratio_to_fp16": {
            name: {"value": time / 0.458, "low": time / 0.46, "high": time / 0.455} for name, time, _ in rows[::2]
        },
        "chosen": "int8",
    }


def _as_in_resnet(stage: StageReport, verification: dict[str, Any]) -> StageReport:
    """What the stages of the small examples say, with the shapes and names of this one."""
    image = {"min": "1x3x224x224", "opt": "8x3x224x224", "max": "16x3x224x224"}
    first, second = "/layer1/layer1.0/conv1/Conv", "/layer4/layer4.2/conv3/Conv"
    changes: dict[str, dict[str, Any]] = {
        "export": {
            "exporter": "dynamo",
            "attempts": [{"exporter": "dynamo", "reason": ""}],
            "inputs": [{"name": "image", "dtype": "float32", "profiles": [image]}],
            "outputs": [{"name": "logits", "dtype": "float32", "shape": "batchx1000"}],
        },
        "quantize": {
            "quantized_nodes": 54,
            "candidate_nodes": 57,
            "int8_macs_share": 0.964,
            "qdq_pairs": 121,
            "kept_in_floating_point": [
                {"node": node, "op_type": "Conv", "reason": "it fell back to hold the accuracy budget"}
                for node in (first, second)
            ],
        },
        "fallback": {
            "int8_macs_share": 0.964,
            "fell_back": [first, second],
            "steps": [
                {"in_fp16": [first], "metric": 0.96, "held": False},
                {"in_fp16": [first, "/conv1/Conv", second], "metric": 0.9889, "held": True},
                {"in_fp16": [first, second], "metric": 0.9867, "held": True},
            ],
        },
        "calibrate": {
            "passes": 1, "provider": "CPUExecutionProvider", "samples_per_second": 41.2, "peak_mib": 55.0,
            "findings": [], "tensors": 71,
        },
        "verify": verification,
    }  # fmt: skip
    return stage.model_copy(update={"facts": {**stage.facts, **changes.get(stage.name, {})}})


def release() -> Report:
    """A ResNet-50 that may ship."""
    generator = random.Random(0)
    whole = budgeted()
    engine = whole.engines[0].model_copy(
        update={
            "target": "tensorrt",
            "file": "model.tensorrt.engine",
            "size_bytes": 26_214_400,
            "status": "verified",
            "library_version": "10.13.0",
            "compute_capabilities": ["9.0"],
            "note": "",
            "proof": _proof(generator),
        }
    )
    session = whole.engines[1].model_copy(update={"size_bytes": 26_738_688})
    rows = ((1, "min", 37.9), (16, "max", 38.7))
    verification = {
        **(whole.verification or {}),
        "outputs": [
            {"graph": graph, **_row(f"profile0-{corner}", batch, sqnr)}
            for graph in ("model.onnx", "engine.onnx")
            for batch, corner, sqnr in rows
        ],
    }
    benchmarks = [
        _benchmark(generator, "tensorrt", engine.file, 0.45, True),
        _benchmark(generator, "onnxruntime", "model.onnx", 61.0, False),
    ]
    stages = [
        *(_as_in_resnet(stage, verification) for stage in whole.stages),
        *(
            StageReport(name=name, target=target, cached=False, reason="first run", seconds=seconds, facts=facts)
            for name, target, seconds, facts in (
                ("choose", None, 3.1, {"method": "entropy", "samples": 96,
                                       "sqnr_db": {"minmax": 34.1, "entropy": 37.6, "mse": 37.2}}),
                ("analyze", None, 21.4, _sensitivity(generator)),
                ("build", "tensorrt", 48.2, {"repairs": []}),
                ("prove", "tensorrt", 2.9, {}),
            )
        ),
    ]  # fmt: skip
    return whole.model_copy(
        update={
            "command": ["gpuopt", "compile", "resnet50.pt2", "--precision", "int8", "--max-accuracy-drop", "0.5%"],
            "model": whole.model.model_copy(update={"path": "models/resnet50.pt2"}),
            "bundle": "models/resnet50.gpuopt",
            "engines": [engine, session],
            "verification": verification,
            "stages": stages,
            "benchmarks": benchmarks,
            "race": _race(),
            "gates": _gates(benchmarks[0].latency_p99_ms.value),
            "warnings": [],
            "environment": {**whole.environment, "gpus": [{"name": "Example GPU", "compute_capability": "9.0"}]},
            "seconds": 92.4,
        }
    )


def refused() -> Report:
    """The same, with a gate of latency that it does not pass and one that could not be measured."""
    whole = release()
    gates = [
        _gate("latency_p99_ms", "ms", whole.benchmarks[0].latency_p99_ms.value, 0.4, "at most"),
        _gate("device_memory_bytes", "bytes", None, 8_388_608, "at most"),
        *(gate for gate in whole.gates if gate.name != "latency_p99_ms"),
    ]
    error = Failure(
        kind="speed",
        exit_code=13,
        message=f"tensorrt: latency_p99_ms is {gates[0].value:.3f} ms, at most 0.400 ms is demanded (and 1 more gate)",
        hint="See the report's gates. Faster: --precision auto, a smaller batch, a newer GPU.",
        stage="gates",
    )
    return whole.model_copy(
        update={
            "status": "failed",
            "error": error,
            "gates": gates,
            "bundle": "models/resnet50.gpuopt.failed",
            "warnings": ["31 calibration samples are fewer than 32: ranges may be too narrow"],
        }
    )
