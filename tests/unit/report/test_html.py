"""`report.html` as text: everything is escaped, nothing is fetched, and what is not there is left out."""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from gpuopt.report import blocks, figures, html
from gpuopt.report.model import Report
from tests.unit.report import examples
from tests.unit.report.test_rendering import budgeted, failing, passing

pytest.importorskip("matplotlib")

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>{{ 7 * 7 }}$\\frac{a}$\x00\u202e&amp;"
REPORTS = {
    "release": examples.release,
    "refused": examples.refused,
    "passing": passing,
    "budgeted": budgeted,
    "failing": failing,
}
VOID = {"meta", "link", "br", "img", "input", "hr"}


@functools.cache
def rendered(name: str) -> str:
    return html.render(REPORTS[name]())


class Page(HTMLParser):
    """A page taken apart; elements that are not closed where they ought to be are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of <{tag}> stands twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def _hostile(value: Any) -> Any:
    """The same with every text in it hostile; keys stay, for they are the program's."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, dict):
        return {key: _hostile(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_hostile(one) for one in value]
    return value


def hostile() -> Report:
    """The full report with hostile text wherever a text can come from a model, a file or a machine."""
    whole = examples.refused()
    proof = _hostile(whole.engines[0].proof)
    proof["io_formats"] = {HOSTILE: HOSTILE}
    proof["coverage"]["layers"] = {HOSTILE: 3}
    assert whole.error is not None
    assert whole.race is not None
    return whole.model_copy(
        update={
            "command": _hostile(whole.command),
            "gpuopt_version": HOSTILE,
            "created": HOSTILE,
            "error": whole.error.model_copy(update={"message": HOSTILE, "hint": HOSTILE, "stage": HOSTILE}),
            "model": whole.model.model_copy(update={"path": f"models/{HOSTILE.replace('/', '')}", "kind": HOSTILE}),
            "precision": HOSTILE,
            "bundle": HOSTILE,
            "stages": [
                stage.model_copy(
                    update={"facts": _hostile(stage.facts), "reason": HOSTILE, "warnings": [HOSTILE], "target": HOSTILE}
                )
                for stage in whole.stages
            ],
            "engines": [
                engine.model_copy(
                    update={
                        "target": HOSTILE, "file": HOSTILE, "library_version": HOSTILE, "note": HOSTILE,
                        "compute_capabilities": [HOSTILE], "sha256": HOSTILE, "proof": proof,
                    }
                )
                for engine in whole.engines
            ],
            "verification": _hostile(whole.verification),
            "race": {**_hostile(whole.race), "shapes": {HOSTILE: HOSTILE}},
            "benchmarks": [
                one.model_copy(
                    update={
                        "target": HOSTILE, "file": HOSTILE, "where": HOSTILE, "shapes": {HOSTILE: HOSTILE},
                        "includes": HOSTILE, "conditions": {"held_back": {HOSTILE: 0.5}, "note": HOSTILE},
                    }
                )
                for one in whole.benchmarks
            ],
            "gates": [
                gate.model_copy(update={"name": HOSTILE, "target": HOSTILE, "where": HOSTILE, "reason": HOSTILE})
                for gate in whole.gates
            ],
            "warnings": [HOSTILE],
            "environment": {
                "python": HOSTILE, "platform": HOSTILE, "packages": {HOSTILE: HOSTILE},
                "gpus": [{"name": HOSTILE, "compute_capability": HOSTILE}],
            },
        }
    )  # fmt: skip


def test_text_from_outside_stays_text() -> None:
    whole, tame = Page(html.render(hostile())), Page(rendered("refused"))
    assert len(whole.of("script")) == 1
    assert not whole.of("img")
    assert {tag for tag, _ in whole.elements} <= {tag for tag, _ in tame.elements}
    assert not [key for _, attributes in whole.elements for key in attributes if key.startswith("on")]
    shown = "\ufffd".join(HOSTILE.split("\x00"))
    assert shown[:8] in whole.texts["h1"][0]
    for place in ("h3", "td", "th", "li", "p", "code", "caption", "figcaption"):
        assert any(shown[:60] in text for text in whole.texts[place]), place
    assert "{{ 7 * 7 }}" in "".join(whole.texts["td"])


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_is_well_formed_and_can_be_read_aloud(name: str) -> None:
    page = Page(rendered(name))
    assert page.of("html") == [{"lang": "en"}]
    assert page.texts["title"][0]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes in page.elements:
        assert attributes.get("aria-labelledby", ids[0]) in ids
        if (attributes.get("href") or "").startswith("#"):
            assert (attributes["href"] or "")[1:] in ids
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(page.of("caption")) == len(page.of("table"))
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.of("th"))
    drawings = [attributes for attributes in page.of("div") if attributes.get("role") == "img"]
    assert all(attributes["aria-label"] for attributes in drawings)
    assert len(drawings) == len(page.of("figure"))


@pytest.mark.parametrize("name", REPORTS)
def test_nothing_is_fetched(name: str) -> None:
    text = rendered(name)
    assert "//" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", text)
    for tag, attributes in Page(text).elements:
        assert tag not in ("iframe", "object", "embed", "form", "base", "img")
        for key in ("href", "src", "xlink:href", "data", "action"):
            assert re.match(r"#|data:,", attributes.get(key) or "#"), (tag, attributes)


@pytest.mark.parametrize("name", REPORTS)
def test_the_security_policy_allows_this_style_and_this_script_alone(name: str) -> None:
    text = rendered(name)
    page = Page(text)
    policy = next(m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    allowed = dict(part.strip().split(" ", 1) for part in (policy or "").split(";"))
    assert allowed["default-src"] == "'none'"
    assert "unsafe" not in (policy or "")
    for tag in ("style", "script"):
        (content,) = page.texts[tag]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert allowed[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not [attributes for _, attributes in page.elements if "style" in attributes]


def _sections(report: Report) -> list[str]:
    return [attributes["id"] or "" for attributes in Page(html.render(report)).of("section")]


def test_sections_without_data_are_left_out() -> None:
    everything = _sections(examples.refused())
    assert everything == [
        "gates", "error", "warnings", "built", "speed", "candidates", "proof", "accuracy", "fallback", "layers",
        "calibration", "export", "pipeline", "provenance",
    ]  # fmt: skip
    assert _sections(failing()) == ["error", "built", "export", "pipeline", "provenance"]
    assert _sections(failing().model_copy(update={"stages": []})) == ["error", "provenance"]


def test_the_verdict_is_said_in_words() -> None:
    def said(report: Report) -> str:
        return next(text for text in Page(html.render(report)).texts["p"] if text.startswith(("Passed", "Failed")))

    assert said(examples.release()) == "Passed It may ship: all 6 gates passed."
    assert said(examples.refused()) == "Failed It may not ship. Speed error in stage gates, exit code 13."
    assert "no gates were set. Not run here: tensorrt-rtx" in said(passing())
    warned = examples.refused().model_copy(update={"status": "passed", "error": None, "gate_mode": "warn"})
    assert "2 of 7 gates did not pass; they only warn" in said(warned)


def test_gates_have_their_value_limit_and_margin() -> None:
    cells = " ".join(Page(rendered("refused")).texts["tr"])
    gates = ("failed", "exit code 13", "at most 0.400 ms", "\N{MINUS SIGN}0.089 ms", "unknown", "the GPU does not tell")
    for text in (*gates, "+27.60 dB", "at least 80.00%", "25.0 MiB", "+7.0 MiB"):
        assert text in cells


def test_a_gate_that_is_missed_by_a_hair_shows_the_hair() -> None:
    whole = examples.release()
    gate = whole.gates[3].model_copy(update={"verdict": "failed", "value": 0.60001, "margin": -0.00001})
    assert "\N{MINUS SIGN}1e-05 ms" in html.render(whole.model_copy(update={"gates": [gate]}))


def test_without_matplotlib_the_tables_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = Page(rendered("release")).of("table")
    monkeypatch.setattr(figures, "available", lambda: False)
    page = Page(html.render(examples.release()))
    assert not page.of("figure")
    assert len(page.of("table")) == len(tables)
    assert sum("matplotlib is not installed (pip install" in text for text in page.texts["p"]) == 3


def test_drawings_take_the_colours_of_the_page() -> None:
    drawings = re.findall(r'<div class="plot".*?</div>', rendered("release"), re.DOTALL)
    assert len(drawings) == 5
    for drawing in drawings:
        assert "currentColor" in drawing
        assert "var(--series-1)" in drawing
        colours = set(re.findall(r'(?:fill|stroke|color)="(#\w+)"', drawing))
        assert not colours


def test_equal_reports_are_equal_files_and_small_ones() -> None:
    assert html.render(examples.release()) == rendered("release")
    assert len(rendered("release").encode()) < 500_000


def test_the_settings_of_matplotlib_stay_the_user_s() -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 31, "text.color": "red", "axes.facecolor": "yellow"}):
        before = dict(matplotlib.rcParams)
        odd = html.render(examples.release())
        assert dict(matplotlib.rcParams) == before
    assert odd == rendered("release")


def test_few_and_equal_timings_are_no_trouble() -> None:
    whole = examples.release()
    for timings in ([], [0.5], [0.5, 0.5], [0.5, float("nan"), 0.6]):
        some = whole.benchmarks[0].model_copy(update={"timings_ms": timings})
        assert "Latency and throughput" in html.render(whole.model_copy(update={"benchmarks": [some]}))


def test_rows_beyond_a_limit_are_counted() -> None:
    made = blocks.table("many", ("n",), [(str(n),) for n in range(blocks.MOST_ROWS + 7)])
    assert (len(made.rows), made.hidden) == (blocks.MOST_ROWS, 7)
