"""A report as Markdown, with its pictures as SVG files in the same folder."""

from __future__ import annotations

import html
from collections.abc import Iterator

from translution.planner.common import Provenance

from . import vega
from .document import TEXT_KINDS, CellValue, Column, ColumnKind, Document, Picture, Table, format_value


def _plain(text: str) -> str:
    """Escape a text so that Markdown shows it literally."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    for mark in "\\`*_[]|":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped


def _code(text: str) -> str:
    """Return a text as inline code; bars are escaped because they would end a table cell."""
    fence = "``" if "`" in text else "`"
    return f"{fence}{' '.join(text.split())}{fence}".replace("|", "\\|")


def _cell(value: CellValue, kind: ColumnKind) -> str:
    if kind == "code" and isinstance(value, str) and value:
        return _code(value)
    return _plain(format_value(value, kind))


def _row(values: tuple[CellValue, ...], columns: tuple[Column, ...]) -> str:
    cells = (_cell(value, column.kind) for value, column in zip(values, columns, strict=True))
    return f"| {' | '.join(cells)} |"


def _made(made: Provenance | None, how: str) -> str:
    if made is None:
        return f"{how} not recorded by the run."
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    cores = f"{made.cores} core{'s' if made.cores != 1 else ''}"
    return f"{how} {_code(made.command)}, {made.time_utc}, {cores} of {_plain(made.machine)}; {_plain(versions)}."


def _table(table: Table) -> Iterator[str]:
    yield f"{_plain(table.caption)}:"
    yield ""
    yield f"| {' | '.join(_plain(column.title) for column in table.columns)} |"
    yield f"|{'|'.join('---' if column.kind in TEXT_KINDS else '--:' for column in table.columns)}|"
    for values in (*table.rows, *table.foot):
        yield _row(values, table.columns)
    yield ""
    if table.text:
        yield from (_plain(table.text), "")


def _picture(picture: Picture) -> Iterator[str]:
    yield f"![{_plain(picture.description)}]({picture.key}.svg)"
    yield ""
    yield f"{_plain(picture.caption)}"
    yield ""


def _lines(document: Document) -> Iterator[str]:
    yield f"# {_plain(document.title)}"
    yield ""
    for text in document.text:
        yield from (_plain(text), "")
    yield from (_made(document.made, "Made by"), "")
    for section in document.sections:
        yield from (f"## {_plain(section.title)}", "")
        for text in section.text:
            yield from (_plain(text), "")
        for part in section.parts:
            if part.heading:
                yield from (f"### {_plain(part.heading)}", "")
            yield from _table(part) if isinstance(part, Table) else _picture(part)
            yield from (_made(part.made, part.how), "")


def render_markdown(document: Document) -> str:
    """Return the Markdown text of a document; it links to the files of `picture_files`."""
    return "\n".join(_lines(document))


def picture_files(document: Document) -> dict[str, str]:
    """Return the SVG of every picture, by file name."""
    return {f"{picture.key}.svg": vega.svg(picture.spec) for picture in document.pictures}
