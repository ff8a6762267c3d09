"""The report of a plan in a browser without network: legible in dark and light schemes and on small screens."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from helpers.browser import Browser

from translution.planner.common.units import format_bytes
from translution.planner.plans.plan import load_plan
from translution.reports.inputs.prediction import timelines_of
from translution.reports.render.vega import COLOURS

CHARTS = 4
"""A timeline, and a run's loss, throughput and learning rate."""
DRAWN = f"document.querySelectorAll('figure svg').length === {CHARTS} && !document.querySelector('figure img')"


def shares(browser: Browser, picture: bytes, *colours: str) -> list[float]:
    """Return the fraction of a picture's pixels that has each of these colours."""
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    browser.call("Page.navigate", url="about:blank")
    counts = browser.evaluate(
        f"""(async () => {{
          const image = new Image();
          image.src = {source!r};
          await image.decode();
          const canvas = new OffscreenCanvas(image.width, image.height).getContext("2d");
          canvas.drawImage(image, 0, 0);
          const {{ data }} = canvas.getImageData(0, 0, image.width, image.height);
          const counts = {{}};
          for (let i = 0; i < data.length; i += 4) {{
            const colour = "#" + (data[i] * 65536 + data[i + 1] * 256 + data[i + 2]).toString(16).padStart(6, "0");
            counts[colour] = (counts[colour] ?? 0) + 1;
          }}
          return counts;
        }})()"""
    )
    return [counts.get(colour, 0) / sum(counts.values()) for colour in colours]


@pytest.mark.parametrize(
    ("scheme", "width", "paper", "ink"),
    [("light", 1200, "#ffffff", "#1b1f24"), ("dark", 1200, "#0d1117", "#e6edf3"), ("dark", 390, "#0d1117", "#e6edf3")],
)
def test_page_is_drawn_and_legible(
    browser: Browser, report_page: Path, scheme: str, width: int, paper: str, ink: str
) -> None:
    browser.open(report_page, width=width, scheme=scheme)
    browser.wait(DRAWN)
    wide, window = browser.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide == window == width
    red, green, blue = (int(ink[start : start + 2], 16) for start in (1, 3, 5))
    fills = "[...document.querySelectorAll('figure svg text')].map((text) => getComputedStyle(text).fill)"
    assert set(browser.evaluate(fills)) == {f"rgb({red}, {green}, {blue})"}
    assert browser.complaints() == []
    assert browser.requests() == [report_page.as_uri()]
    behind, written, largest = shares(browser, browser.screenshot(), paper, ink, COLOURS[0])
    assert behind > 0.4
    assert written > 0.003
    # On a phone the chart is as narrow as the page, which is long.
    assert largest > 0.003


def test_tooltip_shows_live_bytes_and_where_they_are(browser: Browser, report_page: Path) -> None:
    browser.open(report_page)
    browser.wait(DRAWN)
    plot = "document.querySelector('figure svg .mark-area')"
    browser.evaluate(f"{plot}.scrollIntoView({{block: 'center'}})")
    left, top, width, height = browser.evaluate(
        f"(({{x, y, width, height}}) => [x, y, width, height])({plot}.getBoundingClientRect())"
    )
    for part in (0.5, 0.51):
        place = {"x": left + part * width, "y": top + 0.7 * height}
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
    text = browser.wait("document.querySelector('#vg-tooltip-element.visible')?.innerText")
    rows = dict(line.split("\t") for line in text.splitlines())
    assert rows["phase"] == "backward"
    assert rows["where"].endswith(", backward")
    assert {"parameters", "optimizer states", "activations"} <= set(rows)
    plan = load_plan(report_page.parent / "plan")
    points = timelines_of(plan)[plan.prediction.own_tier].points
    assert rows["total"] in {format_bytes(point.total_bytes) for point in points}


def drag(browser: Browser, begin: float, end: float) -> str:
    """Drag over shares of the timeline's width with the mouse; return the band's width while the button is down."""
    plot = "document.querySelector('figure svg .role-frame .background')"
    browser.evaluate(f"{plot}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    left, top, width, height = browser.evaluate(
        f"(({{x, y, width, height}}) => [x, y, width, height])({plot}.getBoundingClientRect())"
    )
    first, last = ({"x": left + part * width, "y": top + height / 2} for part in (begin, end))
    browser.call("Input.dispatchMouseEvent", type="mousePressed", button="left", clickCount=1, **first)
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", button="left", buttons=1, **last)
    band = str(browser.evaluate("document.querySelector('.drag').style.width"))
    browser.call("Input.dispatchMouseEvent", type="mouseReleased", button="left", clickCount=1, **last)
    return band


def test_timeline_is_zoomed_by_buttons_and_by_dragging(browser: Browser, report_page: Path) -> None:
    browser.open(report_page)
    browser.wait(DRAWN)
    names = "[...document.querySelectorAll('figure .zoom button')].map((button) => button.textContent)"
    shown = browser.evaluate(names)
    assert shown[:4] == ["all", "forward", "backward", "optimizer step"] and "what changes" in shown
    axis = "document.querySelector('figure svg .role-axis-label text').textContent"
    assert browser.evaluate(axis) == "0.0"
    for name in ("backward", "what changes"):
        button = f"[...document.querySelectorAll('.zoom button')].find((one) => one.textContent === '{name}')"
        browser.evaluate(f"{button}.click()")
        assert browser.evaluate(f"{button}.getAttribute('aria-pressed')") == "true"
    browser.wait(axis, lambda text: text != "0.0")
    every = "[...document.querySelectorAll('.zoom button')].find((one) => one.textContent === 'all')"
    phases = "[...document.querySelectorAll('figure svg .mark-text text')].map((text) => text.textContent)"
    browser.evaluate(f"{every}.click()")
    browser.wait(phases, lambda shown: "forward" in shown)
    # From right to left, over the end of backward and the optimizer step: the other phases go out of sight.
    assert float(drag(browser, 0.99, 0.8).removesuffix("px")) > 100
    left = browser.wait(phases, lambda shown: "forward" not in shown)
    assert any("optimizer" in text for text in left) and not any(text.startswith("peak") for text in left)
    assert browser.evaluate("document.querySelector('.drag')") is None
    assert browser.evaluate(f"{every}.getAttribute('aria-pressed')") == "false"
    # A click is no drag.
    drag(browser, 0.5, 0.501)
    assert browser.evaluate(phases) == left
    browser.evaluate(f"{every}.click()")
    browser.wait(phases, lambda shown: "forward" in shown)


def test_without_scripts_the_images_are_shown(browser: Browser, report_page: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(report_page)
        browser.wait(
            f"[...document.querySelectorAll('figure img')].filter((i) => i.naturalWidth > 600).length === {CHARTS}"
        )
        picture = browser.screenshot()
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    (largest,) = shares(browser, picture, COLOURS[0])
    assert largest > 0.005


def test_page_is_printed_on_white_with_a_dark_screen(browser: Browser, report_page: Path) -> None:
    browser.open(report_page, scheme="dark")
    browser.wait(DRAWN)
    dark_screen = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.call("Emulation.setEmulatedMedia", media="print", features=dark_screen)
    picture = browser.screenshot()
    browser.call("Emulation.setEmulatedMedia", media="")
    paper, ink, dark = shares(browser, picture, "#ffffff", "#000000", "#0d1117")
    assert paper > 0.5 and ink > 0.003 and dark == 0
