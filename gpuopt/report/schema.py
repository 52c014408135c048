"""The published JSON Schemas. What the models leave open, since stages write it, has its fields here."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, with_config
from typing_extensions import NotRequired, TypedDict

_CLOSED = ConfigDict(extra="forbid")


@with_config(_CLOSED)
class OutputFigures(TypedDict):
    """One output at one corner against the original model's: `comparison.compare`."""

    graph: NotRequired[str]
    profile: NotRequired[int]
    corner: str
    output: str
    shape: list[int]
    shape_equal: bool
    finite: bool
    cosine: float | None
    sqnr_db: float | None
    agreement: float | None
    max_abs_error: float | None


@with_config(_CLOSED)
class LimitFigures(TypedDict):
    """What outputs had to reach; `batch_tolerance` is the precision's, `BatchInvariance.tolerance` what was allowed."""

    min_cosine: float
    min_sqnr_db: float
    min_agreement: float
    batch_tolerance: float


@with_config(_CLOSED)
class BatchInvariance(TypedDict):
    """Rows of a batch against the same rows alone: `comparison.batch_invariance`."""

    checked: bool
    reason: NotRequired[str]
    batch: NotRequired[int]
    worst_relative_error: NotRequired[float | None]
    tolerance: NotRequired[float]
    lowest_agreement: NotRequired[float]
    failures: NotRequired[list[str]]


@with_config(_CLOSED)
class LayoutKernelFigures(TypedDict):
    """Nodes that ONNX Runtime runs in layouts of its own: `backends/onnxruntime.py`."""

    nchwc: int
    nhwc: int
    reorders: int
    nodes: int


@with_config(_CLOSED)
class Verification(TypedDict):
    """The ONNX graphs in ONNX Runtime: `stages/verify.py`."""

    runtime: str
    reference: str
    passed: bool
    failures: list[str]
    limits: LimitFigures
    outputs: list[OutputFigures]
    batch_invariance: dict[str, BatchInvariance]
    layout_kernels: NotRequired[dict[str, LayoutKernelFigures]]
    warnings: list[str]


@with_config(_CLOSED)
class Coverage(TypedDict):
    """Which precision an engine works in: `backends/tensorrt/inspector.py`."""

    layers: dict[str, int]
    layer_share: dict[str, float]
    time_share: dict[str, float] | None
    reformats: int
    quantizations: int
    overhead_time_share: float | None
    milliseconds: float | None


@with_config(_CLOSED)
class LayerRow(TypedDict):
    """One layer of an engine."""

    name: str
    kind: str
    precision: str
    tactic: str
    onnx_nodes: list[str]
    computes: bool
    milliseconds: float | None


@with_config(_CLOSED)
class Proof(TypedDict):
    """What running an engine showed: `stages/prove.py`."""

    target: str
    file: str
    gpu: str
    io_formats: dict[str, str]
    device_memory_bytes: int
    passed: bool
    failures: list[str]
    warnings: list[str]
    reference: str
    limits: LimitFigures
    outputs: list[OutputFigures]
    batch_invariance: BatchInvariance
    repeats_equal: bool
    coverage: Coverage
    layers: list[LayerRow]


@with_config(_CLOSED)
class RatioFigures(TypedDict):
    """A ratio of times with its 95 % interval."""

    value: float
    low: float
    high: float


@with_config(_CLOSED)
class CandidateRow(TypedDict):
    """One precision in the race; times in milliseconds."""

    name: str
    state: str
    reason: str
    milliseconds: float | None
    lowest: float | None
    highest: float | None
    lowest_sqnr_db: float | None
    back_in_fp16: list[str]


@with_config(_CLOSED)
class RaceTable(TypedDict):
    """Candidates timed in turn: `precision.py`."""

    target: str
    shapes: dict[str, str]
    includes: str
    candidates: list[CandidateRow]
    ratio_to_fp16: dict[str, RatioFigures]
    chosen: str


@with_config(_CLOSED)
class FormatRow(TypedDict):
    """One format of inputs and outputs in the race; times in milliseconds."""

    name: str
    state: str
    reason: str
    formats: dict[str, str]
    as_built: dict[str, str]
    milliseconds: float | None
    lowest: float | None
    highest: float | None


@with_config(_CLOSED)
class FormatTable(TypedDict):
    """Formats of inputs and outputs timed in turn: `io_formats.py`."""

    target: str
    shapes: dict[str, str]
    includes: str
    candidates: list[FormatRow]
    chosen: str
    verdict: str


_LEFT_OPEN: tuple[tuple[str, str, Any], ...] = (
    ("Report", "verification", Verification),
    ("Report", "race", RaceTable),
    ("Report", "format_race", FormatTable),
    ("EngineReport", "proof", Proof),
)
"""Model, field, and what stands there if anything does."""


def json_schema(document: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of `report`, `bench`, `profile` or `sweep`."""
    from gpuopt.bench.report import BenchReport
    from gpuopt.profiling.command import ProfileReport
    from gpuopt.report.model import Report
    from gpuopt.sweep.results import SweepReport

    models: dict[str, type[BaseModel]] = {
        "report": Report,
        "bench": BenchReport,
        "profile": ProfileReport,
        "sweep": SweepReport,
    }
    root = models[document].model_json_schema()
    definitions = root.setdefault("$defs", {})
    if document == "report":
        for owner, field, kind in _LEFT_OPEN:
            found = TypeAdapter(kind).json_schema()
            definitions.update(found.pop("$defs", {}))
            definitions[kind.__name__] = found
            described = root if owner == "Report" else definitions[owner]
            reference = {"$ref": f"#/$defs/{kind.__name__}"}
            described["properties"][field] = {"anyOf": [reference, {"type": "null"}], "default": None}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root}


def rendered(document: str) -> str:
    """The schema as a file."""
    return json.dumps(json_schema(document), indent=2) + "\n"
