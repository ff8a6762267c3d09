"""The calculator from end to end in a browser: A/B, history, the trade-off, pasted and dropped texts, phone width."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
from helpers.browser import Browser
from helpers.waiting import PATIENCE_S

SMALL = "model=vit-tiny%2F56&gpus=2"
MODEL = "family: gpt\nname: <b>mine</b>\ndim: 64\ndepth: 2\nheads: 2\ncontext: 32\nvocabulary: 100\n"
READY = (
    "document.readyState === 'complete' && !document.querySelector('.stale') && "
    "['found', 'nothing fits'].includes(document.getElementById('verdict')?.dataset.state)"
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Address of a running calculator."""
    command = [sys.executable, "-m", "translution.cli", "serve", "--port", "0", "--workers", "1", "--no-warm"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split(" ")[0]
            process.terminate()
            _, errors = process.communicate(timeout=PATIENCE_S)
            assert (process.returncode, errors) == (0, "")
        finally:
            process.kill()


def figures(browser: Browser) -> dict[str, str]:
    """Return the figures of the verdict, once it is there."""
    browser.wait(READY)
    pairs = "[...document.querySelectorAll('.figures div')].map((e) => [...e.children].map((c) => c.innerText))"
    return {str(label): str(text) for label, text, _ in browser.evaluate(pairs)}


def table(browser: Browser) -> dict[str, list[str]]:
    """Return the rows of A and B, once both are there."""
    browser.wait(READY + " && !!document.querySelector('.compared')")
    rows = "[...document.querySelectorAll('.compared tbody tr')].map((e) => [...e.children].map((c) => c.innerText))"
    return {str(label): cells for label, *cells in browser.evaluate(rows)}


def pick(browser: Browser, field: str, value: str, *events: str) -> None:
    """Give a field a value, as a user does, with these events."""
    names = json.dumps(events or ("input", "change"))
    browser.evaluate(
        f"(() => {{ const f = document.getElementById({field!r}); f.value = {json.dumps(value)};"
        f"for (const name of {names}) f.dispatchEvent(new Event(name, {{ bubbles: true }})); }})()"
    )


def drop(browser: Browser, name: str, text: str) -> None:
    """Drop a file on the page."""
    browser.evaluate(
        f"(() => {{ const dataTransfer = new DataTransfer();"
        f"dataTransfer.items.add(new File([{json.dumps(text)}], {name!r}));"
        "document.body.dispatchEvent(new DragEvent('drop', { dataTransfer, bubbles: true, cancelable: true })); })()"
    )


def click(browser: Browser, selector: str) -> None:
    """Click the middle of an element with the mouse."""
    element = f"document.querySelector({selector!r})"
    x, y = browser.evaluate(
        f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}}),"
        f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({element}.getBoundingClientRect())"
    )
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


def search_of(browser: Browser) -> str:
    return str(browser.evaluate("location.search"))


def back(browser: Browser) -> None:
    browser.evaluate("history.back()")


def test_two_choices_are_compared_swapped_and_left(address: str, browser: Browser) -> None:
    browser.open(f"{address}?{SMALL}")
    own = figures(browser)
    click(browser, "#keep")
    browser.wait("location.search.includes('compare=')")
    pick(browser, "operator", "attention")
    browser.wait("location.search.includes('operator=attention')")
    rows = table(browser)
    assert rows["Operator"][:2] == ["full Translution", "attention"]
    assert rows["memory of each GPU"][0] == own["memory of each GPU"]
    assert float(rows["parameters"][2]) < 1
    both = search_of(browser)
    click(browser, "#swap")
    browser.wait("document.getElementById('operator').value === 'translution'")
    assert table(browser)["Operator"][:2] == ["attention", "full Translution"]
    back(browser)
    browser.wait("document.getElementById('operator').value === 'attention'")
    assert search_of(browser) == both
    assert table(browser) == rows
    # The address alone gives both.
    browser.call("Page.reload")
    assert table(browser) == rows
    click(browser, "#single")
    browser.wait("!location.search.includes('compare=')")
    assert "memory of each GPU" in figures(browser)
    assert browser.evaluate("document.querySelector('.compared')") is None
    assert browser.complaints() == []


def test_back_and_forward_go_through_the_choices(address: str, browser: Browser) -> None:
    browser.open(f"{address}?{SMALL}")
    first = figures(browser)
    # Some programs that fill in forms send `change` only.
    pick(browser, "operator", "alpha", "change")
    browser.wait("location.search.includes('operator=alpha')")
    second = figures(browser)
    assert first != second
    for steps in ("1", "10", "100"):
        pick(browser, "steps", steps, "input")
        browser.wait(f"location.search.endsWith('steps={steps}')")
    figures(browser)
    back(browser)  # What is typed into one field is one entry.
    browser.wait("document.getElementById('steps').value === '10000'")
    assert figures(browser) == second
    assert browser.evaluate("document.getElementById('operator').value") == "alpha"
    back(browser)
    browser.wait("document.getElementById('operator').value === 'translution'")
    assert figures(browser) == first
    assert search_of(browser) == f"?{SMALL}"
    browser.evaluate("history.forward()")
    browser.wait("document.getElementById('operator').value === 'alpha'")
    assert figures(browser) == second
    assert browser.complaints() == []


def test_a_point_of_the_trade_off_is_chosen_by_a_click(address: str, browser: Browser) -> None:
    browser.open(f"{address}?model=vit-base%2F32&gpus=2&price=2")
    before = figures(browser)
    assert "price of the run" in before
    points = browser.evaluate("document.querySelectorAll('a.point').length")
    assert points > 3
    click(browser, f"#point-{points} .dot")
    browser.wait("location.search.includes('zero=') && !!document.querySelector('#free')")
    after = figures(browser)
    assert after["memory of each GPU"] != before["memory of each GPU"]
    assert browser.evaluate("document.querySelectorAll('a.point').length") == points
    assert browser.evaluate("document.querySelector('a.point.chosen').id") == f"point-{points}"
    assert browser.evaluate("document.getElementById('stage').value") == "3"
    assert "--zero overlap_comm=" in browser.evaluate("document.getElementById('command').innerText")
    click(browser, "#free")
    browser.wait("!location.search.includes('zero=')")
    assert figures(browser) == before
    assert browser.complaints() == []


def test_own_texts_are_pasted_and_dropped(address: str, browser: Browser) -> None:
    browser.open(f"{address}?{SMALL}")
    figures(browser)
    browser.evaluate("document.getElementById('own-model').open = true")
    pick(browser, "model_yaml", MODEL)
    browser.wait("document.querySelector('#verdict .what')?.innerText.startsWith('<b>mine</b> with full Translution')")
    figures(browser)
    assert browser.evaluate("document.getElementById('model').disabled && document.getElementById('operator').disabled")
    assert "cat > model.json" in browser.evaluate("document.getElementById('command').innerText")
    # A file is dropped; `base` contradicts what the form says about GPUs, which therefore is disabled.
    drop(browser, "c.yaml", "base: 1x4xA100-80\nname: ours\n")
    browser.wait("document.querySelector('#verdict .what')?.innerText.endsWith('4 GPUs, ours')")
    assert browser.evaluate("document.getElementById('gpus').disabled")
    assert "gpus=" not in search_of(browser) and "cluster_yaml=" in search_of(browser)
    browser.call("Page.reload")
    browser.wait(READY)
    assert browser.evaluate("document.getElementById('model_yaml').value") == MODEL.strip()
    back(browser)
    browser.wait("document.getElementById('cluster_yaml').value === ''")
    browser.wait(READY)
    assert browser.evaluate("document.getElementById('gpus').value") == "2"
    pick(browser, "model_yaml", MODEL.replace("heads: 2", "heads: 3"))
    error = browser.wait("document.getElementById('error-model_yaml').innerText")
    assert error == "model_yaml: heads: 3 is not allowed: must divide dim 64 when head_dim is not given"
    drop(browser, "big.yaml", 20000 * "x")
    told = browser.wait("document.getElementById('status').innerText", lambda text: "big.yaml" in str(text))
    assert told == "big.yaml: must be a text of at most 4,000 characters"
    # The refused text is answered with status 422, which the browser reports, and nothing else.
    assert [line for line in browser.complaints() if "422" not in line] == []


CUT_OFF = """[...document.querySelectorAll('body *')].filter((e) => {
  const { right, width } = e.getBoundingClientRect();
  const inline = getComputedStyle(e).display === 'inline';
  const scrolls = !e.closest('svg') && !inline && e.clientWidth && e.scrollWidth > e.clientWidth + 1;
  return width && (scrolls || right > innerWidth + 1);
}).map((e) => `${e.tagName}#${e.id}.${e.className}`)"""
NARROW_SELECTS = """[...document.querySelectorAll('select')].filter((e) => {
  const context = new OffscreenCanvas(1, 1).getContext('2d');
  context.font = getComputedStyle(e).font;
  const arrow = 30;
  return Math.max(...[...e.options].map((one) => context.measureText(one.text).width)) + arrow > e.clientWidth;
}).map((e) => e.id)"""


@pytest.mark.parametrize(("width", "height", "scheme"), [(1280, 900, "light"), (390, 844, "dark")])
def test_nothing_is_cut_off_and_the_verdict_is_on_the_first_screen(
    address: str, browser: Browser, width: int, height: int, scheme: str
) -> None:
    compared = f"compare={SMALL.replace('=', '%3D').replace('&', '%26')}"
    choices = {
        "model=vit-base%2F32&nodes=2&price=2.5&minimize=memory": ("found", True),
        f"model=vit-base%2F16&gpus=1&gpu=RTX4090&stage=2&offload=none&{compared}": ("nothing fits", False),
        # The only plan: its trade-off would be an empty picture.
        f"{SMALL}&gpu=RTX4090&headroom=0.9&stage=2&offload=none": ("found", False),
    }
    for query, (state, trade_off) in choices.items():
        browser.open(f"{address}?{query}", width=width, height=height, scheme=scheme)
        browser.wait(READY)
        assert browser.evaluate("document.getElementById('verdict').dataset.state") == state
        assert browser.evaluate("document.querySelector('.scatter') !== null") == trade_off
        ends = "document.querySelector('.figures, .compared thead').getBoundingClientRect().bottom"
        assert 0 < browser.evaluate(ends) < height
        tops = browser.evaluate(
            "[...document.querySelectorAll('.figures div')].map((e) => e.getBoundingClientRect().top)"
        )
        assert len(set(tops)) == math.ceil(len(tops) / (5 if width == 1280 else 2))
        browser.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        assert browser.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
        assert browser.evaluate(CUT_OFF) == []
        assert browser.evaluate(NARROW_SELECTS) == []
    assert browser.complaints() == []
    assert all(url.startswith(address) for url in browser.requests())
