"""The page in Debian's chromium, driven by playwright: neither is a requirement of the project.

apt-get install chromium; pip install playwright
"""

import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from fastssl.cli import main

CHROMIUM = shutil.which("chromium")
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
]


@pytest.fixture(scope="module")
def report(tiny_run: Path) -> Path:
    out = tiny_run / "report.html"
    assert main(["report", str(tiny_run), "--device", "cpu"]) == 0
    return out


@pytest.fixture(scope="module")
def browser() -> Generator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, report: Path) -> Generator[Callable[..., Any]]:
    """Opens the page with options of a context; fails at the end if the page complained or asked for anything."""
    complaints: list[str] = []
    contexts = []

    def open_page(**options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        page.wait_for_selector("body[data-drawn]", state="attached")
        return page

    asked: list[str] = []
    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(("data:", "blob:")) and url != report.as_uri()] == []


def colours(page: Any) -> tuple[str, str]:
    """Of the page, and of the words of a plot."""
    words = page.locator(".plot .xtick text").first.evaluate("element => getComputedStyle(element).fill")
    return page.evaluate("getComputedStyle(document.body).backgroundColor"), words


def test_every_plot_is_drawn_and_follows_the_theme(opened):
    page = opened(**DESKTOP, color_scheme="light")
    num_plots = page.locator(".plot").count()
    assert num_plots > 8
    assert page.locator(".plot .main-svg").count() >= num_plots
    light = colours(page)
    page.emulate_media(color_scheme="dark")
    words = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    page.wait_for_function(f"before => {words} !== before", arg=light[1])
    dark = colours(page)
    assert light[0] == "rgb(255, 255, 255)"
    assert dark[0] == "rgb(20, 23, 26)"
    assert light[1] != dark[1]


def test_hover_names_the_point_and_a_drag_zooms(opened):
    page = opened(**DESKTOP)
    plot = page.locator("figure", has_text="Eigenspectrum").locator(".plot")
    plot.scroll_into_view_if_needed()
    box = plot.locator(".nsewdrag").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.move(box["x"] + box["width"] / 2 + 3, middle)
    plot.locator(".hovertext").first.wait_for(state="attached")
    before = plot.evaluate("plot => plot.layout.xaxis.range.slice()")
    page.mouse.move(box["x"] + box["width"] * 0.25, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, middle, steps=5)
    page.mouse.up()
    page.wait_for_function(
        "([plot, before]) => plot.layout.xaxis.range[1] - plot.layout.xaxis.range[0] < before[1] - before[0]",
        arg=[plot.element_handle(), before],
    )


@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_point_of_the_map_shows_its_image(opened, device):
    page = opened(**device)
    plot = page.locator("figure", has_text="Map by").locator(".plot")
    plot.scroll_into_view_if_needed()
    point = plot.locator(".scatterlayer .point").nth(2).bounding_box()
    at = point["x"] + point["width"] / 2, point["y"] + point["height"] / 2
    if device is PHONE:
        page.touchscreen.tap(*at)
    else:
        page.mouse.move(at[0] - 2, at[1])
        page.mouse.move(*at)
    page.locator("#tip").wait_for(state="visible")
    assert "image" in page.locator("#tip").inner_text()
    picture = page.locator("#tip .thumb").evaluate("element => getComputedStyle(element).backgroundImage")
    assert picture.startswith('url("data:image/webp')


def test_nothing_sends_data_away(opened):
    page = opened(**DESKTOP)
    page.locator(".plot").first.hover()
    titles = page.locator(".modebar-btn").evaluate_all("buttons => buttons.map((each) => each.dataset.title)")
    assert titles
    assert not [title for title in titles if "cloud" in title.lower() or "edit" in title.lower()]
    assert page.locator("a[href^=http]").count() == 0


def test_a_phone_needs_no_scrolling_to_the_side(opened):
    page = opened(**PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    wide = page.evaluate(
        "[...document.querySelectorAll('figure, p, h1, h2, h3, nav, .scroll')]"
        ".filter((each) => each.getBoundingClientRect().right > 390.5).length"
    )
    assert wide == 0
