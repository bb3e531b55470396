"""The page in a real browser: every control is used, at the width of a desk and of a phone, in both themes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import metrics, study, write_official, write_run
from study_folder import results, write_folder

from browsing import browser, fits, smallest_text, use, window
from varkd.report import write_report
from varkd.report.study import write_study

__all__ = ["browser", "window"]

COLUMN = "(table, index) => [...table.tBodies[0].rows].map((row) => row.cells[index].dataset.value)"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("browser")
    long_name = "a-student-whose-name-" + "does-not-end-" * 6
    values = metrics(long_name, "varkd", fd=7.0, teacher="teacher", seed=4)
    values["protocol"]["seed"] = 8
    runs = [*study(root), write_run(root / "long", values, seed=4)]
    for run, fid in zip((runs[1], runs[-1]), (3.4, 3.9), strict=True):
        write_official(run, "llamagen", fid=fid)
    return write_report(runs, root / "out")


@pytest.fixture(scope="module")
def study_report(tmp_path_factory) -> Path:
    made = results(6, ("llamagen", "var"))
    long_name = "a_method_whose_name_" + "does_not_end_" * 6
    text = json.dumps(made).replace('"gkd"', json.dumps(long_name))
    made = json.loads(text)
    made["finished"] = False
    made["summary"][0]["fd"] = {"value": None, "low": None, "high": None}
    return write_study(write_folder(tmp_path_factory.mktemp("browser-study"), made))


@pytest.fixture
def page(window, report):
    window.goto(report.as_uri())
    return window


@pytest.fixture
def study_page(window, study_report):
    window.goto(study_report.as_uri())
    return window


def test_every_control_works_and_nothing_overflows(page, tmp_path):
    assert fits(page)
    for summary in page.locator("summary").all():
        summary.click()
        assert summary.evaluate("(element) => element.parentElement.open")
    for tab in page.get_by_role("tab").all():
        tab.click()
        assert tab.get_attribute("aria-selected") == "true"
        assert page.locator(f"#{tab.get_attribute('aria-controls')}").is_visible()
        siblings = tab.locator("xpath=..").locator("[aria-selected=true]")
        assert siblings.count() == 1
    for header in page.locator("thead button").all():
        header.click()
        assert header.locator("xpath=..").get_attribute("aria-sort") in ("ascending", "descending")
    assert fits(page), "also with everything opened"
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_tabs_follow_the_arrow_keys(page):
    tabs = page.locator("#positions [role=tab]")
    tabs.nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert tabs.nth(1).get_attribute("aria-selected") == "true"
    assert page.locator("#positions [role=tabpanel]:visible").count() == 1


@pytest.mark.parametrize(("title", "first"), [("FD", "ascending"), ("Recall", "descending"), ("Run", "ascending")])
def test_sorting_sorts(page, title, first):
    table = page.locator("#comparison-table")
    headers = table.locator("thead th")
    index = next(i for i in range(headers.count()) if headers.nth(i).inner_text().startswith(title))
    for expected in (first, "descending" if first == "ascending" else "ascending"):
        headers.nth(index).locator("button").click()
        assert headers.nth(index).get_attribute("aria-sort") == expected
        assert table.locator("th[aria-sort=ascending], th[aria-sort=descending]").count() == 1
        values = table.evaluate(f"(table) => ({COLUMN})(table, {index})")
        assert len(values) == 5
        if title != "Run":
            values = [float(value) for value in values]
        assert values == sorted(values, reverse=expected == "descending")


@pytest.mark.parametrize("width", [360, 768, 1100, 1440])
def test_no_table_is_cut(browser, report, width):
    """Too narrow for every column, a table becomes a card per run; each number still names its column."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(report.as_uri())
    assert fits(page)
    for box in page.locator(".scroll:has(table.sortable)").all():
        inner, outer = box.evaluate("(element) => [element.scrollWidth, element.clientWidth]")
        assert inner <= outer or not box.is_visible()
    cell = page.locator("#comparison-table tbody td.number").first
    label = cell.evaluate("(element) => getComputedStyle(element, '::before').content")
    assert (label == "none") == (width >= 1400)
    page.close()


def test_text_is_large_enough_for_a_phone(page):
    assert smallest_text(page) >= 14


def test_every_control_of_a_study_works_and_nothing_overflows(study_page):
    assert fits(study_page)
    for link in study_page.locator("nav a").all():
        link.click()
        assert study_page.locator(link.get_attribute("href")).bounding_box()["y"] < 844, "it is in sight"
    tabs = study_page.get_by_role("tab").all()
    assert len(tabs) == 4, "two budgets of two families"
    for number, tab in enumerate(tabs):
        tab.click()
        assert tab.get_attribute("aria-selected") == "true"
        panels = tab.locator("xpath=../..").locator("[role=tabpanel]:visible")
        assert panels.count() == 1 and panels.get_attribute("id") == tab.get_attribute("aria-controls")
        use(panels, "thead button" if number == 0 else "thead th:nth-child(3) button")
    for summary in study_page.locator("section > details > summary").all():
        summary.click()
        assert summary.evaluate("(element) => element.parentElement.open")
    assert fits(study_page), "also with everything opened"
    assert smallest_text(study_page) >= 14


def test_a_study_sorts_with_missing_numbers_last(study_page):
    table = study_page.locator("#family-0-updates")
    headers = table.locator("thead th")
    titles = [headers.nth(index).inner_text() for index in range(headers.count())]
    for start in ("FD ", "Recall", "Training"):
        index = next(index for index, title in enumerate(titles) if title.replace("\u00a0", " ").startswith(start))
        for _ in range(2):
            headers.nth(index).locator("button").click()
            values = table.evaluate(f"(table) => ({COLUMN})(table, {index})")
            known = [float(value) for value in values if value]
            falling = headers.nth(index).get_attribute("aria-sort") == "descending"
            assert len(values) == 8 and known == sorted(known, reverse=falling)
            assert values[len(known) :] == [""] * (8 - len(known))


def test_drawings_of_a_study_follow_the_theme_and_are_in_view(study_page):
    for drawing in study_page.locator(".plot svg:visible").all():
        box = drawing.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= study_page.viewport_size["width"]
    ink = "(element) => getComputedStyle(element).fill"
    page_ink = study_page.evaluate("getComputedStyle(document.body).color")
    assert study_page.locator(".plot svg text:visible").first.evaluate(ink) == page_ink
