"""The files that a report is written as."""

from __future__ import annotations

from gpuopt.bundle import REPORT_FILE
from gpuopt.report import html, junit, markdown
from gpuopt.report.model import Report


def documents(report: Report) -> dict[str, str]:
    """Content by name: JSON for programs, Markdown and HTML for people, JUnit for CI services."""
    return {
        REPORT_FILE: report.model_dump_json(indent=2) + "\n",
        "report.md": markdown.render(report),
        html.REPORT_HTML_FILE: html.render(report),
        "junit.xml": junit.render(report),
    }
