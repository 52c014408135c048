"""`gpuopt build` on a bundle made elsewhere: what it needs, what it keeps, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpuopt import bundle
from tests.conftest import Gpuopt, python_path
from tests.integration import small

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    small.save("exported program", folder / "model.pt")
    small.save_data(folder / "calibration.npz", 4)
    return folder


@pytest.fixture
def without(tmp_path: Path) -> Any:
    """The environment of a machine without a module."""

    def make(module: str) -> dict[str, str]:
        (tmp_path / "sitecustomize.py").write_text(
            "import importlib.util, sys\n"
            "found = importlib.util.find_spec\n"
            f"importlib.util.find_spec = lambda name, *a: None if name == '{module}' else found(name, *a)\n"
            f"sys.modules['{module}'] = None\n"
        )
        return {"PYTHONPATH": python_path(tmp_path)}

    return make


def test_an_engine_is_built_without_pytorch_and_onnx_runtime(gpuopt: Gpuopt, project: Path, without: Any) -> None:
    folder = project / "portable.gpuopt"
    arguments = ("-p", "fp16", "-t", "tensorrt-rtx", "--no-build", "-o", folder)
    made = gpuopt("compile", project / "model.pt", *arguments)
    assert made.code == 0, made.stderr
    assert f"none yet: 'gpuopt build {folder}' on the GPU's machine makes it from model.onnx" in made.stdout
    for module in ("onnxruntime", "torch"):
        env = without(module)
        result = gpuopt("build", folder, "-t", "tensorrt-rtx", "--no-cache", "--json", env=env)
        assert result.code == 0, result.stderr
        assert "tensorrt-rtx" in {engine["target"] for engine in result.report()["engines"]}
    bundle.open_bundle(folder)


def test_what_the_compilation_found_stays_in_the_report(gpuopt: Gpuopt, project: Path) -> None:
    folder = project / "kept.gpuopt"
    compiled = gpuopt("compile", project / "model.pt", "-t", "tensorrt-rtx", "-o", folder, "--json").report()
    few = [warning for warning in compiled["warnings"] if "sample" in warning]
    assert few, "four samples are too few"
    # What this machine cannot make: a race, an engine for another target, and a warning of the engine's old build.
    manifest = json.loads((folder / "manifest.json").read_text())
    report = json.loads((folder / "report.json").read_text())
    report["race"] = {"target": "tensorrt", "chosen": "int8", "candidates": [], "shapes": {}, "includes": "compute"}
    report["warnings"].append("the old build was slow")
    next(s for s in report["stages"] if s["name"] == "build")["warnings"].append("the old build was slow")
    other = {**report["engines"][0], "target": "tensorrt", "file": "model.tensorrt.engine"}
    report["engines"].append(other)
    stays = "the other engine's build was slow"
    report["warnings"].append(stays)
    old = next(s for s in report["stages"] if s["name"] == "build")
    report["stages"].append({**old, "target": "tensorrt", "warnings": [stays]})
    files = {name: folder / name for name in manifest["files"] if not name.startswith("report.")}
    for name in ("model.tensorrt.engine", "model.tensorrt.timing", "model.tensorrt-rtx.timing"):
        files[name] = folder / report["engines"][0]["file"]
    about = {key: value for key, value in manifest.items() if key not in ("files", "manifest_version")}
    bundle.write(folder, files, {"report.json": json.dumps(report), "report.md": "", "report.html": ""}, about)

    result = gpuopt("build", folder, "-t", "tensorrt-rtx", "--json")
    assert result.code == 0, result.stderr
    built = result.report()
    assert {*few, stays} <= set(built["warnings"])
    assert built["race"] is None
    assert built["warnings"].count("the old build was slow") == 0
    assert {engine["target"] for engine in built["engines"]} == {"tensorrt-rtx", "tensorrt", "onnxruntime"}
    assert sorted(s["target"] for s in built["stages"] if s["name"] == "build") == ["tensorrt", "tensorrt-rtx"]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["build"]["target"] == ["tensorrt-rtx", "tensorrt", "onnxruntime"]
    assert (folder / "model.tensorrt.engine").is_file()
    # Timings go with the engine that they are of.
    assert [path.name for path in folder.glob("*.timing")] == ["model.tensorrt.timing"]
    assert built["created"] in (folder / "report.html").read_text()


def test_a_graph_for_tensorrt_8_is_refused_by_tensorrt_rtx(gpuopt: Gpuopt, project: Path) -> None:
    folder = project / "legacy.gpuopt"
    arguments = ("-p", "fp16", "-t", "tensorrt", "--no-build", "--set", "build.legacy=true", "-o", folder)
    assert gpuopt("compile", project / "model.pt", *arguments).code == 0
    result = gpuopt("build", folder, "-t", "tensorrt-rtx")
    assert result.code == 2
    assert "computes in FP32" in result.stderr
    assert "Compile again without build.legacy" in result.stderr


def test_gates_are_judged_again_where_the_engine_is_built(gpuopt: Gpuopt, project: Path) -> None:
    folder = project / "gated.gpuopt"
    arguments = ("-p", "fp16", "-t", "tensorrt-rtx", "--no-build", "-o", folder)
    assert gpuopt("compile", project / "model.pt", *arguments).code == 0
    before = (folder / "manifest.json").read_bytes()
    size = ("--set", "gates.max_engine_size=1KiB")
    refused = gpuopt("build", folder, "-t", "tensorrt-rtx", "--json", *size)
    assert refused.code == 14, refused.stderr
    assert refused.report()["error"]["stage"] == "gates"
    assert (folder / "manifest.json").read_bytes() == before
    failed = project / "gated.gpuopt.failed"
    assert 'failures="1"' in (failed / "junit.xml").read_text()
    warned = gpuopt("build", folder, "-t", "tensorrt-rtx", "--json", *size, "--set", "gates.mode=warn")
    assert warned.code == 0, warned.stderr
    report = warned.report()
    assert any("gate engine_size_bytes" in line for line in report["warnings"])
    assert {gate["name"]: gate["verdict"] for gate in report["gates"]}["engine_size_bytes"] == "failed"
    assert not failed.exists()
    once_more = gpuopt("build", folder, "-t", "tensorrt-rtx", "--json", "--set", "gates.max_engine_size=1GiB")
    assert not any("gate engine_size_bytes" in line for line in once_more.report()["warnings"])
    # The engine lies in the cache by now, and was built without.
    lacking = gpuopt("build", folder, "-t", "tensorrt-rtx", "--set", "build.timing_cache=t.bin")
    assert (lacking.code, "TensorRT-RTX has no build.timing_cache" in lacking.stderr) == (2, True)
    assert gpuopt("check", folder).code == 0
    verified = gpuopt("verify", folder, "--json").report()
    assert {gate["name"] for gate in verified["gates"]} >= {"cosine", "sqnr_db", "verification_failures"}
    assert "engine_size_bytes" not in {gate["name"] for gate in verified["gates"]}


def test_a_timing_cache_in_the_output_is_refused(gpuopt: Gpuopt, project: Path) -> None:
    folder = project / "inside.gpuopt"
    arguments = ("-p", "fp16", "-t", "tensorrt", "--no-build", "-o", folder)
    result = gpuopt("compile", project / "model.pt", *arguments, "--timing-cache", folder / "a.timing")
    assert (result.code, "a.timing lies in" in result.stderr) == (2, True), result.stderr
    assert not folder.exists()
