"""The gates as JUnit XML: a test case each, so that a CI service shows them as tests."""

from __future__ import annotations

from xml.etree import ElementTree

from gpuopt import gates
from gpuopt.report.model import GateReport, Report


def render(report: Report) -> str:
    """A pure function of the report.

    A gate that failed is a failure, one that could not be measured an error. With `gate_mode` warn both are passed test
    cases with a note. What ended the run before its gates is an error of the test case `run`.
    """
    strict = report.gate_mode == "fail"
    broken = report.error is not None and not (strict and _is_of_a_gate(report))
    failed = [gate for gate in report.gates if strict and gate.verdict == "failed"]
    unknown = [gate for gate in report.gates if strict and gate.verdict == "unknown"]
    suite = ElementTree.Element(
        "testsuite",
        name="gpuopt",
        tests=str(len(report.gates) + 1),
        failures=str(len(failed)),
        errors=str(len(unknown) + broken),
        skipped="0",
        time=f"{report.seconds:.3f}",
        timestamp=report.created,
    )
    run = ElementTree.SubElement(suite, "testcase", classname="gpuopt", name="run", time=f"{report.seconds:.3f}")
    if broken and report.error is not None:
        where = f" in {report.error.stage}" if report.error.stage else ""
        said = ElementTree.SubElement(run, "error", type=report.error.kind, message=_clean(report.error.message))
        said.text = _clean(f"exit code {report.error.exit_code}{where}\n{report.error.hint}")
    for gate in report.gates:
        _case(suite, gate, strict)
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _is_of_a_gate(report: Report) -> bool:
    return report.error is not None and any(
        gate.verdict != "passed" and gate.exit_code == report.error.exit_code for gate in report.gates
    )


def _case(suite: ElementTree.Element, gate: GateReport, strict: bool) -> None:
    classname = _clean(f"gpuopt.{gate.target or 'run'}")
    case = ElementTree.SubElement(suite, "testcase", classname=classname, name=gate.name, time="0")
    line = _clean(gates.describe(gate))
    if gate.verdict == "passed":
        ElementTree.SubElement(case, "system-out").text = line
    elif strict:
        kind = "failure" if gate.verdict == "failed" else "error"
        ElementTree.SubElement(case, kind, type=gate.name, message=line).text = line
    else:
        ElementTree.SubElement(case, "system-out").text = f"does not pass, and only warns: {line}"


def _clean(text: str) -> str:
    """Text without characters that XML 1.0 has no way to write."""
    return "".join(c for c in text if c in "\t\n" or " " <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" or c > "\uffff")
