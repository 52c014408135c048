"""What `gpuopt triton` found or wrote, as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gpuopt.triton.model import Checked, FindingReport, Written


def checked(answer: Checked) -> str:
    """The findings, three lines at most each, and the verdict."""
    errors = sum(finding.severity == "error" for finding in answer.findings)
    verdict = "fits" if answer.passed else "does not fit"
    lines = [*_findings(answer.findings)]
    lines.append(
        f"{answer.config} {verdict} {answer.bundle}: {answer.rules} rules, {errors} errors, "
        f"{len(answer.findings) - errors} warnings"
    )
    return "\n".join(lines)


def written(answer: Written) -> str:
    """What lies where, and the configuration."""
    lines = [f"{answer.repository}/{answer.model}/{answer.version}  {answer.backend}"]
    lines += [f"  {path}" for path in answer.files]
    lines.append(f"{answer.repository}/{answer.model}/config.pbtxt  {answer.config_state}")
    lines += [f"  {line}" for line in answer.config.splitlines() if not line.startswith("#")]
    if answer.ensemble:
        lines.append(f"{answer.repository}/{answer.ensemble}  ensemble")
    lines += _findings(answer.findings)
    return "\n".join(lines)


def _findings(findings: Iterable[FindingReport]) -> Iterator[str]:
    for finding in findings:
        yield f"{finding.severity} {finding.field}: {finding.message}"
        yield f"  {finding.fix}"
