"""A parser of report pages, and the tables of a report, read from its JSON and from its page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from translution.reports.render.document import CellValue, Document

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Elements of a page with their attributes and their text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self._open, "an element is never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        text: list[str] = []
        self.elements.append((tag, dict(attrs), text))
        if tag not in VOID:
            self._open.append(text)

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for text in self._open:
            text.append(data)

    def all(self, *tags: str) -> list[tuple[str, dict[str, str | None], str]]:
        """Return the elements with these tags, each with its full text."""
        return [(tag, attrs, "".join(text)) for tag, attrs, text in self.elements if tag in tags]


def table(document: Document, key: str) -> list[dict[str, CellValue]]:
    """Return the rows of a table by column title."""
    (found,) = (table for table in document.tables if table.key == key)
    return [dict(zip((column.title for column in found.columns), row, strict=True)) for row in found.rows]


def cells(page: Path) -> dict[str, list[list[str]]]:
    """Return the cell texts of every table of a page, by the id of the table."""
    text = page.read_text(encoding="utf-8")
    found = {}
    for key, body in re.findall(r'<table id="([^"]+)".*?<tbody>(.*?)</table>', text, flags=re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", body, flags=re.DOTALL)
        found[key] = [[text for _, _, text in Page(row).all("th", "td")] for row in rows]
    return found
