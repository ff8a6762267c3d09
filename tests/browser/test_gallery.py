"""A report with all kinds of sections in a browser without network: charts, sorting, filtering, small screens."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.browser import Browser

from translution.reports.render.document import Document, load_document

DRAWN = "document.querySelectorAll('figure svg').length === {count} && !document.querySelector('figure img')"
CUT_TEXTS = """[...document.querySelectorAll('figure svg')].flatMap((svg) => {
  const page = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter((text) => {
    const { left, right, width } = text.getBoundingClientRect();
    return width && (left < page.left - 1 || right > page.right + 1);
  }).map((text) => text.textContent);
})"""
OVERLAPPING = """[...document.querySelectorAll('figure svg')].flatMap((svg) => {
  const boxes = [...svg.querySelectorAll('text')].filter((text) => text.textContent.trim() && text.checkVisibility(
    { opacityProperty: true })).map((text) => [text, text.getBoundingClientRect()]);
  return boxes.flatMap(([one, a], number) => boxes.slice(number + 1)
    .filter(([, b]) => a.left + 2 < b.right && b.left + 2 < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom)
    .map(([other]) => `${one.textContent} / ${other.textContent}`));
})"""
COLUMN = "[...document.querySelector('#{table} tbody').rows].map((row) => row.cells[{index}].textContent)"


@pytest.fixture
def document(gallery_folder: Path) -> Document:
    return load_document(gallery_folder / "gallery.json")


def press(browser: Browser, key: str, code: int, text: str = "") -> None:
    event = {"key": key, "code": key, "windowsVirtualKeyCode": code}
    browser.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
    browser.call("Input.dispatchKeyEvent", type="keyUp", **event)


@pytest.mark.parametrize(
    ("scheme", "width", "height", "paper"),
    [("light", 1280, 900, "rgb(255, 255, 255)"), ("dark", 390, 844, "rgb(13, 17, 23)")],
)
def test_every_chart_fits_the_width_and_makes_no_requests(
    browser: Browser, gallery_folder: Path, document: Document, scheme: str, width: int, height: int, paper: str
) -> None:
    page = gallery_folder / "index.html"
    browser.open(page, width=width, height=height, scheme=scheme)
    browser.wait(DRAWN.format(count=len(document.pictures)))
    # Most of the first picture is on the first screen.
    top, bottom = browser.evaluate(
        "(({top, bottom}) => [top, bottom])(document.querySelector('figure svg').getBoundingClientRect())"
    )
    assert (top + bottom) / 2 < height
    assert browser.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == paper
    # Every chart fits the page, on a phone in one column, and no text of it is cut off.
    overhang = (
        "[...document.querySelectorAll('figure .scroll')].filter((box) => box.scrollWidth > box.clientWidth + 1)"
        ".map((box) => box.ariaLabel)"
    )
    assert browser.evaluate(overhang) == []
    assert browser.evaluate(CUT_TEXTS) == []
    assert browser.evaluate(OVERLAPPING) == []
    captions = "[...document.querySelectorAll('caption')].filter((e) => e.getBoundingClientRect().right > innerWidth)"
    assert browser.evaluate(f"{captions}.length") == 0
    # No table is cut off on a screen; on a phone it scrolls in its own box.
    cut = (
        "[...document.querySelectorAll('table')].map((table) => table.parentElement)"
        ".filter((box) => box.scrollWidth > box.clientWidth + 1).length"
    )
    assert (browser.evaluate(cut) == 0) == (width == 1280)
    check_contents(browser, document)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]


def check_contents(browser: Browser, document: Document) -> None:
    """Follow the contents, which stay at the top, to the last section."""
    last = document.sections[-1]
    browser.evaluate("scrollTo(0, document.body.scrollHeight / 2)")
    assert browser.evaluate("document.querySelector('nav').getBoundingClientRect().top") == 0
    browser.evaluate("document.querySelector('nav summary').click()")
    link = f"document.querySelector('nav a[href=\"#{last.key}\"]')"
    assert browser.evaluate(f"{link}.checkVisibility()")
    browser.evaluate(f"{link}.click()")
    browser.wait("document.querySelector('nav summary').innerText", lambda text: text.endswith(last.title))
    assert browser.evaluate("document.querySelector('nav details').open") is False
    assert browser.evaluate(f"{link}.getAttribute('aria-current')") == "true"


def test_table_is_sorted_by_value_with_the_keyboard(browser: Browser, gallery_folder: Path) -> None:
    browser.open(gallery_folder / "index.html")
    before = browser.evaluate(COLUMN.format(table="costs-table", index=2))
    heading = "document.querySelector('#costs-table').tHead.rows[0].cells[2]"
    browser.evaluate(f"{heading}.querySelector('button').focus()")
    sort_values = (
        "[...document.querySelector('#costs-table tbody').rows].map((row) => Number(row.cells[2].dataset.sortValue))"
    )
    for direction, backwards in (("ascending", False), ("descending", True)):
        press(browser, "Enter", 13, "\r")
        assert browser.evaluate(f"{heading}.getAttribute('aria-sort')") == direction
        values = browser.evaluate(sort_values)
        assert values == sorted(values, reverse=backwards)
        assert sorted(browser.evaluate(COLUMN.format(table="costs-table", index=2))) == sorted(before)
    # Tab moves the focus to the next heading.
    press(browser, "Tab", 9)
    press(browser, "Enter", 13, "\r")
    sorts = f"[...{heading}.parentElement.cells].map((cell) => cell.getAttribute('aria-sort'))"
    assert browser.evaluate(sorts)[2:4] == [None, "ascending"]


def test_missing_values_stay_last_in_both_directions(browser: Browser, gallery_folder: Path) -> None:
    browser.open(gallery_folder / "index.html")
    heading = "document.querySelector('#operator-table').tHead.rows[0].cells[4].querySelector('button')"
    for _ in range(2):
        browser.evaluate(f"{heading}.click()")
        column = browser.evaluate(COLUMN.format(table="operator-table", index=4))
        assert column[0] == "4.36 s" and set(column[1:]) == {"–"}


def test_rows_can_be_filtered_by_model(browser: Browser, gallery_folder: Path) -> None:
    browser.open(gallery_folder / "index.html")
    label = "document.querySelector('#costs-table').closest('section').querySelector('label.choose')"
    assert browser.evaluate(f"{label}.querySelector('select').labels[0] === {label}")
    options = browser.evaluate(f"[...{label}.querySelector('select').options].map((option) => option.text)")
    assert options == ["every model", "vit-tiny/56", "gpt-tiny/160"]
    shown = (
        "[...new Set([...document.querySelector('#costs-table tbody').rows]"
        ".filter((row) => row.checkVisibility()).map((row) => row.cells[0].textContent))]"
    )
    # A long table shows one model at first.
    assert browser.evaluate(shown) == ["vit-tiny/56"]
    for value, expected in (("gpt-tiny/160", ["gpt-tiny/160"]), ("", ["vit-tiny/56", "gpt-tiny/160"])):
        browser.evaluate(
            f"(() => {{ const select = {label}.querySelector('select'); select.value = '{value}';"
            " select.dispatchEvent(new Event('change')); })()"
        )
        assert browser.evaluate(shown) == expected


def test_without_scripts_all_rows_and_images_are_shown_without_controls(
    browser: Browser, gallery_folder: Path, document: Document
) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(gallery_folder / "index.html", width=390)
        pictures = "[...document.querySelectorAll('figure img')].filter((image) => image.naturalWidth > 300).length"
        browser.wait(pictures, lambda count: count == len(document.pictures))
        assert browser.evaluate("document.querySelectorAll('button, select').length") == 0
        rows = browser.evaluate("document.querySelectorAll('tbody tr').length")
        assert browser.evaluate("document.documentElement.scrollWidth") == 390
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert rows == sum(len(table.rows) for table in document.tables)


def test_printed_page_has_no_controls(browser: Browser, gallery_folder: Path) -> None:
    browser.open(gallery_folder / "index.html", scheme="dark")
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    try:
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        for hidden in (".choose", ".zoom", "nav"):
            assert browser.evaluate(f"document.querySelector('{hidden}').checkVisibility()") is False
        assert browser.evaluate("document.querySelector('tr[hidden]').checkVisibility()") is True
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")
