"""The bundle: whole or not there, and every later change is noticed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuopt import bundle
from gpuopt.errors import StorageError, UsageError
from gpuopt.storage import list_files, sha256_file


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "sources"
    (folder / "stored" / "deep").mkdir(parents=True)
    (folder / "graph").write_bytes(b"onnx")
    (folder / "stored" / "reference.json").write_text("{}")
    (folder / "stored" / "deep" / "a.npz").write_bytes(b"npz")
    return {"model.onnx": folder / "graph", "reference": folder / "stored"}


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model.gpuopt"


@pytest.fixture
def made(sources: dict[str, Path], destination: Path) -> Path:
    bundle.write(destination, sources, {"report.json": '{"é": 1}'}, {"precision": "int8"})
    return destination


FILES = ["model.onnx", "reference/deep/a.npz", "reference/reference.json", "report.json"]


def test_a_bundle_holds_files_folders_documents_and_their_hashes(made: Path) -> None:
    manifest = bundle.open_bundle(made)
    assert manifest == json.loads((made / "manifest.json").read_text())
    assert manifest["precision"] == "int8"
    assert sorted(manifest["files"]) == FILES
    assert manifest["files"] == {name: sha256_file(made / name) for name in FILES}
    assert (made / "report.json").read_text(encoding="utf-8") == '{"é": 1}'
    assert [p.name for p in made.parent.iterdir()] == [made.name]


def test_a_bundle_can_be_moved_and_copied(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "copy")
    assert bundle.open_bundle(tmp_path / "copy") == bundle.open_bundle(made)
    (tmp_path / "link").symlink_to(made)
    assert bundle.open_bundle(tmp_path / "link") == bundle.open_bundle(made)


def test_a_new_bundle_replaces_the_old_one_whole(made: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("x")
    bundle.write(made, {"only": tmp_path / "other"}, {}, {})
    assert sorted(p.name for p in list_files(made)) == ["manifest.json", "only"]
    bundle.open_bundle(made)


def flip(folder: Path) -> None:
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(bytes([content[0] ^ 1]) + content[1:])


def link_in_place(folder: Path) -> None:
    (folder / "model.onnx").rename(folder.parent / "elsewhere")
    (folder / "model.onnx").symlink_to(folder.parent / "elsewhere")


def edit_manifest(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return edit


def without(key: str) -> Callable[[Path], None]:
    return edit_manifest(lambda manifest: {k: v for k, v in manifest.items() if k != key})


TAMPERING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped byte": (flip, "model.onnx changed"),
    "truncated": (lambda f: (f / "reference/deep/a.npz").write_bytes(b"np"), "reference/deep/a.npz changed"),
    "missing": (lambda f: (f / "report.json").unlink(), "report.json is missing"),
    "missing folder": (lambda f: shutil.rmtree(f / "reference"), "reference/deep/a.npz is missing"),
    "extra": (lambda f: (f / "engine.onnx").touch(), "engine.onnx is not in the manifest"),
    "extra in a folder": (lambda f: (f / "reference/b").touch(), "reference/b is not in the manifest"),
    "extra link": (lambda f: (f / "engine.onnx").symlink_to("/etc/hostname"), "engine.onnx is a link"),
    "link in place of a file": (link_in_place, "model.onnx is a link"),
    "linked folder": (lambda f: (f / "more").symlink_to("/etc"), "more is a link"),
    "hash edited": (
        edit_manifest(lambda m: {**m, "files": {**m["files"], "model.onnx": "0" * 64}}),
        "model.onnx changed",
    ),
    "file unlisted": (
        edit_manifest(lambda m: {**m, "files": {k: v for k, v in m["files"].items() if k != "model.onnx"}}),
        "model.onnx is not in the manifest",
    ),
    "listed outside": (
        edit_manifest(lambda m: {**m, "files": {**m["files"], "../secret": "0"}}),
        "../secret is missing",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "is not a gpuopt bundle"),
    "manifest truncated": (lambda f: (f / "manifest.json").write_text('{"files": '), "cannot be read"),
    "manifest binary": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "cannot be read"),
    "manifest a list": (edit_manifest(lambda m: [m]), "cannot be read"),
    "files a number": (edit_manifest(lambda m: {**m, "files": 5}), "cannot be read"),
    "no files": (without("files"), "cannot be read"),
    "no version": (without("manifest_version"), "cannot be read"),
    "newer version": (edit_manifest(lambda m: {**m, "manifest_version": 2}), "manifest version 2"),
}


@pytest.mark.parametrize(("tamper", "said"), TAMPERING.values(), ids=TAMPERING)
def test_tampering_is_noticed(made: Path, tamper: Callable[[Path], Any], said: str) -> None:
    tamper(made)
    with pytest.raises(StorageError) as caught:
        bundle.open_bundle(made)
    assert said in caught.value.message
    assert str(made) in caught.value.message


@pytest.mark.parametrize("opened", [bundle.open_bundle, bundle.open_subject], ids=lambda function: function.__name__)
def test_a_path_that_is_not_there_is_told_so(opened: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"absent: No such file or directory"):
        opened(tmp_path / "absent")


def test_a_new_an_empty_and_a_bundle_folder_are_fit_destinations(made: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in list_files(made)}
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new" / "below", tmp_path / "empty", made):
        bundle.check_destination(folder)
    assert {path: path.read_bytes() for path in list_files(made)} == before
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        {"precious.txt": "x"},
        {"manifest.json": '{"name": "my web app"}', "index.html": "x"},
        {"manifest.json": "not json"},
        {"manifest.json": "[]"},
        {"sub/manifest.json": '{"manifest_version": 1, "files": {}}'},
    ],
)
def test_a_folder_of_another_origin_is_refused_and_left_alone(tmp_path: Path, content: dict[str, str]) -> None:
    folder = tmp_path / "mine"
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with pytest.raises(UsageError, match="holds files that gpuopt did not write"):
        bundle.check_destination(folder)
    assert {str(p.relative_to(folder)): p.read_text() for p in list_files(folder)} == content
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_destination_that_is_a_file_or_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for name in ("file", "link", "dangling"):
        with pytest.raises(UsageError, match="exists and is not a folder"):
            bundle.check_destination(tmp_path / name)


def test_a_destination_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "below" / "out", Path("/proc/gpuopt/out")):
        with pytest.raises(StorageError):
            bundle.check_destination(folder)


@pytest.mark.parametrize("where", ["copy file", "copy folder", "fsync", "rename"])
def test_the_old_bundle_survives_a_full_disk(
    made: Path, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    before = {path: path.read_bytes() for path in list_files(made)}
    real_copy = shutil.copyfile
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_: object, **__: object) -> None:
        raise full

    def copy(source: Path, *arguments: Any, **named: Any) -> Any:
        if where == "copy file" or Path(source).suffix == ".npz":
            raise full
        return real_copy(source, *arguments, **named)

    if where.startswith("copy"):
        monkeypatch.setattr(shutil, "copyfile", copy)
    elif where == "fsync":
        monkeypatch.setattr(os, "fsync", refuse)
    else:
        monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(StorageError, match="No space left") as caught:
        bundle.write(made, {**sources, "new": sources["model.onnx"]}, {"r": "x"}, {})
    monkeypatch.undo()
    assert "Free some space" in caught.value.hint
    assert {path: path.read_bytes() for path in list_files(made)} == before
    assert [p.name for p in made.parent.iterdir()] == [made.name], "nothing half-written may stay"
    bundle.open_bundle(made)


def test_a_source_that_is_gone_is_a_storage_error_and_leaves_nothing(destination: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        bundle.write(destination, {"model.onnx": tmp_path / "absent"}, {}, {})
    assert list(destination.parent.iterdir()) == []
