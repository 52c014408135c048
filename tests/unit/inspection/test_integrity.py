"""`gpuopt check`: what a whole bundle says, and each way in which its parts contradict each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuopt import bundle
from gpuopt.errors import EngineError, GpuoptError, StorageError
from gpuopt.inspection.integrity import check
from tests.unit.inspection import bundles


def test_a_whole_bundle(tmp_path: Path) -> None:
    folder = bundles.make(tmp_path / "model.gpuopt")
    found = check(folder)
    assert (found.engines, found.status, found.precision) == ((bundles.ENGINE,), "passed", "int8")
    assert found.files == len(bundle.open_bundle(folder)["files"])
    assert found.signature.state == "none"
    (folder / bundle.SIGNATURE_FILE).write_text("whatever")
    assert check(folder).signature.state == "unchecked"


def test_a_failed_run_s_bundle_says_so(tmp_path: Path) -> None:
    def without_engine(files: Path) -> None:
        for name in (bundles.ENGINE, f"{bundles.ENGINE}.json"):
            (files / name).unlink()

    folder = bundles.make(tmp_path / "model.gpuopt.failed", status="failed", change=without_engine)
    assert (check(folder).status, check(folder).engines) == ("failed", ())


def test_a_folder_of_quantize_has_no_report(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "quantize.json").write_text("{}")
    bundle.write(tmp_path / "out", {"quantize.json": tmp_path / "files" / "quantize.json"}, {}, {})
    assert check(tmp_path / "out").status is None
    bundle.write(tmp_path / "out", {}, {"other.json": "{}"}, {})
    with pytest.raises(StorageError, match=r"it has no report\.json"):
        check(tmp_path / "out")


def remove(name: str) -> Callable[[Path], None]:
    return lambda files: (files / name).unlink()


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(files: Path) -> None:
        (files / name).write_text(json.dumps({**json.loads((files / name).read_text()), **changes}))

    return change


def edit_engine_line(files: Path) -> None:
    report = json.loads((files / "report.json").read_text())
    report["engines"][0]["sha256"] = "0" * 64
    (files / "report.json").write_text(json.dumps(report))


RECORD = f"{bundles.ENGINE}.json"
TARGET = {"target": "tensorrt", "file": bundles.ENGINE, "library_version": "8.5.3.1"}

CONTRADICTIONS: dict[str, tuple[dict[str, Any], type[GpuoptError], str]] = {
    "no record": ({"change": remove(RECORD)}, EngineError, "has no record"),
    "no engine": ({"change": remove(bundles.ENGINE)}, StorageError, "is missing, its record is there"),
    "record of another file": ({"change": edit(RECORD, sha256="0" * 64)}, EngineError, "was changed"),
    "record of another size": ({"change": edit(RECORD, size_bytes=1)}, EngineError, "cut off or replaced"),
    "record of another name": ({"change": edit(RECORD, file="other.engine")}, EngineError, "that of other.engine"),
    "record of another library": (
        {"change": edit(RECORD, library_version="10.0.0")},
        StorageError,
        "library_version of model.tensorrt.engine is 8.5.3.1 in the manifest, 10.0.0 in its record",
    ),
    "damaged record": ({"change": edit(RECORD, more=1)}, EngineError, "is not the record of an engine"),
    "engine of no target": ({"about": {"targets": []}}, StorageError, "is no target of the manifest"),
    "target of no file": (
        {"about": {"targets": [TARGET, {**TARGET, "file": "x.engine"}]}},
        StorageError,
        "x.engine is a target of the manifest and not in its files",
    ),
    "odd targets": ({"about": {"targets": [5]}}, StorageError, "targets cannot be read"),
    "report of another status": ({"about": {"status": "failed"}}, StorageError, "status is failed in the manifest"),
    "report of another precision": ({"about": {"precision": "fp16"}}, StorageError, "precision is fp16"),
    "report of another time": ({"about": {"created": "now"}}, StorageError, "created is now"),
    "report of another engine": ({"change": edit_engine_line}, StorageError, "is not the file that the report"),
    "damaged report": ({"change": edit("report.json", status="maybe")}, StorageError, "is no report of this gpuopt"),
    "no report": ({"change": remove("report.json")}, StorageError, "it has no report.json"),
}


@pytest.mark.parametrize(("made", "kind", "said"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_contradiction_is_an_error_though_every_hash_fits(
    tmp_path: Path, made: dict[str, Any], kind: type[GpuoptError], said: str
) -> None:
    folder = bundles.make(tmp_path / "model.gpuopt", **made)
    bundle.open_bundle(folder)
    with pytest.raises(kind) as caught:
        check(folder)
    assert said in caught.value.message
