"""Where a bundle comes from: both documents against the libraries that define them."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuopt.provenance import cyclonedx, origin, slsa
from gpuopt.provenance.origin import Material, Origin
from gpuopt.recipe import Recipe, resolve
from gpuopt.storage import sha256_file
from tests.unit.report.test_rendering import passing

HOME = "/home/alice/secret"
TIMES = ("timestamp", "startedOn", "finishedOn")


def recipe() -> Recipe:
    """A recipe with a path wherever one can be."""
    return resolve(
        {
            "model": {"path": f"{HOME}/net.pt"},
            "calibrate": {"data": f"{HOME}/images", "ranges": f"{HOME}/old.json"},
            "accuracy": {"max_drop": 0.01, "data": f"{HOME}/test.npz", "labels": f"{HOME}/labels.npy"},
            "build": {"timing_cache": f"{HOME}/timings", "plugins": [f"{HOME}/plugin.so"]},
            "quantize": {"nodes_to_exclude": ["/head/*"]},
            "output": {"directory": f"{HOME}/net.gpuopt"},
        }
    )


def known(**changes: Any) -> Origin:
    report = passing().model_copy(update={"created": "2026-01-02T03:04:05+00:00", "seconds": 12.4})
    report = report.model_copy(update={"model": report.model.model_copy(update={"path": f"{HOME}/net.pt"})})
    report = report.model_copy(update={"bundle": f"{HOME}/net.gpuopt"})
    gpu = {"name": "NVIDIA L4", "compute_capability": "8.9", "driver_version": "13.0", "total_bytes": 24 << 30}
    report = report.model_copy(update={"environment": {**report.environment, "gpus": [gpu]}})
    made = Origin(
        command="compile",
        files={name: f"{number:064x}" for number, name in enumerate(FILES)},
        records={"recipe.yaml": "9" * 64},
        made=set(FILES),
        materials=(
            Material("model", "net.pt", {"sha256": "a" * 64}, 1),
            Material("calibration data", "images", {"dirHash": "b" * 64}, 512),
            Material("evaluation data", "package.data:feeds", {}, 0),
            Material("plugin", "plugin.so", {"sha256": "c" * 64}, 1),
        ),
        packages={"torch": "2.8.0+cpu", "PyYAML": "6.0", "types_x": "1"},
        recipe=recipe(),
        report=report,
    )
    return replace(made, **changes)


FILES = ["model.onnx", "engine.onnx", "model.tensorrt.engine", "calibration.ranges.json", "reference/reference.json"]


def test_the_cyclonedx_document_is_valid() -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    pytest.importorskip("jsonschema")
    from cyclonedx.schema import SchemaVersion

    version = SchemaVersion.from_version(cyclonedx.SPEC_VERSION)
    for command in ("compile", "build"):
        text = cyclonedx.render(known(command=command))
        assert validation.JsonStrictValidator(version).validate_str(text) is None
    bare = known(materials=(), packages={}, report=passing().model_copy(update={"verification": None, "stages": []}))
    assert validation.JsonStrictValidator(version).validate_str(cyclonedx.render(bare)) is None


def test_references_are_unique_and_lead_somewhere() -> None:
    document = json.loads(cyclonedx.render(known()))
    metadata = document["metadata"]
    parts = [*document["components"], *metadata["tools"]["components"], metadata["component"]]
    references = [part["bom-ref"] for part in parts]
    assert len(set(references)) == len(references)
    used = {r for edge in document["dependencies"] for r in (edge["ref"], *edge["dependsOn"])}
    used |= {entry["ref"] for entry in metadata["component"]["modelCard"]["modelParameters"]["datasets"]}
    assert used <= set(references)


def test_the_model_the_data_the_files_and_the_machine_are_named() -> None:
    document = json.loads(cyclonedx.render(known()))
    components = {component["name"]: component for component in document["components"]}
    assert components["net.pt"]["type"] == "machine-learning-model"
    assert components["net.pt"]["hashes"] == [{"alg": "SHA-256", "content": "a" * 64}]
    assert {"name": "gpuopt:dirHash", "value": "b" * 64} in components["images"]["properties"]
    assert components["images"]["type"] == "data"
    assert {*FILES, "recipe.yaml"} <= set(components)
    tools = {tool["name"]: tool["purl"] for tool in document["metadata"]["tools"]["components"]}
    assert tools["torch"] == "pkg:pypi/torch@2.8.0%2Bcpu"
    machine = {entry["name"]: entry["value"] for entry in document["metadata"]["properties"]}
    assert machine["gpuopt:gpu:0:name"] == "NVIDIA L4"
    assert all(name.startswith("gpuopt:") for name in machine)
    edges = {edge["ref"]: edge["dependsOn"] for edge in document["dependencies"]}
    assert edges["file:model.tensorrt.engine"] == ["file:engine.onnx", "material:4"]


def test_purls_are_those_of_the_library() -> None:
    packageurl = pytest.importorskip("packageurl").PackageURL
    for name, version in (("torch", "2.8.0+cpu"), ("PyYAML", "6.0"), ("types_x", "1!2.0rc1")):
        assert packageurl.from_string(origin.purl(name, version)).to_string() == origin.purl(name, version)
        assert origin.purl(name, version) == packageurl("pypi", None, name, version).to_string()


def test_the_statement_is_one_of_in_toto_with_slsa_s_predicate() -> None:
    statement = pytest.importorskip("in_toto_attestation.v1.statement")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor

    text = slsa.render(known())
    statement.Statement.copy_from_pb(json_format.Parse(text, statement_pb2.Statement())).validate()
    document = json.loads(text)
    assert document["predicateType"] == "https://slsa.dev/provenance/v1"
    # Unknown fields are errors here.
    predicate = json_format.ParseDict(document["predicate"], provenance_pb2.Provenance())
    for descriptor in predicate.build_definition.resolved_dependencies:
        ResourceDescriptor.copy_from_pb(descriptor).validate()
        assert descriptor.digest or descriptor.uri, "SLSA wants one of them"
    assert predicate.run_details.metadata.finished_on.ToJsonString() == "2026-01-02T03:04:05Z"
    assert predicate.run_details.metadata.started_on.ToJsonString() == "2026-01-02T03:03:52Z"


def test_what_is_deployed_is_the_subject_and_what_an_engine_was_added_to_a_dependency() -> None:
    document = json.loads(slsa.render(known(command="build", made={"model.tensorrt.engine"})))
    assert [subject["name"] for subject in document["subject"]] == sorted(FILES[:4])
    definition = document["predicate"]["buildDefinition"]
    assert definition["buildType"] == "urn:gpuopt:build:v1"
    assert definition["internalParameters"]["made"] == ["model.tensorrt.engine"]
    names = [dependency["name"] for dependency in definition["resolvedDependencies"]]
    assert names[:4] == ["net.pt", "images", "package.data:feeds", "plugin.so"]
    assert names[4:7] == ["calibration.ranges.json", "engine.onnx", "model.onnx"]


@pytest.mark.parametrize("render", [cyclonedx.render, slsa.render])
def test_equal_runs_differ_in_times_alone(render: Any) -> None:
    one = known()
    later = one.report.model_copy(update={"created": "2027-01-02T03:04:05+00:00", "seconds": 1.0})
    assert render(one) == render(known())
    assert render(one) != render(replace(one, report=later))
    assert _without_times(render(one)) == _without_times(render(replace(one, report=later)))
    changed = render(replace(one, files={**one.files, "model.onnx": "f" * 64}))
    assert _identifier(changed) != _identifier(render(one))


def _without_times(text: str) -> list[str]:
    return [line for line in text.splitlines() if not any(f'"{time}"' in line for time in TIMES)]


def _identifier(text: str) -> str:
    return next(line for line in text.splitlines() if '"serialNumber"' in line or '"invocationId"' in line)


@pytest.mark.parametrize("render", [cyclonedx.render, slsa.render])
def test_neither_document_tells_of_the_machine_s_paths_and_names(render: Any) -> None:
    text = render(known())
    for word in ("alice", "secret", "/home", "net.gpuopt", socket.gethostname()):
        assert word not in text


def test_of_a_recipe_paths_alone_are_shortened() -> None:
    public = origin.public_recipe(recipe())
    assert public["model"]["path"] == "net.pt"
    assert public["calibrate"]["data"] == "images"
    assert public["build"]["plugins"] == ["plugin.so"]
    assert public["quantize"]["nodes_to_exclude"] == ["/head/*"], "the name of a node is no path"
    assert public["output"] == {}


def test_a_file_a_folder_and_code_are_materials(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    for number in range(3):
        np.save(folder / f"{number}.npy", np.zeros((1, 4), np.float32))
    for name in ("labels.npy", "plugin.so", "ranges.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04 model")
    tree = {
        "model": {"path": str(tmp_path / "model.pt")},
        "calibrate": {"data": str(folder), "ranges": str(tmp_path / "ranges.json")},
        "accuracy": {"max_drop": 0.01, "data": "package.data:feeds", "labels": str(tmp_path / "labels.npy")},
        "build": {"plugins": [str(tmp_path / "plugin.so"), "libfound_elsewhere.so"]},
    }
    found = origin.materials_of(resolve(tree), {"model", "data", "evaluation", "metric"})
    assert [(material.role, material.name, material.files) for material in found] == [
        ("model", "model.pt", 1),
        ("calibration data", "samples", 3),
        ("evaluation data", "package.data:feeds", 0),
        ("labels", "labels.npy", 1),
        ("calibration ranges", "ranges.json", 1),
        ("plugin", "plugin.so", 1),
    ]
    assert found[0].digest == {"sha256": sha256_file(tmp_path / "model.pt")}
    kept = json.loads(json.dumps(origin.materials_to_json(found)))
    assert origin.materials_from_manifest({origin.MATERIALS_KEY: kept}) == found
    assert origin.materials_from_manifest({}) == ()
    # FP16 reads no data, whatever lies beside the model.
    assert [material.role for material in origin.materials_of(resolve(tree), {"model"})][:2] == [
        "model",
        "calibration ranges",
    ]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
def test_the_hash_of_a_folder_is_the_one_that_a_shell_finds(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("z", "B", "b/c", "b-c"):
        (tmp_path / name).write_text(name)
    # As in-toto's digest_set.md has it.
    command = "find . -type f | cut -c3- | LC_ALL=C sort | xargs -r sha256sum | sha256sum | cut -f1 -d' '"
    shell = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    hashes = origin.hashes_of({"": tmp_path})
    assert origin.dir_hash({name.removeprefix("/"): digest for name, digest in hashes.items()}) == shell.stdout.strip()
