"""Writing into a model repository: a version appears whole or not at all, and the others are not touched.

REPOSITORY/MODEL/config.pbtxt
REPOSITORY/MODEL/VERSION/model.plan          or model.onnx, model.pt
REPOSITORY/MODEL/VERSION/model.plan.json     the engine's record
REPOSITORY/MODEL/warmup/FILE                 inputs of warm-up requests
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpuopt.errors import ConfigurationError, UsageError
from gpuopt.storage import publish_folder, scratch_folder, storage_errors, write_bytes, write_text

CONFIG_FILE = "config.pbtxt"
WARM_UP_FOLDER = "warmup"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class Place:
    """Where a version goes."""

    repository: Path
    model: str
    version: int

    @property
    def model_folder(self) -> Path:
        return self.repository / self.model

    @property
    def version_folder(self) -> Path:
        return self.model_folder / str(self.version)

    @property
    def config_file(self) -> Path:
        return self.model_folder / CONFIG_FILE


@dataclass(frozen=True)
class Content:
    """What is written.

    Attributes:
        config: text of `config.pbtxt`.
        files: what lies in the version's folder: a file to copy by the name it gets.
        documents: texts there, by name.
        warm_up: contents of warm-up inputs, by name.
    """

    config: str
    files: Mapping[str, Path]
    documents: Mapping[str, str]
    warm_up: Mapping[str, bytes]


def place(repository: Path, model: str, version: int | None) -> Place:
    """Where a new version of a model goes: the next number if none is given.

    Raises:
        UsageError: a name that Triton or the file system would not take, or the version is there already.
        StorageError: the repository cannot be read.
    """
    check_name(model, "--name sets it.")
    if repository.exists() and not repository.is_dir():
        raise UsageError(f"{repository} is not a folder", "Name a model repository with --output.")
    there = versions(repository / model)
    chosen = version if version is not None else max(there, default=0) + 1
    if chosen in there:
        raise UsageError(
            f"{repository / model} has version {chosen}",
            f"Leave --version out to write {max(there) + 1}, or remove it.",
        )
    return Place(repository, model, chosen)


def check_name(model: str, hint: str = "") -> None:
    """Refuse a name that is no folder of a repository.

    Raises:
        UsageError: Triton or the file system would not take it.
    """
    if not _NAME.fullmatch(model):
        raise UsageError(f"'{model}' is no model's name", f"Use letters, digits and _ . + - ; {hint}".rstrip(" ;"))


def versions(model_folder: Path) -> list[int]:
    """Versions of a model, sorted: folders whose names are numbers that do not begin with 0, as Triton takes them."""
    if not model_folder.is_dir():
        return []
    with storage_errors("read", model_folder):
        return sorted(int(p.name) for p in model_folder.iterdir() if p.is_dir() and _VERSION.fullmatch(p.name))


def write(where: Place, content: Content, replace_config: bool) -> None:
    """Add a version; the model's configuration is written with its first one, or where that is asked for.

    Everything is put together in a hidden folder beside the repository and moved into it by one rename, or by one
    exchange of the model's folder where its configuration changes. Other versions are the same files afterwards.

    Raises:
        ConfigurationError: the model has another configuration, and it is not to be replaced.
        StorageError: the disk is full or a folder cannot be written.
    """
    changes = _changes(where, content)
    if changes and not replace_config:
        raise ConfigurationError(
            f"{where.config_file} is another configuration than the one asked for: {changes}",
            "--keep-config adds the version and leaves it as it is; --replace-config writes it anew.",
        )
    with storage_errors("write", where.repository):
        where.repository.mkdir(parents=True, exist_ok=True)
    with scratch_folder(_beside(where.repository), where.repository.name) as scratch:
        staged = scratch / where.model
        version = staged / str(where.version)
        _fill(version, content, where)
        if where.model_folder.is_dir() and not changes:
            publish_folder(version, where.version_folder, replace=False)
            return
        write_text(staged / CONFIG_FILE, content.config)
        for name, data in content.warm_up.items():
            write_bytes(staged / WARM_UP_FOLDER / name, data)
        present = where.model_folder.is_dir()
        if present:
            with storage_errors("read", where.model_folder):
                _link_rest(where.model_folder, staged)
        publish_folder(staged, where.model_folder, replace=present)


def add_version(where: Place, content: Content) -> None:
    """Add a version under the configuration that is there; that of `content` and its warm-up inputs are not written.

    Raises:
        StorageError: as `write`.
    """
    with scratch_folder(_beside(where.repository), where.repository.name) as scratch:
        version = scratch / str(where.version)
        _fill(version, content, where)
        publish_folder(version, where.version_folder, replace=False)


def _fill(version: Path, content: Content, where: Place) -> None:
    with storage_errors("write", where.version_folder):
        version.mkdir(parents=True)
        for name, source in content.files.items():
            shutil.copyfile(source, version / name)
    for name, text in content.documents.items():
        write_text(version / name, text)


def has_model(folder: Path, config: str) -> bool:
    """Whether a model without a file is there with this configuration already.

    Raises:
        UsageError: there is such a model with another configuration.
        StorageError: it cannot be read.
    """
    path = folder / CONFIG_FILE
    if path.is_file():
        with storage_errors("read", path):
            if path.read_text(encoding="utf-8", errors="replace") == config:
                return True
    if folder.exists():
        raise UsageError(f"{folder} exists", "Choose another --ensemble, or remove it.")
    return False


def write_model(folder: Path, config: str) -> None:
    """Write a model that has a configuration and no file, as an ensemble: its version 1 is an empty folder.

    Raises:
        UsageError, StorageError: as `has_model`; it cannot be written.
    """
    if has_model(folder, config):
        return
    repository = folder.parent
    with storage_errors("write", repository):
        repository.mkdir(parents=True, exist_ok=True)
    with scratch_folder(_beside(repository), repository.name) as scratch:
        staged = scratch / folder.name
        with storage_errors("write", folder):
            (staged / "1").mkdir(parents=True)
        write_text(staged / CONFIG_FILE, config)
        publish_folder(staged, folder, replace=False)


def _changes(where: Place, content: Content) -> str:
    """What an existing model has otherwise: its first difference; empty where there is none or no model."""
    if not where.model_folder.is_dir():
        return ""
    with storage_errors("read", where.model_folder):
        if not where.config_file.is_file():
            return f"it has no {CONFIG_FILE}"
        present = where.config_file.read_text(encoding="utf-8", errors="replace")
        if present != content.config:
            for old, new in zip(present.splitlines(), content.config.splitlines(), strict=False):
                if old != new:
                    return f"it has '{old.strip()}' where '{new.strip()}' would stand"
            return "it is longer or shorter"
        for name, data in content.warm_up.items():
            path = where.model_folder / WARM_UP_FOLDER / name
            if not path.is_file() or path.read_bytes() != data:
                return f"{WARM_UP_FOLDER}/{name} differs"
    return ""


def _link_rest(present: Path, staged: Path) -> None:
    """Everything of the model that is not written anew, as further names of the same files."""
    for path in sorted(present.rglob("*")):
        copy = staged / path.relative_to(present)
        if path.is_symlink():
            if os.path.lexists(copy):
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path.readlink())
        elif path.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
        elif not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, copy)


def _beside(repository: Path) -> Path:
    """A folder on the repository's file system; not the repository itself, where Triton would take it for a model."""
    parent = repository.absolute().parent
    if os.access(parent, os.W_OK) and parent.stat().st_dev == repository.stat().st_dev:
        return parent
    return repository
