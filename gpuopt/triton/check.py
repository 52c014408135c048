"""Every rule over one configuration."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from gpuopt.errors import ConfigurationError, UsageError
from gpuopt.storage import storage_errors
from gpuopt.triton import repository, schema
from gpuopt.triton.repository import CONFIG_FILE, Place
from gpuopt.triton.rules import RULES
from gpuopt.triton.rules import repository as rules
from gpuopt.triton.rules.finding import Finding, Subject
from gpuopt.triton.schema import ModelConfig
from gpuopt.triton.served import Served


def findings(config: ModelConfig, served: Served | None, folder: Path | None) -> list[Finding]:
    """What the rules find, errors first."""
    subject = Subject(config, served, folder)
    found = [finding for rule in RULES for finding in rule(subject)]
    return sorted(found, key=lambda finding: finding.severity)


def of_new_version(config: ModelConfig, served: Served, where: Place, files: Collection[str]) -> list[Finding]:
    """What the rules find in a version that is not yet there, and in the policy once it is.

    Args:
        files: names of what the version will hold.
    """
    subject = Subject(config, served, where.model_folder)
    there = sorted({*repository.versions(where.model_folder), where.version})
    return [
        *rules.name(subject),
        *rules.version_policy(config, there),
        *rules.named_files(subject, where.version, lambda file: file in files),
    ]


def read(path: Path) -> tuple[ModelConfig, Path | None]:
    """A configuration, and the model's folder that it lies in.

    Args:
        path: a `config.pbtxt`, a model's folder, or a configuration under another name, alone or in `configs/`.

    Raises:
        UsageError: there is none.
        ConfigurationError: it cannot be read as one.
    """
    file = path / CONFIG_FILE if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{path} holds no model configuration", f"Name a model's folder or its {CONFIG_FILE}.")
    with storage_errors("read", file):
        config = schema.parse(file.read_text(encoding="utf-8", errors="replace"), str(file))
    file = file.absolute()
    if file.name == CONFIG_FILE:
        return config, file.parent
    return config, file.parent.parent if file.parent.name == "configs" else None


def demand(found: list[Finding], what: str) -> None:
    """Refuse a configuration with errors.

    Raises:
        ConfigurationError: names the first.
    """
    wrong = [finding for finding in found if finding.severity == "error"]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ConfigurationError(f"{what}: {wrong[0].field}: {wrong[0].message}{more}", wrong[0].fix)
