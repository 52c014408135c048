"""What the provenance of a compiled bundle says is true of its files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from gpuopt import bundle
from gpuopt.storage import sha256_file
from tests.conftest import Gpuopt
from tests.integration import small

TIMES = ("timestamp", "startedOn", "finishedOn")
DOCUMENTS = ("provenance.cdx.json", "provenance.intoto.json")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    small.save("exported program", folder / "model.pt")
    small.save_data(folder / "calibration.npz")
    return folder


@pytest.fixture(scope="module")
def compiled(project: Path, gpuopt: Gpuopt) -> Path:
    result = gpuopt("compile", project / "model.pt", "-t", "onnxruntime", "-o", project / "one.gpuopt")
    assert result.code == 0, result.stderr
    return project / "one.gpuopt"


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def check(folder: Path) -> None:
    """Both documents are valid, listed, and right about every file that they name."""
    validation = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    assert validation.JsonStrictValidator(SchemaVersion.V1_7).validate_str((folder / DOCUMENTS[0]).read_text()) is None
    manifest = bundle.open_bundle(folder)
    assert set(DOCUMENTS) <= set(manifest["files"])
    named = {c["name"]: c["hashes"][0]["content"] for c in read(folder, DOCUMENTS[0])["components"] if "hashes" in c}
    inside = {name: digest for name, digest in named.items() if (folder / name).exists()}
    assert inside == {name: sha256_file(folder / name) for name in inside}
    about_the_run = {"report.json", "report.md", "report.html", "junit.xml", *DOCUMENTS}
    assert set(manifest["files"]) - about_the_run == set(inside)
    subjects = {s["name"]: s["digest"]["sha256"] for s in read(folder, DOCUMENTS[1])["subject"]}
    assert subjects == {name: sha256_file(folder / name) for name in subjects}
    assert {"model.onnx", "calibration.ranges.json"} <= set(subjects)


def test_a_bundle_says_what_it_is_and_what_it_was_made_from(compiled: Path, project: Path, gpuopt: Gpuopt) -> None:
    check(compiled)
    definition = read(compiled, DOCUMENTS[1])["predicate"]["buildDefinition"]
    digests = {d["name"]: d["digest"]["sha256"] for d in definition["resolvedDependencies"] if "digest" in d}
    assert digests == {name: sha256_file(project / name) for name in ("model.pt", "calibration.npz")}
    packages = {d["name"] for d in definition["resolvedDependencies"] if "uri" in d}
    assert {"torch", "onnx", "numpy"} <= packages
    assert "tensorrt-rtx-cu13" not in packages, "no engine of it was asked for"
    for name in DOCUMENTS:
        assert str(project) not in (compiled / name).read_text()
    assert gpuopt("verify", compiled).code == 0


def test_an_unchanged_run_is_cached_and_differs_in_times_alone(compiled: Path, project: Path, gpuopt: Gpuopt) -> None:
    before = {name: (compiled / name).read_text().splitlines() for name in DOCUMENTS}
    started = time.monotonic()
    result = gpuopt("compile", project / "model.pt", "-t", "onnxruntime", "-o", compiled, "--json")
    assert time.monotonic() - started < 20, "it only looks into the cache"
    assert all(stage["cached"] for stage in result.report()["stages"])
    for name in DOCUMENTS:
        after = (compiled / name).read_text().splitlines()
        different = [new for old, new in zip(before[name], after, strict=True) if old != new]
        assert all(any(f'"{word}"' in line for word in TIMES) for line in different)


def test_a_failed_run_has_no_provenance(project: Path, gpuopt: Gpuopt) -> None:
    arguments = ("-t", "onnxruntime", "--min-cosine", "0.99999999", "-o", project / "bad.gpuopt")
    assert gpuopt("compile", project / "model.pt", *arguments).code == 8
    assert not [path for name in DOCUMENTS for path in project.glob(f"bad.gpuopt*/{name}")]


def test_an_engine_that_is_added_keeps_what_the_compilation_knew(project: Path, gpuopt: Gpuopt, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    small.save("exported program", tmp_path / "model.pt")
    arguments = ("-p", "fp16", "-t", "tensorrt-rtx", "--no-build", "-o", tmp_path / "portable.gpuopt")
    assert gpuopt("compile", tmp_path / "model.pt", *arguments).code == 0
    digest = sha256_file(tmp_path / "model.pt")
    (tmp_path / "model.pt").unlink()
    result = gpuopt("build", tmp_path / "portable.gpuopt", "-t", "tensorrt-rtx")
    assert result.code == 0, result.stderr
    statement = read(tmp_path / "portable.gpuopt", DOCUMENTS[1])
    bundle.open_bundle(tmp_path / "portable.gpuopt")
    definition = statement["predicate"]["buildDefinition"]
    assert definition["buildType"] == "urn:gpuopt:build:v1"
    made = ["model.tensorrt-rtx.engine", "model.tensorrt-rtx.engine.json"]
    assert definition["internalParameters"]["made"] == made
    digests = {d["name"]: d["digest"]["sha256"] for d in definition["resolvedDependencies"] if "digest" in d}
    assert digests["model.pt"] == digest
    assert "model.onnx" in digests, "in FP16 it is what the engine is built from"
    assert {*made, "model.onnx"} <= {subject["name"] for subject in statement["subject"]}
    assert "tensorrt-rtx-cu13" in {d["name"] for d in definition["resolvedDependencies"]}
