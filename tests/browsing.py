"""A real browser for tests of pages: fixtures at the width of a desk and of a phone, in both themes."""

from __future__ import annotations

import os
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
REQUIRED = os.environ.get("VARKD_REQUIRE_BROWSER") == "1"
OUTSIDE = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if REQUIRED:
            pytest.fail("VARKD_REQUIRE_BROWSER=1 but no chromium is installed: apt-get install chromium")
        pytest.skip("no chromium is installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, "light"), (390, "light"), (390, "dark")], ids=["desk", "phone", "phone-dark"])
def window(request, browser):
    """Opens a page at one width in one theme, and asks in the end that nothing complained."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith("http") and complaints.append(f"network: {asked.url}"))
    yield page
    page.close()
    assert complaints == []


def fits(page) -> bool:
    content, window = page.evaluate(OUTSIDE)
    return content <= window


def smallest_text(page) -> float:
    selector = "p, td, th, li, dd, summary, button, figcaption"
    size = "(element) => parseFloat(getComputedStyle(element).fontSize)"
    return page.evaluate(f"Math.min(...[...document.querySelectorAll('{selector}')].map({size}))")


def use(scope, headers: str) -> None:
    """Open what can be opened in `scope`, then sort by those `headers` of every table there."""
    for summary in scope.locator("summary").all():
        summary.click()
        assert summary.evaluate("(element) => element.parentElement.open")
    for header in scope.locator(headers).all():
        header.click()
        assert header.locator("xpath=..").get_attribute("aria-sort") in ("ascending", "descending")
