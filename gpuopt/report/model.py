"""The report: one document, the same on success and failure."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


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


class ModelReport(_Part):
    """What was compiled."""

    path: str | None
    factory: str | None
    kind: str | None
    sha256: str | None


class Report(_Part):
    """A run of `gpuopt compile` or `gpuopt verify`."""

    schema_version: Literal[1] = 1
    command: list[str]
    gpuopt_version: str
    created: str
    status: Literal["passed", "failed"]
    error: Failure | None
    model: ModelReport
    precision: str
    bundle: str
    stages: list[StageReport]
    engines: list[EngineReport]
    verification: dict[str, Any] | None
    race: dict[str, Any] | None = None
    warnings: list[str]
    environment: dict[str, Any]
    seconds: float

    def facts(self, stage: str) -> dict[str, Any]:
        """What a stage said; empty if it did not run."""
        return next((s.facts for s in self.stages if s.name == stage), {})
