"""The app in a real browser, at three widths: every tab is used, nothing leaves the machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from browsing import browser, fits
from varkd.errors import VarkdError

__all__ = ["browser"]

pytest.importorskip("gradio")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def address(runs: list[Path]) -> Iterator[str]:
    import gradio as gr

    from varkd.app.page import launch

    yield launch(runs, port=free_port(), device="cpu", block=False)
    gr.close_all()


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_every_tab_works_at_every_width(address: str, browser, width: int):
    page = browser.new_page(viewport={"width": width, "height": 900})
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
    page.on("request", lambda asked: asked.url.startswith(("http", "ws")) and not asked.url.startswith(address)
            and complaints.append(f"network: {asked.url}"))  # fmt: skip
    page.goto(address)

    page.get_by_role("button", name="Sample", exact=True).click()
    page.get_by_text("images in").nth(1).wait_for()
    assert page.locator(".images img").count() == 16  # eight of each model
    assert page.get_by_role("heading", name="<b>raster</b>").first.is_visible()  # a name is text, never markup

    page.get_by_role("tab", name="Continue").click()
    page.get_by_role("button", name="An image of the validation split").click()
    page.locator("[data-testid=image] img, .image-frame img").first.wait_for()
    page.get_by_role("button", name="Continue it").click()
    page.get_by_role("tabpanel").filter(has=page.get_by_role("button", name="Continue it")).get_by_text(
        "images in").nth(1).wait_for()  # fmt: skip

    page.get_by_role("tab", name="Nearest").click()
    page.get_by_role("button", name="Find").click()
    page.get_by_text("the sample", exact=True).wait_for()
    assert fits(page)
    page.close()
    assert complaints == []


def test_a_taken_port_is_one_line(runs: list[Path]):
    from varkd.app.page import launch

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(VarkdError, match="choose another --port"):
            launch(runs, port=taken.getsockname()[1], device="cpu", block=False)
