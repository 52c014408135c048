"""What `gpuopt triton` answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FindingReport(_Part):
    """A rule that does not hold; `severity` as in `rules.finding.Finding`."""

    rule: str
    severity: Literal["error", "warning"]
    field: str
    message: str
    fix: str


class Checked(_Part):
    """`gpuopt triton --check`.

    Attributes:
        passed: whether no rule found an error.
        rules: how many were asked.
    """

    schema_version: Literal[1] = 1
    command: list[str]
    bundle: str
    config: str
    passed: bool
    rules: int
    findings: list[FindingReport]


class Written(_Part):
    """`gpuopt triton`.

    Attributes:
        files: SHA-256 of what was added, by path in the repository.
        config_state: `written`, `unchanged` or `kept` (`--keep-config`), or `replaced`.
        config: its text.
        ensemble: the name of the ensemble that was written, too; empty: none.
    """

    schema_version: Literal[1] = 1
    command: list[str]
    bundle: str
    repository: str
    model: str
    version: int
    backend: str
    files: dict[str, str]
    config_state: Literal["written", "unchanged", "kept", "replaced"]
    config: str
    ensemble: str
    findings: list[FindingReport]
    warnings: list[str]
