"""The bundle: everything a machine without PyTorch needs to run, build, verify and trace a model.

model.onnx                    what ONNX Runtime gets
engine.onnx                   what the engines are built from, where that is another graph
model.<target>.engine         serialized engines, each with its record (.json): hash, library, GPU, shapes
calibration.ranges.json       INT8 ranges, readable
reference/                    inputs and the original model's outputs at every profile corner
recipe.yaml                   the resolved recipe
report.html, .md, .json       what happened
manifest.json                 SHA-256 of every file above, tools, machine, command line
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpuopt.artifact import folder_hashes
from gpuopt.errors import StorageError, UsageError
from gpuopt.storage import list_files, publish_folder, scratch_folder, storage_errors, write_json, write_text

MANIFEST_FILE = "manifest.json"
REPORT_FILE = "report.json"
MANIFEST_VERSION = 1


def check_destination(folder: Path) -> None:
    """Refuse an output folder that cannot be written or holds something else than a bundle.

    Raises:
        UsageError: the folder exists and is no bundle.
        StorageError: it cannot be written.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"{folder} exists and is not a folder", "Choose another --output.")
    with storage_errors("write", folder):
        if Path.cwd().is_relative_to(folder.resolve()):
            raise UsageError(f"{folder} is the current folder or above it", "Name a folder of its own with --output.")
        foreign = _foreign_files(folder)
    if foreign:
        raise UsageError(
            f"{folder} holds files that gpuopt did not write: {', '.join(foreign[:3])}",
            "Choose an empty or new folder with --output, or move them away.",
        )
    with scratch_folder(folder.parent, folder.name):
        pass


def remove(folder: Path) -> None:
    """Delete a folder that holds nothing but what gpuopt wrote; leave any other alone."""
    if folder.is_dir() and not _foreign_files(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _foreign_files(folder: Path) -> list[str]:
    """Files that no manifest of ours lists: they would be lost if the folder were replaced."""
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()}
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        if "manifest_version" in manifest:
            present -= {MANIFEST_FILE, *manifest["files"]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    return sorted(present)


def write(destination: Path, files: Mapping[str, Path], documents: Mapping[str, str], about: Mapping[str, Any]) -> None:
    """Put a bundle together beside `destination` and make it appear there in one step.

    Args:
        files: file or folder to copy, by its name in the bundle.
        documents: texts, by name.
        about: further content of the manifest; JSON values.

    Raises:
        StorageError: the disk is full or the folder cannot be written; the old bundle stays whole.
    """
    with scratch_folder(destination.parent, destination.name) as scratch:
        staged = scratch / "bundle"
        with storage_errors("write", destination):
            staged.mkdir()
            for name, source in files.items():
                # Not copytree, whose error of its own hides that the disk is full.
                for path in list_files(source) if source.is_dir() else [source]:
                    copy = staged / name / path.relative_to(source)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)
        for name, text in documents.items():
            write_text(staged / name, text)
        with storage_errors("read", staged):
            hashes = folder_hashes(staged)
        write_json(staged / MANIFEST_FILE, {"manifest_version": MANIFEST_VERSION, **about, "files": hashes})
        publish_folder(staged, destination)


def open_bundle(folder: Path) -> dict[str, Any]:
    """Read a bundle's manifest after checking every file's hash against it.

    Raises:
        StorageError: no bundle, a missing, changed or unlisted file.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise StorageError(
            f"{folder} is not a gpuopt bundle: it has no {MANIFEST_FILE}", "Name a folder that 'gpuopt compile' wrote."
        )
    try:
        manifest = json.loads(path.read_text())
        expected = dict(manifest["files"])
        if manifest["manifest_version"] != MANIFEST_VERSION:
            raise ValueError(f"manifest version {manifest['manifest_version']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} cannot be read: {error}", "Copy the bundle again.") from error
    with storage_errors("read", folder):
        links = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink())
        actual = folder_hashes(folder)
    if links:
        raise StorageError(f"bundle {folder}: {links[0]} is a link", "Copy the bundle again with the files themselves.")
    actual.pop(MANIFEST_FILE, None)
    for name in sorted({*expected, *actual}):
        if expected.get(name) != actual.get(name):
            state = "is missing" if name not in actual else "changed" if name in expected else "is not in the manifest"
            raise StorageError(f"bundle {folder}: {name} {state}", "Copy the bundle again, or compile again.")
    result: dict[str, Any] = manifest
    return result
