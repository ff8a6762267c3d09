"""The tables of a report, read from its JSON and from its page."""

from __future__ import annotations

import re
from pathlib import Path

from helpers.html_page import Page

from translution.reports.render.document import CellValue, Document


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
