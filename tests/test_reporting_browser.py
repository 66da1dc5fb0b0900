"""The HTML page in headless Chromium: what people see, reach and can do.

Without Chromium these tests fail, they do not skip; deselect them with `-m "not browser"`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright
from report_fixture import make_hostile, make_report

from safegene_runtime import reporting
from safegene_runtime.reporting import view

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser")]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
WIDTHS = (390, 1440)
VARIANTS = {
    "fail": lambda: make_report("FAIL", texts=True, prompts=90, per_attack=12),
    "pass": lambda: make_report(prompts=60, attacks=False),
    "sequential": lambda: make_report(sequential=True, prompts=120, attacks=False),
    "inconclusive": lambda: make_report("INCONCLUSIVE", prompts=60, attacks=False, static=False),
    "vacuous": lambda: make_report("VACUOUS", prompts=30, attacks=False, static=False),
    "integrity": lambda: make_report("FAIL", stop_at="integrity"),
    "hostile": make_hostile,
}
"""Small ones: a browser is slow with thousands of rows, and they look alike."""
SCHEMES = ("light", "dark")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = os.environ.get("SAFEGENE_CHROMIUM") or next(
        filter(None, map(shutil.which, NAMES)), None
    )
    if found is None:
        pytest.fail(
            "Chromium is needed to look at the HTML report: apt-get install chromium, "
            "or set SAFEGENE_CHROMIUM to its path",
            pytrace=False,
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    return {name: make() for name, make in VARIANTS.items()}


@pytest.fixture(scope="module")
def pages(reports: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{name}.html" for name in reports}
    for name, path in paths.items():
        reporting.write_reports(reports[name], {"html": path})
    return paths


class Opened:
    """A page, with everything that went wrong or out while it was open."""

    def __init__(self, browser: Browser, path: Path, **options: Any) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def _size(width: int) -> dict[str, int]:
    return {"width": width, "height": 900}


def _visible_rows(page: Page) -> list[str]:
    return page.locator("#prompt-table tbody tr:visible th code").all_inner_texts()


def _tab_to(page: Page, selector: str, most: int = 80) -> int:
    """Presses Tab until an element has the focus: how often, each stop with a visible focus."""
    for count in range(1, most + 1):
        page.keyboard.press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", page.evaluate("document.activeElement.outerHTML.slice(0, 200)")
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            return count
    raise AssertionError(f"{selector} cannot be reached with {most} tabs")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_page_is_quiet_and_fits(browser: Browser, pages: dict[str, Path], name: str) -> None:
    for width in WIDTHS:
        with Opened(browser, pages[name], viewport=_size(width)) as opened:
            assert opened.complaints == []
            own = [url for url in opened.requests if not url.startswith("data:")]
            assert own == [pages[name].as_uri()]
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
            assert opened.page.locator("h1").is_visible()
            # nothing is wider than the window but what scrolls within its own region
            wide = opened.page.evaluate(
                """width => [...document.querySelectorAll("body *")]
                    .filter(e => e.getBoundingClientRect().right > width + 1 && !e.closest(".scroll, svg"))
                    .map(e => e.outerHTML.slice(0, 120))""",
                width,
            )
            assert [one for one in wide if "skip" not in one] == []


def test_hostile_texts_do_not_run(browser: Browser, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["hostile"]) as opened:
        assert opened.page.title().startswith("FAIL: refusal parity of")
        assert opened.page.locator("img, iframe").count() == 0
        assert opened.page.locator("script").count() == 1
        assert opened.complaints == []


def test_the_policy_stops_what_escaping_would_have_missed(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    page = pages["pass"].read_text(encoding="utf-8")
    attack = "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
    bad = tmp_path / "bad.html"
    bad.write_text(page.replace("</body>", attack + "</body>"), encoding="utf-8")
    with Opened(browser, bad) as opened:
        assert opened.page.title() != "pwned"
        assert any("Content Security Policy" in one for one in opened.complaints)
    bad.write_text(bad.read_text(encoding="utf-8").replace("Content-Security-Policy", "x"), "utf-8")
    with Opened(browser, bad) as opened:
        assert opened.page.title() == "pwned", "else this test proves nothing"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["fail", "inconclusive", "vacuous", "integrity"])
def test_axe_finds_nothing(
    browser: Browser, pages: dict[str, Path], name: str, scheme: str
) -> None:
    with Opened(browser, pages[name], color_scheme=scheme, bypass_csp=True) as opened:
        # every row is made alike, and axe looks at each element several times
        opened.page.evaluate(
            "document.querySelectorAll('tbody tr:nth-child(n+9)').forEach(row => row.remove())"
        )
        found = Axe().run(opened.page)
        assert found.violations_count == 0, found.generate_report()


def test_light_and_dark_are_told_apart(browser: Browser, pages: dict[str, Path]) -> None:
    def brightness(scheme: str) -> float:
        with Opened(browser, pages["pass"], color_scheme=scheme) as opened:
            color = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, color.strip("rgb()").split(",")))

    assert brightness("light") > 600
    assert brightness("dark") < 150


def test_the_keyboard_reaches_and_works_everything(
    browser: Browser, pages: dict[str, Path], reports: dict[str, Any]
) -> None:
    report = reports["fail"]
    with Opened(browser, pages["fail"], viewport=_size(1440)) as opened:
        page = opened.page
        assert _tab_to(page, "a.skip", 1) == 1
        assert page.locator("a.skip").bounding_box()["x"] >= 0
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "verdict"
        _tab_to(page, ".ladder summary")
        page.keyboard.press("Enter")
        assert page.locator(".ladder details[open]").count() == 1
        _tab_to(page, "#flips summary")
        assert not page.locator("#flips pre").first.is_visible()
        page.keyboard.press("Enter")
        assert page.locator("#flips pre").first.is_visible()
        _tab_to(page, ".heat", 200)
        _tab_to(page, "#search")
        page.keyboard.type("fraud refuse")
        want = [
            one["id"] for one in report["prompts"]
            if one["category"] == "fraud" and "refuse" in (one["reference"], one["artifact"], one["base"])
        ]  # fmt: skip
        assert _visible_rows(page) == want
        assert (
            page.locator("#shown").inner_text()
            == f"{len(want)} of {len(report['prompts'])} prompts"
        )
        _tab_to(page, "#outcome", 3)
        page.keyboard.type("refusal lost")
        lost = [one["id"] for one in report["prompts"]
                if one["category"] == "fraud" and view.change(one) == "lost"]  # fmt: skip
        assert lost
        assert _visible_rows(page) == lost
        _tab_to(page, "#attack", 3)
        page.keyboard.type("many-shot")
        assert _visible_rows(page) == [one for one in lost if one.startswith("many-shot/")]
        assert opened.complaints == []


def test_columns_sort_by_value_in_both_directions(
    browser: Browser, pages: dict[str, Path], reports: dict[str, Any]
) -> None:
    prompts = reports["inconclusive"]["prompts"]
    by_kl = [one["id"] for one in sorted(prompts, key=lambda one: one["mean_kl"])]
    with Opened(browser, pages["inconclusive"]) as opened:
        button = opened.page.get_by_role("button", name="Mean KL")
        button.focus()
        opened.page.keyboard.press("Enter")
        assert _visible_rows(opened.page) == by_kl
        assert button.locator("xpath=..").get_attribute("aria-sort") == "ascending"
        opened.page.keyboard.press("Enter")
        assert _visible_rows(opened.page) == by_kl[::-1]
        assert opened.page.locator("[aria-sort]").count() == 1


def test_a_search_is_text_not_a_pattern(browser: Browser, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["pass"]) as opened:
        for words in ("(", ".*", "<b>", "\\"):
            opened.page.fill("#search", words)
            assert opened.page.locator("#shown").inner_text().startswith("0 of ")
        opened.page.fill("#search", "")
        assert opened.page.locator("#shown").inner_text() == "60 of 60 prompts"
        opened.page.select_option("#kind", "benign")
        assert opened.page.locator("#shown").inner_text() == "20 of 60 prompts"
        assert opened.complaints == []


def test_it_works_without_javascript(
    browser: Browser, pages: dict[str, Path], reports: dict[str, Any]
) -> None:
    with Opened(browser, pages["fail"], java_script_enabled=False) as opened:
        page = opened.page
        assert not page.locator("#controls").is_visible()
        rows = page.locator("#prompt-table tbody tr")
        assert rows.count() == len(reports["fail"]["prompts"])
        assert rows.last.is_visible()
        page.locator("#flips summary").first.click()
        assert page.locator("#flips pre").first.is_visible()


def test_on_paper_tables_are_whole_and_controls_gone(
    browser: Browser, pages: dict[str, Path]
) -> None:
    with Opened(browser, pages["pass"], viewport=_size(1440)) as opened:
        opened.page.emulate_media(media="print")
        assert not opened.page.locator("#controls").is_visible()
        assert not opened.page.locator("nav").is_visible()
        heights = opened.page.evaluate(
            "(e => [e.clientHeight, e.scrollHeight])(document.querySelector('#prompts .scroll'))"
        )
        assert heights[1] - heights[0] <= 1
        assert opened.page.pdf()[:5] == b"%PDF-"
