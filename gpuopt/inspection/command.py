"""`gpuopt inspect` without its command line: a path in, what it is out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from gpuopt import bundle, engine_record
from gpuopt.artifact import ENGINE_ONNX_FILE, ONNX_FILE
from gpuopt.errors import GpuoptError, ModelError
from gpuopt.inspection import engines, graphs, home
from gpuopt.inspection.home import Home
from gpuopt.inspection.model import BundleFacts, Inspection
from gpuopt.model_file import ModelKind, detect
from gpuopt.storage import list_files, storage_errors

_Facts = TypeVar("_Facts")


def inspect(path: Path) -> Inspection:
    """Describe a bundle, an engine or an ONNX file; nothing in it is run.

    Raises:
        StorageError: it cannot be read, or the folder is no bundle.
        ModelError: the file is of another kind or truncated, or external data is missing or leaves its folder.
    """
    if path.is_dir():
        return Inspection(kind="bundle", path=home.plain(path), bundle=_bundle(path))
    if engines.is_plan(path) or _is_damaged_engine(path):
        return Inspection(kind="engine", path=home.plain(path), engine=engines.describe(path, home.of_file(path), True))
    _check_is_onnx(path)
    return Inspection(kind="onnx", path=home.plain(path), graph=graphs.describe(path, home.of_file(path), True))


def _is_damaged_engine(path: Path) -> bool:
    """Whether a file that does not begin as an engine is one by its name and its record."""
    return path.suffix in engines.SUFFIXES and engine_record.record_path(path).is_file()


def _check_is_onnx(path: Path) -> None:
    if path.name == bundle.MANIFEST_FILE or path.name.endswith(".engine.json"):
        raise ModelError(
            f"{path} is neither an engine, an ONNX file nor a bundle", "Name the bundle's folder, or the engine itself."
        )
    kind = detect(path)
    if kind is not ModelKind.ONNX:
        raise ModelError(
            f"{path} is no engine, ONNX file or bundle: its kind is {kind.value}",
            "Compile it first, and inspect what 'gpuopt compile' writes.",
        )


def _bundle(folder: Path) -> BundleFacts:
    found = home.of_bundle(folder)
    names = dict(found.manifest["files"])
    problems = [*bundle.differences(folder, names), *found.problems]
    # Links are followed nowhere: `differences` names them.
    present = {str(file.relative_to(folder)): file for file in list_files(folder)}
    top = sorted(name for name in names if "/" not in name and name in present)
    plans = [name for name in top if name.endswith(".engine")]
    described = [_try(lambda path: engines.describe(path, found, False), folder / name, problems) for name in plans]
    drawn = [
        _try(lambda path: graphs.describe(path, found, False), folder / name, problems)
        for name in (ONNX_FILE, ENGINE_ONNX_FILE)
        if name in top
    ]
    with storage_errors("read", folder):
        size = sum(file.stat().st_size for name, file in present.items() if name in names)
    return BundleFacts(
        status=_stated(found, "status"),
        precision=_stated(found, "precision"),
        files=len(names),
        size_bytes=size,
        problems=tuple(dict.fromkeys(map(home.plain, problems))),
        signature=(folder / bundle.SIGNATURE_FILE).is_file(),
        engines=tuple(one for one in described if one is not None),
        graphs=tuple(one for one in drawn if one is not None),
        origin=found.origin(),
    )


def _try(describe: Callable[[Path], _Facts], path: Path, problems: list[str]) -> _Facts | None:
    """One file of a bundle; what is wrong with it does not hide the others."""
    try:
        return describe(path)
    except GpuoptError as error:
        problems.append(error.message)
        return None


def _stated(found: Home, key: str) -> str | None:
    value = found.manifest.get(key)
    return home.plain(value) if isinstance(value, str) else None
