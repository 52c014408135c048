"""What `gpuopt inspect` says of bundles and engines, whole and damaged, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpuopt import bundle
from gpuopt.errors import GpuoptError, ModelError, StorageError
from gpuopt.inspection.command import inspect
from gpuopt.inspection.model import BundleFacts, EngineFacts, Inspection
from tests.unit.inspection import bundles


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bundles.make(tmp_path / "model.gpuopt")


def bundle_of(path: Path) -> BundleFacts:
    found = inspect(path)
    assert (found.kind, found.engine, found.graph) == ("bundle", None, None)
    assert found.bundle is not None
    assert Inspection.model_validate_json(found.model_dump_json()) == found
    return found.bundle


def engine_of(path: Path) -> EngineFacts:
    found = inspect(path)
    assert (found.kind, found.bundle, found.graph) == ("engine", None, None)
    assert found.engine is not None
    return found.engine


def test_a_bundle_and_its_files(folder: Path) -> None:
    found = bundle_of(folder)
    assert (found.status, found.precision, found.problems, found.signature) == ("passed", "int8", (), False)
    assert found.files == len(bundle.open_bundle(folder)["files"])
    assert [engine.file.name for engine in found.engines] == [bundles.ENGINE]
    assert [graph.file.name for graph in found.graphs] == ["model.onnx"]
    assert found.origin.model_path == "/models/a model.onnx"
    assert found.origin.gpus == ("NVIDIA H100",)
    assert found.engines[0].origin is None
    graph = found.graphs[0]
    assert graph.file.matches_manifest
    assert graph.macs_shapes == {"x": "4x16x8x8"}, "the first profile's tuned shapes"
    assert graph.profiles[0]["x"].max == "8x16x8x8"


def test_an_engine_in_its_bundle(folder: Path) -> None:
    found = engine_of(folder / bundles.ENGINE)
    assert (found.file.matches_record, found.file.matches_manifest) == (True, True)
    assert (found.target, found.library_version, found.status) == ("tensorrt", "8.5.3.1", "verified")
    assert [(t.name, t.dtype, t.shape, t.layout) for t in (*found.inputs, *found.outputs)] == [
        ("x", "float16", ("batch", 16, 8, 8), "hwc8"),
        ("y", "float32", ("batch", 16, 8, 8), "chw"),
    ]
    assert found.profiles[0]["x"].opt == "4x16x8x8"
    assert found.coverage is not None
    assert found.coverage.time_share == {"int8": 0.9, "fp16": 0.1}
    assert found.proved_on == "NVIDIA H100"
    assert found.origin is not None
    assert found.origin.gpuopt_version == "0.1.0"


def test_layouts_come_from_the_recipe_where_the_engine_was_not_run(tmp_path: Path) -> None:
    folder = bundles.make(tmp_path / "model.gpuopt", proof=None)
    found = engine_of(folder / bundles.ENGINE)
    assert [t.layout for t in (*found.inputs, *found.outputs)] == ["hwc8", None]
    assert (found.coverage, found.proved_on) == (None, None)


def test_an_engine_alone_and_one_without_its_record(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.plan"
    alone.write_bytes(bundles.PLAN)
    found = engine_of(alone)
    assert (found.record_problem, found.loading.verdict, found.loading.reasons) == (
        "no record", "unknown", ("no record",)
    )  # fmt: skip
    assert (found.file.size_bytes, found.file.matches_record, found.file.matches_manifest) == (64, None, None)
    assert (found.target, found.inputs, found.origin) == (None, (), None)


def test_what_a_proof_said_of_another_file_is_not_told(folder: Path) -> None:
    (folder / bundles.ENGINE).write_bytes(bundles.PLAN + b"!")
    found = engine_of(folder / bundles.ENGINE)
    assert (found.file.matches_record, found.file.matches_manifest) == (False, False)
    assert (found.status, found.coverage) == (None, None)
    assert found.loading.verdict == "no"
    assert "the file was cut off or replaced" in found.loading.reasons[0]


def test_a_damaged_record_and_proof_are_told(folder: Path) -> None:
    (folder / f"{bundles.ENGINE}.json").write_text("{}")
    found = engine_of(folder / bundles.ENGINE)
    assert "is not the record of an engine" in found.record_problem
    assert found.loading.verdict == "unknown"


def test_a_proof_of_another_form_is_left_out(tmp_path: Path) -> None:
    for proof in ({"coverage": {"layers": 1}}, {}, {"coverage": None, "io_formats": 5}):
        folder = bundles.make(tmp_path / "model.gpuopt", proof=proof)
        assert engine_of(folder / bundles.ENGINE).coverage is None


def spoil(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "changed": (spoil("recipe.yaml", b"version: 1"), "recipe.yaml changed"),
    "missing": (lambda f: (f / "model.onnx").unlink(), "model.onnx is missing"),
    "extra": (spoil("extra", b""), "extra is not in the manifest"),
    "link": (lambda f: (f / "extra").symlink_to("/etc/hostname"), "extra is a link"),
    "truncated graph": (lambda f: os.truncate(f / "model.onnx", 100), "is not a whole ONNX file"),
    "report": (spoil("report.json", b"{}"), "is no report of this gpuopt"),
    "reference": (spoil("reference/reference.json", b"{"), "cannot be read"),
    "recipe": (spoil("recipe.yaml", b"nonsense: 1"), "recipe: "),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_bundle_is_described_with_what_is_wrong(
    folder: Path, damage: Callable[[Path], Any], said: str
) -> None:
    damage(folder)
    found = bundle_of(folder)
    assert any(said in problem for problem in found.problems), found.problems
    assert found.engines[0].loading is not None


def test_a_name_that_is_no_text_is_told(folder: Path) -> None:
    (folder / os.fsdecode(b"a\xff")).touch()
    assert "a? is not in the manifest" in bundle_of(folder).problems


def test_a_manifest_of_odd_content_is_described(tmp_path: Path) -> None:
    about = {
        "model": 5,
        "environment": {"gpus": "x", "packages": []},
        "command": None,
        "status": 7,
        "created": "\ud800",
    }
    found = bundle_of(bundles.make(tmp_path / "model.gpuopt", about=about))
    assert found.origin.model_path is None
    assert found.status is None


@pytest.mark.parametrize(
    ("name", "content", "kind", "said"),
    [
        ("empty", b"", ModelError, "is empty"),
        ("text.txt", b"hello", ModelError, "is not a model that gpuopt reads"),
        ("cut.engine", b"?", ModelError, "The file may be truncated"),
        ("manifest.json", b"{}", ModelError, "neither an engine, an ONNX file nor a bundle"),
        ("weights.pt", b"\x80\x02}.", ModelError, "its kind is state dict"),
    ],
)
def test_what_is_none_of_the_three_is_refused(
    tmp_path: Path, name: str, content: bytes, kind: type[GpuoptError], said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(kind) as caught:
        inspect(tmp_path / name)
    assert said in caught.value.message + caught.value.hint


def test_a_truncated_onnx_file_is_refused(folder: Path) -> None:
    os.truncate(folder / "model.onnx", 100)
    with pytest.raises(ModelError):
        inspect(folder / "model.onnx")


def test_what_is_not_there_and_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        inspect(tmp_path / "absent")
    with pytest.raises(StorageError, match="is not a gpuopt bundle"):
        inspect(tmp_path)
