"""The documentation builds as a site without warnings; the site is complete and needs no network."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest
from helpers.browser import Browser
from helpers.doc_pages import ROOT, links, reader_pages

from translution.planner import load_model
from translution.planner.config import RelationGeometry, deal_relations, owned_geometry

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
"""Attributes whose address a browser loads with the page; for <link>, of style sheets and icons."""


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors and without a network."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    no_network = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **no_network, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


class Addresses(HTMLParser):
    """Addresses that a page loads, addresses that it links to, and the anchors that it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.linked.append(values["href"])
        elif tag in LOADED and LOADED[tag] in values and values.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(values[LOADED[tag]])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Addresses]:
    return {page: Addresses(page) for page in sorted(site.rglob("*.html")) if page.name != "404.html"}


def test_every_page_of_the_repository_is_in_the_site(site: Path) -> None:
    for path in [*reader_pages(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        place = path.relative_to(ROOT)
        name = "index.html" if path.name == "README.md" else f"{path.stem}.html"
        assert (site / place.parent / name).exists(), place


def test_every_link_of_the_site_leads_somewhere(site: Path, pages: dict[Path, Addresses]) -> None:
    for page, addresses in pages.items():
        for address in addresses.linked:
            target, _, anchor = address.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            found = (page.parent / unquote(target)).resolve() if target else page
            assert found.exists(), f"{page.relative_to(site)}: {address}"
            if anchor and found in pages:
                assert unquote(anchor) in pages[found].anchors, f"{page.relative_to(site)}: {address}"


def test_no_page_loads_anything_from_the_network(site: Path, pages: dict[Path, Addresses]) -> None:
    for page, addresses in pages.items():
        for address in addresses.loaded:
            assert not re.match(r"(?:[a-z]+:)?//", address), f"{page.relative_to(site)}: {address}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


def test_the_reference_has_every_module(site: Path) -> None:
    for package in load_script("api_pages").PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if path.name.startswith("_"):
                continue
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            page = site / "docs" / "api" / f"{path.parent.relative_to(ROOT)}.html"
            assert f'id="translution.{name}"' in page.read_text(encoding="utf-8"), name


def test_the_search_works_from_disk(site: Path, browser: Browser) -> None:
    browser.open(site / "docs" / "concepts.html")
    browser.wait("document.querySelector('[data-md-component=search] form') !== null")
    browser.evaluate(
        "(() => { const field = document.querySelector('[data-md-component=search-query]'); field.focus();"
        " field.value = 'micro-batch'; field.dispatchEvent(new Event('input', {bubbles: true}));"
        " field.dispatchEvent(new KeyboardEvent('keyup', {bubbles: true})); })()"
    )
    found = browser.wait("[...document.querySelectorAll('.md-search-result__link')].map(link => link.href).join(' ')")
    assert "docs/concepts.html" in found
    assert browser.complaints() == []
    assert all(url.startswith("file:") for url in browser.requests())


def test_the_picture_of_the_packages_is_current() -> None:
    script = load_script("pictures/import_graph")
    assert script.PICTURE.read_text(encoding="utf-8") == script.picture(), "the picture is old: make docs"


def test_the_drawings_of_the_operator_are_current_and_true() -> None:
    script = load_script("pictures/drawings")
    pictures = {name: draw() for name, draw in script.PICTURES.items()}
    for name, picture in pictures.items():
        assert (script.IMAGES / f"{name}.svg").read_text(encoding="utf-8") == picture, "the drawings are old: make docs"
    colors = set(re.findall(r'class="offset" style="fill:(hsl[^"]*)"', pictures["operator"]))
    grid = RelationGeometry.grid(script.SIDE, script.SIDE)
    assert len(colors) == grid.relations == script.OFFSETS**2
    table = load_model("vit-base/16").geometry
    assert f"{table.relations} matrices" in pictures["tiles"]
    owners = deal_relations(script.SEQUENCE, 2)
    for rank, kind in enumerate(("query", "key")):
        pairs = owned_geometry(script.SEQUENCE, owners, rank).total_pairs
        # Two samples in steps 2 and 4 on the owner, and one in step 3 on each of two ranks.
        assert pictures["relations"].count(f'class="{kind}"') == 6 * pairs


def test_the_recording_of_plan_is_current() -> None:
    script = load_script("pictures/record_plan")
    drawn = script.draw()
    assert "https://" not in drawn.replace("https://www.textualize.io", ""), "a page loads nothing from the network"
    assert script.PICTURE.read_text(encoding="utf-8") == drawn, "the recording is old: make docs"


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_pages_fit_a_screen_and_a_phone(site: Path, browser: Browser, width: int, height: int) -> None:
    for page in ("index", "docs/README", "docs/tutorial", "docs/layer", "docs/clusters"):
        browser.open(site / f"{page}.html".replace("README", "index"), width=width, height=height)
        assert browser.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width], page
        if width == 1280 and page in ("index", "docs/tutorial"):  # Tables as commands print them.
            cut = "[...document.querySelectorAll('pre > code')].filter((e) => e.scrollWidth > e.clientWidth + 1)"
            assert browser.evaluate(f"{cut}.map((e) => e.innerText.slice(0, 60))") == [], page
        broken = "[...document.querySelectorAll('td:first-child > code')].filter((e) => e.getClientRects().length > 1)"
        assert browser.evaluate(f"{broken}.map((e) => e.innerText)") == [], page


def test_imports_in_a_circle_have_no_picture() -> None:
    script = load_script("pictures/import_graph")
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    with pytest.raises(ValueError, match="packages import each other: a, b, c"):
        script._rows(edges)
    straight = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert script._rows(straight) == [["a"], ["b"], ["c"]]
    assert script._reduced(straight) == [("a", "b"), ("b", "c")]


def test_links_of_the_readme_work_on_github_too() -> None:
    for target in links(ROOT / "README.md"):
        assert (ROOT / target.partition("#")[0]).exists(), target
