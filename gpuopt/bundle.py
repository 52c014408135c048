"""The bundle: everything a machine without PyTorch needs to run, build, verify and trace a model.

model.onnx                    what ONNX Runtime gets
engine.onnx                   what the engines are built from, where that is another graph
model.<target>.engine         serialized engines, each with its record (.json): hash, library, GPU, shapes
model.tensorrt.timing         a timing cache that gives the engine again, if it is one of several attempts or built so
model.tensorrt.calibration    the ranges of TensorRT's own calibrator
calibration.ranges.json       INT8 ranges, readable
reference/                    inputs and the original model's outputs at every profile corner
recipe.yaml                   the resolved recipe
report.html, .md, .json       what happened
junit.xml                     its gates, for CI services
provenance.cdx.json           where it comes from: CycloneDX
provenance.intoto.json        the same as an in-toto statement: SLSA provenance
manifest.json                 SHA-256 of every file above, tools, machine, command line
manifest.json.minisig         a signature over the manifest, if whoever ships the bundle made one; see gpuopt.signature
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpuopt import time_limit
from gpuopt.artifact import folder_hashes
from gpuopt.errors import StorageError, UsageError, one_line
from gpuopt.storage import (
    check_exists,
    list_files,
    publish_folder,
    read_bytes,
    scratch_folder,
    storage_errors,
    write_json,
    write_text,
)

MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.json.minisig"
"""Beside the manifest and in no hash; a bundle that is written anew is without it."""

REPORT_FILE = "report.json"
MANIFEST_VERSION = 1

_AGAIN = "Copy the bundle again with the files themselves, or compile again."


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


def check_timing_cache(folder: Path, file: str | None) -> None:
    """Refuse a timing cache inside a bundle: builds add to it, and the bundle is replaced as a whole.

    Raises:
        UsageError: it lies in the folder.
    """
    if file is not None and Path(file).resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"the timing cache {file} lies in {folder}, and builds add to it", "Copy it elsewhere and name the copy."
        )


def remove(folder: Path) -> None:
    """Delete a folder that holds nothing but what gpuopt wrote; leave any other alone."""
    if folder.is_dir() and not _foreign_files(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _foreign_files(folder: Path) -> list[str]:
    """Files that no manifest of ours lists: they would be lost if the folder were replaced."""
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()}
    try:
        manifest = json.loads(read_bytes(folder / MANIFEST_FILE))
        if "manifest_version" in manifest:
            present -= {MANIFEST_FILE, SIGNATURE_FILE, *manifest["files"]}
    except (StorageError, ValueError, TypeError, KeyError, RecursionError):
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
    # All work is done by then, or the time is up and this is its report.
    time_limit.lift()
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


def open_bundle(folder: Path, public_key: str | None = None) -> dict[str, Any]:
    """Read a bundle's manifest after checking every file's hash against it.

    Args:
        public_key: of whom the manifest has to be signed by, as `signature.verify` takes it; None: no matter.

    Raises:
        SignatureError: it is not; before anything of the bundle is believed.
        StorageError: no bundle, a missing, changed or unlisted file.
    """
    manifest = read_manifest(folder, public_key)
    if found := differences(folder, manifest["files"]):
        raise StorageError(f"bundle {folder}: {found[0]}", _AGAIN)
    return manifest


def open_subject(path: Path, public_key: str | None = None) -> None:
    """`open_bundle` for a bundle, and for the one that a file lies in where it has to be signed.

    Raises:
        SignatureError, StorageError: as `open_bundle`; nothing is there, or a file that has to be signed lies in no
            bundle.
    """
    check_exists(path)
    if path.is_dir():
        open_bundle(path, public_key)
    elif public_key is not None:
        open_bundle(path.parent, public_key)


def read_manifest(folder: Path, public_key: str | None = None) -> dict[str, Any]:
    """A bundle's manifest, its files not looked at; `open_bundle` without `differences`.

    Raises:
        SignatureError: `public_key` is given, and it is not signed with that key.
        StorageError: there is no such folder, no manifest in it, or it cannot be read.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        check_exists(folder)
        raise StorageError(
            f"{folder} is not a gpuopt bundle: it has no {MANIFEST_FILE}", "Name a folder that 'gpuopt compile' wrote."
        )
    content = read_bytes(path)
    if public_key is not None:
        from gpuopt import signature

        # The bytes that were checked are the bytes that are read: the file may change in between.
        signature.verify(content, folder / SIGNATURE_FILE, public_key)
    try:
        manifest: dict[str, Any] = json.loads(content)
        if not isinstance(manifest["files"], dict):
            raise ValueError("its files are no mapping")
        if not all(isinstance(value, str) for value in manifest["files"].values()):
            raise ValueError("a hash is not text")
        if manifest["manifest_version"] != MANIFEST_VERSION:
            raise ValueError(f"manifest version {manifest['manifest_version']}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StorageError(f"{path} cannot be read: {one_line(error)}", "Copy the bundle again.") from error
    return manifest


def differences(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """What is otherwise than the manifest says, one line each: links, missing, changed and unlisted files.

    Args:
        expected: SHA-256 by name.
    """
    with storage_errors("read", folder):
        links = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink())
        actual = folder_hashes(folder)
    for name in (MANIFEST_FILE, SIGNATURE_FILE):
        actual.pop(name, None)
    found = [f"{name} is a link" for name in links]
    for name in sorted({*expected, *actual} - {*links}):
        if expected.get(name) != actual.get(name):
            state = "is missing" if name not in actual else "changed" if name in expected else "is not in the manifest"
            found.append(f"{name} {state}")
    return found
