"""The report's schema and its JUnit XML."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest

from gpuopt import gates, request
from gpuopt.report import junit
from gpuopt.report.documents import documents
from gpuopt.report.model import Failure, Report
from tests.unit.report.samples import gated, recipe
from tests.unit.report.test_rendering import failing, passing

ROOT = Path(__file__).parents[3]
SCHEMA = ROOT / "schemas/report.schema.json"


@pytest.mark.parametrize("document", ["report", "sweep"])
def test_the_published_schema_is_the_model_s(document: str, request_: pytest.FixtureRequest) -> None:
    path, made = SCHEMA.with_name(f"{document}.schema.json"), request.schema(document)
    if request_.config.getoption("--update-golden"):
        path.write_text(made)
    assert path.read_text() == made


@pytest.fixture
def request_(request: pytest.FixtureRequest) -> pytest.FixtureRequest:
    return request


def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("report", [passing(), failing(), gated(recipe(gates__max_latency_ms={"p99": 1}))])
def test_reports_fit_the_schema_and_come_back_equal(report: Report) -> None:
    text = documents(report)["report.json"]
    validator().validate(json.loads(text))
    assert Report.model_validate_json(text) == report


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"status": "fine"},
        {"unknown": 1},
        {"gates": [{"name": "cosine"}]},
        {"benchmarks": [{"file": "model.onnx"}]},
    ],
)
def test_the_schema_refuses_what_is_no_report(change: dict[str, object]) -> None:
    document = {**json.loads(documents(passing())["report.json"]), **change}
    assert not validator().is_valid(document)


def test_every_model_has_a_schema() -> None:
    for document in ("report", "bench", "profile", "sweep"):
        jsonschema.Draft202012Validator.check_schema(json.loads(request.schema(document)))


def cases(report: Report) -> tuple[ElementTree.Element, dict[str, ElementTree.Element]]:
    suite = ElementTree.fromstring(junit.render(report)).find("testsuite")
    assert suite is not None
    return suite, {f"{case.get('classname')}.{case.get('name')}": case for case in suite.iter("testcase")}


def test_every_gate_is_a_test_case() -> None:
    report = gated(recipe(gates__max_latency_ms={"p99": 1}, gates__max_device_memory="1GiB"))
    suite, found = cases(report)
    assert suite.get("tests") == str(len(found)) == str(len(report.gates) + 1)
    assert (suite.get("failures"), suite.get("errors")) == ("1", "1")
    failed = found["gpuopt.model.onnx.latency_p99_ms"].find("failure")
    assert failed is not None
    assert "4 ms, at most 1 ms" in str(failed.get("message"))
    assert found["gpuopt.run.device_memory_bytes"].find("error") is not None
    assert found["gpuopt.model.onnx.cosine"].find("failure") is None
    assert found["gpuopt.run"].find("error") is None


def test_gates_that_only_warn_pass_with_a_note() -> None:
    suite, found = cases(gated(recipe(gates__max_latency_ms={"p99": 1}, gates__mode="warn")))
    assert (suite.get("failures"), suite.get("errors")) == ("0", "0")
    note = found["gpuopt.model.onnx.latency_p99_ms"].find("system-out")
    assert note is not None
    assert str(note.text).startswith("does not pass, and only warns")


def test_a_run_that_broke_is_an_error_whatever_its_words_hold() -> None:
    error = Failure(kind="data", exit_code=4, message='<b> & "\x00\x1b[31m" ]]>', hint="look", stage="calibrate")
    report = failing().model_copy(update={"error": error, "gates": []})
    suite, found = cases(report)
    said = found["gpuopt.run"].find("error")
    assert said is not None
    assert said.get("message") == '<b> & "[31m" ]]>'
    assert suite.get("errors") == "1"


def releases() -> dict[str, Report]:
    """One that may ship, and one whose accuracy forbids it."""
    good = gated(recipe(gates__max_latency_ms={"p99": 5}, gates__max_engine_size="1GiB"))
    asked = recipe(verify__min_cosine=0.9999)
    verification = {**(passing().verification or {}), "passed": False, "failures": ["model.onnx, output 'logits'"]}
    verification["limits"] = {**verification["limits"], "min_cosine": 0.9999}
    bad = gated(asked, verification=verification)
    error = gates.first_failure(bad.gates)
    assert error is not None
    said = Failure(kind=error.kind, exit_code=error.exit_code, message=error.message, hint=error.hint, stage="gates")
    return {"passing": good, "failing": bad.model_copy(update={"status": "failed", "error": said})}


@pytest.mark.parametrize("name", ["passing", "failing"])
def test_a_release_reads_as_the_golden_one(name: str, request_: pytest.FixtureRequest) -> None:
    written = documents(releases()[name])
    for file, ending in (("report.md", "md"), ("junit.xml", "xml")):
        golden = ROOT / f"tests/golden/release-{name}.{ending}"
        if request_.config.getoption("--update-golden"):
            golden.write_text(written[file])
        assert written[file] == golden.read_text()
