"""Gates of real runs: a release that passes, one that is too slow, one that only warns, one that cannot be judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from tests.conftest import Gpuopt
from tests.integration import small

SCHEMA = json.loads((Path(__file__).parents[2] / "schemas/report.schema.json").read_text())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gates")
    small.save("exported program", folder / "model.pt")
    small.save_data(folder / "calibration.npz")
    return folder


@pytest.fixture
def compiled(project: Path, gpuopt: Gpuopt) -> Any:
    def run(*flags: object) -> Any:
        arguments = ("-p", "int8", "-t", "onnxruntime", "--json", "--set", "benchmark.seconds=0.2")
        return gpuopt("compile", project / "model.pt", *arguments, *flags)

    return run


def gates(report: Any) -> dict[str, Any]:
    return {gate["name"]: gate for gate in report["gates"]}


def test_a_release_that_holds(compiled: Any, project: Path) -> None:
    flags = ("--max-latency", "p99=60000ms", "--max-latency", "p50=60000", "--min-throughput", "0.01")
    result = compiled(*flags, "--max-engine-size", "1GiB", "-o", project / "good.gpuopt")
    assert result.code == 0, result.stderr
    report = result.report()
    jsonschema.validate(report, SCHEMA)
    found = gates(report)
    assert {"latency_p50_ms", "latency_p99_ms", "throughput_samples_per_second", "engine_size_bytes"} <= found.keys()
    assert {gate["verdict"] for gate in report["gates"]} == {"passed"}
    (measured,) = report["benchmarks"]
    assert measured["where"].startswith("CPU, ")
    assert len(measured["timings_ms"]) >= 20
    percentiles = [measured[f"latency_p{p}_ms"]["value"] for p in (50, 90, 95, 99)]
    assert percentiles == sorted(percentiles)
    assert found["latency_p99_ms"]["margin"] == pytest.approx(60000 - percentiles[-1])
    suite = ElementTree.parse(project / "good.gpuopt/junit.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("failures"), suite.get("errors")) == ("0", "0")
    assert "## Gates" in (project / "good.gpuopt/report.md").read_text()
    again = compiled(*flags, "--max-engine-size", "1GiB", "-o", project / "good.gpuopt")
    assert all(stage["cached"] for stage in again.report()["stages"])


def test_one_that_is_too_slow_is_not_shipped(compiled: Any, project: Path) -> None:
    result = compiled("--max-latency", "p50=0.000001ms", "-o", project / "slow.gpuopt")
    assert result.code == 13
    report = result.report()
    jsonschema.validate(report, SCHEMA)
    assert report["error"]["stage"] == "gates"
    assert gates(report)["latency_p50_ms"]["verdict"] == "failed"
    assert "gate latency_p50_ms of model.onnx" in result.stderr
    assert not (project / "slow.gpuopt").exists()
    failed = project / "slow.gpuopt.failed"
    suite = ElementTree.parse(failed / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    assert suite.get("failures") == "1"
    assert (failed / "model.onnx").is_file()


def test_one_that_only_warns_ships(compiled: Any, gpuopt: Gpuopt, project: Path) -> None:
    flags = ("--max-latency", "p50=0.000001ms", "--max-device-memory", "1MiB", "--min-cosine", "1")
    result = compiled(*flags, "--gate-mode", "warn", "-o", project / "warned.gpuopt")
    assert result.code == 0, result.stderr
    report = result.report()
    assert report["status"] == "passed"
    assert gates(report)["latency_p50_ms"]["verdict"] == "failed"
    assert gates(report)["device_memory_bytes"]["verdict"] == "unknown"
    told = " ".join(report["warnings"])
    for name in ("latency_p50_ms", "device_memory_bytes", "cosine"):
        assert f"gate {name}" in told
    verified = gpuopt("verify", project / "warned.gpuopt", "--json")
    assert verified.code == 0
    assert any("gate cosine" in line for line in verified.report()["warnings"])
    assert verified.report()["benchmarks"] == []
    assert compiled(*flags, "-o", project / "strict.gpuopt").code == 8


def test_what_cannot_be_judged_does_not_pass(compiled: Any, project: Path) -> None:
    result = compiled("--max-device-memory", "1GiB", "-o", project / "unknown.gpuopt")
    assert result.code == 14
    assert "unknown, no engine was run on a GPU" in result.stderr


def test_what_stands_in_for_an_engine_is_named(compiled: Any, project: Path) -> None:
    flags = ("-t", "tensorrt-rtx", "--no-build", "--max-latency", "p99=60000")
    result = compiled(*flags, "-o", project / "later.gpuopt")
    assert result.code == 0, result.stderr
    said = "no engine runs here: latency and throughput are those of model.onnx in ONNX Runtime on the CPU"
    assert said in result.stderr
    assert said in result.report()["warnings"]


def test_what_auto_ships_is_measured_and_the_others_are_not(compiled: Any, project: Path) -> None:
    flags = ("-p", "auto", "--set", "speed.seconds=0.3", "--max-latency", "p99=60000", "-o", project / "auto.gpuopt")
    result = compiled(*flags)
    assert result.code == 0, result.stderr
    report = result.report()
    jsonschema.validate(report, SCHEMA)
    assert len(report["benchmarks"]) == 1
    assert [stage["name"] for stage in report["stages"]].count("benchmark") == 1
    assert gates(report)["latency_p99_ms"]["verdict"] == "passed"
    again = compiled(*flags).report()
    assert again["benchmarks"] == report["benchmarks"]


def test_a_limit_that_is_none_is_refused(compiled: Any, gpuopt: Gpuopt) -> None:
    for flags in (("--max-latency", "5ms"), ("--max-latency", "p98=5ms"), ("--max-latency", "p99=-1")):
        assert compiled(*flags).code == 2, flags


def test_the_schema_is_printed(gpuopt: Gpuopt) -> None:
    assert json.loads(gpuopt("schema").stdout) == SCHEMA
    assert json.loads(gpuopt("schema", "bench").stdout)["title"] == "BenchReport"
