"""The page in a browser: it generates with and without caching, by keyboard, at any width, and loads nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from offcut.runtime.server.settings import ServeSettings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEY = "correct-horse"

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
    pytest.mark.slow,
]

OVERFLOWING = """() => [...document.querySelectorAll('body *')].filter(element =>
  element.checkVisibility() && element.getBoundingClientRect().right > innerWidth + 1
).map(element => element.outerHTML.slice(0, 120))"""

UNLABELLED = """() => [...document.querySelectorAll("input, select, textarea, button")].filter(element =>
  !(element.labels?.length || element.ariaLabel || element.textContent.trim())).map(element => element.outerHTML)"""

SMALL_TARGETS = """() => [...document.querySelectorAll(
  'input:not([type=checkbox]), select, textarea, button, label.check')]
  .filter(element => element.checkVisibility() && element.getBoundingClientRect().height < 36)
  .map(element => element.outerHTML)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A page, with the errors of its console and the URLs that it requested."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.page = browser.new_context(**options).new_page()
        self.errors: list[str] = []
        self.urls: list[str] = []
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.urls.append(request.url))
        self.page.goto(url)

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.type}: {message.text}")

    def wait_for_status(self, text: str) -> None:
        """Wait until the status line contains a text."""
        from playwright.sync_api import expect

        expect(self.page.get_by_role("status")).to_contain_text(text, timeout=60_000)

    def timeline(self, figure: str) -> str:
        kinds = self.page.locator(f"#{figure} .steps i").evaluate_all("bars => bars.map(bar => bar.className)")
        return "".join({"full": "#", "shallow": ".", "": "?"}[kind] for kind in kinds)

    def image_count(self) -> int:
        """Return the number of images that are shown."""
        return int(
            self.page.evaluate(
                "[...document.images].filter(each => !each.hidden && each.complete && each.naturalWidth === 64).length"
            )
        )


@pytest.fixture(scope="module")
def server(start_server: Any) -> Iterator[Any]:
    with start_server(ServeSettings(steps=8, interval=4, warmup=0)) as running:
        yield running


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_generates_with_and_without_caching(width: int, scheme: str, browser: Any, server: Any) -> None:
    tab = Tab(browser, server.url, viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.page.get_by_label("Prompt", exact=True).fill("a red square " + "x" * 200)
    tab.page.get_by_text("More settings", exact=True).click()
    tab.page.get_by_role("button", name="Generate").click()
    tab.wait_for_status("times as fast")
    assert tab.image_count() == 2
    assert tab.timeline("cached") == "#...#..."
    assert tab.timeline("uncached") == "########"
    assert "2 full and 6 shallow of 8 calls" in tab.page.locator("#cached").inner_text()
    assert [" s" in tab.page.locator(f"#{figure} .seconds").inner_text() for figure in ("cached", "uncached")]
    assert tab.errors == []
    assert {url.partition(server.url)[0] for url in tab.urls if not url.startswith("data:")} == {""}
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.page.evaluate(OVERFLOWING) == []
    assert tab.page.evaluate(UNLABELLED) == []
    assert tab.page.evaluate(SMALL_TARGETS) == []
    tab.page.context.close()


def test_the_page_works_by_keyboard(browser: Any, server: Any) -> None:
    tab = Tab(browser, server.url)
    press = tab.page.keyboard.press
    focused = "document.activeElement.id"
    press("Tab")
    assert tab.page.evaluate(focused) == "prompt"
    assert tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.page.keyboard.type("a")
    order = []
    for _ in range(5):
        press("Tab")
        order.append(tab.page.evaluate(focused))
    assert order == ["steps", "seed", "random-seed", "interval", "compare"]
    press("Shift+Tab")
    press("Home")
    press("ArrowRight")
    assert tab.page.locator("#interval-shown").inner_text() == "2 calls"
    press("Tab")
    press("Space")
    assert not tab.page.get_by_label("Also generate without caching").is_checked()
    tab.page.locator("#prompt").focus()
    press("Enter")
    tab.wait_for_status(" s")
    assert tab.timeline("cached") == "#.#.#.#."
    assert tab.timeline("uncached") == ""
    assert tab.image_count() == 1
    assert tab.errors == []
    tab.page.context.close()


def test_stopping_frees_the_worker(browser: Any, server: Any, gate: Any, wait_until: Any) -> None:
    tab = Tab(browser, server.url)
    tab.page.get_by_label("Prompt", exact=True).fill("a")
    gate.close()
    tab.page.get_by_role("button", name="Generate").click()
    assert gate.reached.wait(60)
    tab.page.keyboard.press("Escape")
    tab.wait_for_status("Stopped")
    wait_until(lambda: not server.service.open_jobs)
    gate.open.set()
    wait_until(lambda: server.service.worker.statistics().in_flight == 0)
    assert server.service.worker.statistics().requests["cancelled"].count == 1
    assert tab.page.get_by_role("button", name="Generate").is_enabled()
    tab.page.context.close()


def test_an_error_is_shown(browser: Any, server: Any) -> None:
    from playwright.sync_api import expect

    tab = Tab(browser, server.url)
    tab.page.get_by_label("Prompt", exact=True).fill("a")
    tab.page.get_by_text("More settings", exact=True).click()
    tab.page.get_by_label("Size in pixels").fill("65x64")
    tab.page.get_by_role("button", name="Generate").click()
    expect(tab.page.get_by_role("alert")).to_contain_text("the nearest is 64")
    tab.page.context.close()


def test_the_default_schedule_is_selected(browser: Any, server: Any, start_server: Any) -> None:
    """Ends the module's server, since a pipeline can run in one server only: keep this test and the next one last."""
    server.service.stopping = True
    server.thread.join(60)
    with start_server(ServeSettings(steps=8, interval=4, warmup=0, schedule="steps:0,5", forecast=0.5)) as running:
        tab = Tab(browser, running.url)
        tab.page.get_by_label("Prompt", exact=True).fill("a")
        tab.page.get_by_text("More settings", exact=True).click()
        schedule = tab.page.get_by_label("Schedule", exact=True)
        assert schedule.input_value() == "steps:0,5"
        assert tab.page.locator("#interval").is_disabled()
        assert "steps:0,5" in tab.page.locator("#interval-hint").inner_text()
        tab.page.get_by_role("button", name="Generate").click()
        tab.wait_for_status("times as fast")
        assert (tab.timeline("cached"), tab.timeline("uncached")) == ("#....#..", "########")
        schedule.select_option("")
        assert tab.page.locator("#interval").is_enabled()
        tab.page.get_by_label("Also generate without caching").uncheck()
        tab.page.get_by_role("button", name="Generate").click()
        tab.page.wait_for_selector("#cached img:not([hidden]):not(.preview)")
        assert tab.timeline("cached") == "#...#..."
        assert tab.errors == []
        tab.page.context.close()


def test_the_page_asks_for_the_api_key(browser: Any, server: Any, start_server: Any) -> None:
    from playwright.sync_api import expect

    server.service.stopping = True
    server.thread.join(60)
    with start_server(ServeSettings(steps=8, interval=4, warmup=0, api_key=KEY)) as locked:
        tab = Tab(browser, locked.url)
        expect(tab.page.get_by_role("alert")).to_contain_text("API key")
        assert tab.page.evaluate("document.activeElement.id") == "key"
        tab.page.keyboard.type(KEY)
        tab.page.keyboard.press("Tab")
        expect(tab.page.locator("#model")).to_contain_text("tiny")
        tab.page.get_by_label("Prompt", exact=True).fill("a")
        tab.page.keyboard.press("Enter")
        tab.wait_for_status("times as fast")
        assert tab.image_count() == 2
        assert [line for line in tab.errors if "401" not in line] == []
        tab.page.reload()
        expect(tab.page.locator("#model")).to_contain_text("tiny")
        tab.page.context.close()
