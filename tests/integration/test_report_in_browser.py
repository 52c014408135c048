"""`report.html` in a real browser: it renders, fetches nothing, sorts, and fits phone, dark mode and paper.

`--update-golden` writes the pictures of the README into `docs/`.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuopt.report import html
from gpuopt.report.model import Report
from tests.unit.report import examples
from tests.unit.report.test_html import hostile

DOCS = Path(__file__).parent.parent.parent / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
DESKTOP, PHONE = 1200, 390
LARGEST_PICTURE = 150_000

pytest.importorskip("matplotlib")
webdriver = pytest.importorskip("selenium.webdriver")


class Browser:
    """One window of a headless Chromium."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, width: int = DESKTOP, scheme: str = "light", media: str = "") -> None:
        """Load a file into a window of that width, all records of what went before forgotten."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(path.as_uri())

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def complaints(self) -> list[str]:
        """What the console says, refusals of the security policy among it."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def picture(self, height: int | None = None) -> bytes:
        """The page from its top, as PNG with few colours."""
        from PIL import Image

        width = self.run("return document.documentElement.clientWidth")
        full = self.run("return document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height or full, full), "scale": 1}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
        stream = io.BytesIO()
        image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
        return stream.getvalue()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    binary = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.add_argument("--headless=new")
    options.add_argument("--hide-scrollbars")
    options.add_argument("--disable-dev-shm-usage")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    from selenium.webdriver.chrome.service import Service

    started = webdriver.Chrome(options=options, service=Service(driver))
    yield Browser(started)
    started.quit()


def _written(folder: Path, report: Report) -> Path:
    path = folder / html.REPORT_HTML_FILE
    path.write_text(html.render(report), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _written(tmp_path_factory.mktemp("release"), examples.release())


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _written(tmp_path_factory.mktemp("refused"), examples.refused())


def test_it_renders_without_a_complaint_and_without_a_request(browser: Browser, release: Path) -> None:
    browser.open(release)
    assert browser.run("return document.querySelector('h1').innerText") == "resnet50.pt2 INT8"
    titles = browser.run("return Array.from(document.querySelectorAll('h2'), one => one.innerText)")
    assert titles[:3] == ["Gates", "What was built", "Speed"]
    assert browser.run("return document.querySelectorAll('table').length") > 12
    heights = browser.run("return Array.from(document.querySelectorAll('figure svg'), one => one.clientHeight)")
    assert len(heights) == 5
    assert min(heights) > 100
    # The style sheet counts: it was not refused by the policy.
    assert browser.run("return getComputedStyle(document.querySelector('table')).borderCollapse") == "separate"
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [release.as_uri()]


def test_hostile_text_runs_nothing(browser: Browser, tmp_path: Path) -> None:
    browser.open(_written(tmp_path, hostile()))
    assert browser.run("return document.scripts.length") == 1
    assert browser.run("return document.images.length") == 0
    assert "<script>alert" in browser.run("return document.body.innerText")
    assert browser.complaints() == []
    assert len([url for url in browser.requests() if not url.startswith("data:")]) == 1


def _column(browser: Browser, table: str, title: str) -> dict[str, Any]:
    """Texts and state of a column of the table with that caption."""
    found: dict[str, Any] = browser.run(
        """
        const table = Array.from(document.querySelectorAll("table")).find(t => t.caption.innerText === arguments[0]);
        const heads = Array.from(table.tHead.rows[0].cells);
        const place = heads.findIndex(head => head.innerText.startsWith(arguments[1]));
        return {
          sort: heads[place].getAttribute("aria-sort"), button: heads[place].querySelector("button"),
          sorted: heads.filter(head => head.hasAttribute("aria-sort")).length,
          texts: Array.from(table.tBodies[0].rows, row => row.cells[place].innerText.trim()),
        };
        """,
        table,
        title,
    )
    return found


def test_tables_sort_by_mouse_and_by_keyboard(browser: Browser, refused: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(refused)
    table = "Layers of the engine, in order"
    first = _column(browser, table, "ms")
    assert first["sort"] is None
    first["button"].click()
    after = _column(browser, table, "ms")
    assert (after["sort"], after["sorted"]) == ("ascending", 1)
    assert [float(text) for text in after["texts"]] == sorted(float(text) for text in first["texts"])
    assert browser.run("return document.getElementById('said').textContent") == f"{table}: sorted by ms, ascending"
    after["button"].click()
    assert _column(browser, table, "ms")["texts"] == after["texts"][::-1]

    button = _column(browser, table, "#")["button"]
    browser.run("arguments[0].focus()", button)
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    back = _column(browser, table, "ms")
    assert back["texts"] == first["texts"]
    assert back["sort"] is None
    assert back["sorted"] == 1

    # Names in the order of words, and empty cells last in both orders.
    for _ in range(2):
        _column(browser, "What was demanded", "value")["button"].click()
        assert _column(browser, "What was demanded", "value")["texts"][-1] == "\N{EN DASH}"


@pytest.mark.parametrize("width", [320, PHONE, 768])
def test_the_page_is_no_wider_than_a_phone(browser: Browser, refused: Path, width: int) -> None:
    browser.open(refused, width)
    assert browser.run("return innerWidth") == width
    assert browser.run("return document.documentElement.scrollWidth") <= width
    outside = browser.run(
        """
        return Array.from(document.querySelectorAll("body *"))
          .filter(one => !one.closest(".scroll, .unseen, svg") && one.getBoundingClientRect().right > innerWidth + 0.5)
          .map(one => one.tagName + ": " + one.textContent.slice(0, 60));
        """
    )
    assert outside == []
    boxes = "Array.from(document.querySelectorAll('.scroll'))"
    assert browser.run(f"return {boxes}.filter(box => box.scrollWidth > box.clientWidth).length") > 0


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_light_and_on_dark(browser: Browser, refused: Path, scheme: str) -> None:
    browser.open(refused, scheme=scheme)
    page = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (_luminance(page) < 0.1) == (scheme == "dark")
    pairs = browser.run(
        """
        const behind = one => {
          for (; one; one = one.parentElement) {
            const colour = getComputedStyle(one).backgroundColor;
            if (!colour.endsWith(", 0)")) return colour;
          }
        };
        const texts = "h1, h2, p, li, a, th, td, dt, dd, small, strong, code, .tone, text";
        return Array.from(document.querySelectorAll(texts))
          .map(one => [one.tagName + " " + one.textContent.slice(0, 30),
                       getComputedStyle(one)[one.tagName === "text" ? "fill" : "color"], behind(one)]);
        """
    )
    assert len(pairs) > 500
    for name, ink, paper in pairs:
        light, dark = sorted((_luminance(ink), _luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ink, paper)


def test_paper_is_light_and_shows_whole_tables(browser: Browser, release: Path) -> None:
    browser.open(release, scheme="dark", media="print")
    assert _luminance(browser.run("return getComputedStyle(document.querySelector('main')).color")) < 0.1
    assert _luminance(browser.run("return getComputedStyle(document.body).backgroundColor")) > 0.9
    assert browser.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    boxes = "Array.from(document.querySelectorAll('.scroll'))"
    assert browser.run(f"return {boxes}.filter(box => box.scrollHeight > box.clientHeight + 1).length") == 0
    # A4 between its margins is about 700 pixels wide.
    browser.open(release, 700, media="print")
    assert browser.run("return document.documentElement.scrollWidth") <= 700


def test_the_pictures(browser: Browser, release: Path, refused: Path, request: pytest.FixtureRequest) -> None:
    pictures = {}
    for name, path, width, height in (
        ("report-passing.png", release, DESKTOP, 2150),
        ("report-failing.png", refused, DESKTOP, 1500),
        ("report-phone.png", refused, PHONE, 1700),
    ):
        browser.open(path, width)
        pictures[name] = browser.picture(height)
    browser.open(release, scheme="dark")
    assert browser.picture(900) != pictures["report-passing.png"]
    for name, content in pictures.items():
        assert len(content) < LARGEST_PICTURE, name
        if request.config.getoption("--update-golden"):
            DOCS.mkdir(exist_ok=True)
            (DOCS / name).write_bytes(content)
        assert (DOCS / name).is_file()
