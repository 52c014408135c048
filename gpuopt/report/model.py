"""The report: one document, the same on success and failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gpuopt.errors import StorageError, first_problem
from gpuopt.storage import read_bytes


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Failure(_Part):
    """Why a run failed."""

    kind: str
    exit_code: int
    message: str
    hint: str
    stage: str | None


class StageReport(_Part):
    """One stage: its time when it ran, and what it said; its warnings are in the report's, too."""

    name: str
    target: str | None
    cached: bool
    reason: str
    seconds: float
    facts: dict[str, Any]
    warnings: list[str] = []


class EngineReport(_Part):
    """One deployable file.

    `verified` says that its outputs were compared with the original model's on this machine;
    `built` that it was made but cannot run here. `proof` holds what running it showed: `stages/prove.py`.
    """

    target: str
    file: str
    size_bytes: int
    sha256: str
    status: Literal["verified", "built", "failed"]
    library_version: str
    compute_capabilities: list[str]
    note: str
    proof: dict[str, Any] | None = None


class Estimate(_Part):
    """A measured value with its 95 % interval, or the lowest and highest round; None where there were too few."""

    value: float
    low: float | None
    high: float | None


class BenchmarkReport(_Part):
    """How fast a deployable file is here.

    Attributes:
        target: `tensorrt`, `tensorrt-rtx` or `onnxruntime`.
        file: in the bundle.
        where: the GPU's name, or `CPU` and the processor's.
        library_version: of TensorRT or ONNX Runtime.
        driver_version: the newest CUDA version that the driver supports; empty on the CPU.
        shapes: of the inputs, as `1x3x224x224`.
        batch: samples in one inference.
        includes: what one inference is made of.
        definition: of how it is measured; figures of different definitions are not comparable.
        seconds: that were measured for.
        cuda_graph: whether it ran as one; None on the CPU.
        latency_p50_ms, latency_p90_ms, latency_p95_ms, latency_p99_ms: of single inferences, each waited for.
        throughput_samples_per_second: the next inference enqueued before the last has ended.
        timings_ms: of single inferences, in order, at most 2000, evenly thinned.
        host_to_device_ms, compute_ms, device_to_host_ms: each part alone; None where there are no copies.
        device_memory_bytes: inputs, outputs and scratch memory of one execution; None on the CPU.
        was_steady: whether timings had settled before they counted.
        conditions: clocks, temperature, throttling, load.
    """

    target: str
    file: str
    where: str
    library_version: str
    driver_version: str
    shapes: dict[str, str]
    batch: int
    includes: str
    definition: Literal[1] = 1
    seconds: float
    cuda_graph: bool | None
    latency_p50_ms: Estimate
    latency_p90_ms: Estimate
    latency_p95_ms: Estimate
    latency_p99_ms: Estimate
    throughput_samples_per_second: Estimate
    timings_ms: list[float]
    host_to_device_ms: float | None
    compute_ms: float | None
    device_to_host_ms: float | None
    device_memory_bytes: int | None
    was_steady: bool
    conditions: dict[str, Any]


class GateReport(_Part):
    """One condition of a release.

    Attributes:
        name: stable, with the unit in it: `cosine`, `sqnr_db`, `latency_p99_ms`, ...
        target: the file's that it is about; empty: the whole run's.
        where: the corner and output that decided; empty where there is one value.
        verdict: `unknown` where it could not be measured, which does not pass.
        value: what was found; None: nothing.
        limit: what is demanded.
        margin: room left, in the unit of the value; negative: by so much it failed.
        sense: on which side of the limit a value has to be.
        unit: `ms`, `dB`, `bytes`, `s`, `samples/s`, `share`, `times`, or empty.
        reason: why it is unknown.
        exit_code: of the run if this is the first gate that does not pass.
    """

    name: str
    target: str
    where: str
    verdict: Literal["passed", "failed", "unknown"]
    value: float | None
    limit: float
    margin: float | None
    sense: Literal["at least", "at most"]
    unit: str
    reason: str
    exit_code: int


class ModelReport(_Part):
    """What was compiled."""

    path: str | None
    factory: str | None
    kind: str | None
    sha256: str | None


class Report(_Part):
    """A run of `gpuopt compile` or `gpuopt verify`.

    Attributes:
        bundle: the folder that was written or verified, `MODEL.gpuopt.failed` after a failure; None: none was written.
    """

    schema_version: Literal[1] = 1
    command: list[str]
    gpuopt_version: str
    created: str
    status: Literal["passed", "failed"]
    error: Failure | None
    model: ModelReport
    precision: str
    bundle: str | None
    stages: list[StageReport]
    engines: list[EngineReport]
    verification: dict[str, Any] | None
    race: dict[str, Any] | None = None
    format_race: dict[str, Any] | None = None
    benchmarks: list[BenchmarkReport] = []
    gates: list[GateReport] = []
    gate_mode: Literal["fail", "warn"] = "fail"
    warnings: list[str]
    environment: dict[str, Any]
    seconds: float

    def interface(self) -> dict[str, Any]:
        """`inputs` and `outputs` of the deployed model; empty where no stage said them."""
        return self.facts("layout") or self.facts("export")

    def facts(self, stage: str) -> dict[str, Any]:
        """What a stage said; empty if it did not run."""
        return next((s.facts for s in self.stages if s.name == stage), {})


def read_report(path: Path, hint: str = "Copy the bundle again, or compile again.") -> Report:
    """The report in a file.

    Raises:
        StorageError: it cannot be read, or is no report.
    """
    content = read_bytes(path)
    try:
        return Report.model_validate_json(content)
    except ValidationError as error:
        raise StorageError(f"{path} is no report of this gpuopt: {first_problem(error)}", hint) from error
