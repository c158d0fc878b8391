"""The page in a browser without a network: no errors, nothing wider than the window, readable colours."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.results import contestant, draw_samples, latency, machine, quality, result

from offcut.benchmarks.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
    pytest.mark.slow,
]

# Contrast of each text with its background by WCAG 2.2: [ratio, text] where the ratio is below 4.5.
CONTRAST = """() => {
  const context = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const linear = part => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = rgba(getComputedStyle(element).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return rgba('white');
  };
  const poor = [];
  let seen = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.tagName === 'title') continue;
    const style = getComputedStyle(element);
    const ink = rgba(element.ownerSVGElement ? style.fill : style.color);
    const [low, high] = [luminance(ink), luminance(behind(element))].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    seen += 1;
    if (ratio < 4.5) poor.push([ratio.toFixed(2), walker.currentNode.data, ink.join()]);
  }
  return [seen, poor];
}"""

# Elements that are wider than the window and not inside a frame that scrolls.
STICKING_OUT = """() => [...document.querySelectorAll('body *')].filter(element =>
  !element.closest('.scroll, .skip') && element.checkVisibility() &&
  element.getBoundingClientRect().right > innerWidth + 1).map(element => element.outerHTML.slice(0, 120))"""

HIDDEN_PLOTS = """() => [...document.querySelectorAll('svg')].filter(plot => {
  const box = plot.getBoundingClientRect();
  return box.width < 40 || box.height < 10;
}).length"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("browser")
    measured = quality()
    draw_samples(measured, folder)
    long = contestant("offcut " + "x" * 120, 1.0, settings={"y" * 90: "z" * 200})
    timed = latency()
    timed = timed.model_copy(update={"contestants": [*timed.contestants, long]})
    combined = result(latency=timed, quality=measured, environment=machine(load=2.0))
    return write_report([combined], folder).as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_and_is_readable_in_a_browser(browser: Any, address: str, scheme: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")

    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [address]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(STICKING_OUT) == []
    assert page.evaluate("document.querySelectorAll('.plot svg').length") > 10
    assert page.evaluate(HIDDEN_PLOTS) == 0
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    texts, poor = page.evaluate(CONTRAST)
    assert texts > 300
    assert poor == []
    context.close()


def test_the_colours_follow_the_buttons_and_frames_take_the_keyboard(browser: Any, address: str) -> None:
    page = browser.new_page(color_scheme="light")
    page.goto(address)
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.get_by_label("Dark").check()
    dark = page.evaluate(paper)
    assert dark != light
    page.get_by_label("Light").check()
    assert page.evaluate(paper) == light
    page.set_viewport_size({"width": 400, "height": 900})
    frame = page.locator(".scroll").first
    frame.focus()
    page.keyboard.press("ArrowRight")
    # The page's policy forbids the script that wait_for_function would need.
    deadline = time.monotonic() + 10
    while not page.evaluate("document.querySelector('.scroll').scrollLeft > 0"):
        assert time.monotonic() < deadline, "the arrow key does not scroll the table"
        page.wait_for_timeout(50)
    page.close()
