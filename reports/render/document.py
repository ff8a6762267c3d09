"""The content of a report, independent of its format: sections of tables and pictures, each with its provenance.

Cells hold raw values, and `format_value` formats them by the kind of their column. The page, the Markdown and the JSON
are all written from one document, so they cannot disagree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, TypeAdapter

from translution.planner.common import (
    InputError,
    Provenance,
    Schema,
    format_bytes,
    format_count,
    format_flops,
    parse_json,
)

ColumnKind: TypeAlias = Literal[
    "text", "sentence", "code", "integer", "count", "bytes", "flops", "seconds", "ratio", "times", "share", "number",
]  # fmt: skip
"""Format of a column's values: "count" in powers of 1000, "ratio" as 1.000, "times" as 1×, "share" as 100.0%."""
CellValue: TypeAlias = int | float | str | tuple[float, ...] | None
"""Value of a cell. A pair is a mean and its deviation, or a range of ratios; a triple is likely, low and high."""
TEXT_KINDS: tuple[ColumnKind, ...] = ("text", "sentence", "code")
MISSING = "–"


class Column(Schema):
    """A column of a table."""

    title: str
    kind: ColumnKind = "text"


class Table(Schema):
    """A table; the first cell of each row is its heading."""

    part: Literal["table"] = "table"
    key: str
    heading: str | None = None
    text: str | None = None
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[CellValue, ...], ...]
    foot: tuple[tuple[CellValue, ...], ...] = ()
    """Footer rows, which stay at the bottom when the rows are sorted."""
    sortable: bool = True
    chosen_by: int | None = None
    """Index of the column by whose values the page can filter the rows; None for no filter."""
    how: str = "Counted by"
    """Words that introduce the provenance."""
    made: Provenance | None
    """Command, date, machine and versions that produced the values; None if they were not recorded."""


class Picture(Schema):
    """A chart as a Vega-Lite specification with a description."""

    part: Literal["picture"] = "picture"
    key: str
    heading: str | None = None
    caption: str
    name: str
    """Accessible name of the scrollable area around the chart."""
    spec: dict[str, Any]
    half: bool = False
    """Show the picture at half width, two in a row, if the page is wide enough."""
    narrow: bool = False
    """The picture is legible at the width of a phone; others scroll there."""
    how: str = "Counted by"
    """Words that introduce the provenance."""
    made: Provenance | None
    """Command, date, machine and versions that produced the values; None if they were not recorded."""

    @property
    def description(self) -> str:
        """Alternative text of the picture."""
        return str(self.spec.get("description", self.caption))


SectionPart: TypeAlias = Annotated[Table | Picture, Field(discriminator="part")]


class Section(Schema):
    """A section of a report: heading, paragraphs, tables and pictures."""

    key: str
    title: str
    text: tuple[str, ...] = ()
    parts: tuple[SectionPart, ...] = ()


class Document(Schema):
    """A complete report."""

    schema_version: Literal[1] = 1
    title: str
    about: str
    """Kind of report, shown in the window title."""
    text: tuple[str, ...]
    sections: tuple[Section, ...]
    made: Provenance

    @property
    def pictures(self) -> list[Picture]:
        """All pictures, in order."""
        return [part for section in self.sections for part in section.parts if isinstance(part, Picture)]

    @property
    def tables(self) -> list[Table]:
        """All tables, in order."""
        return [part for section in self.sections for part in section.parts if isinstance(part, Table)]


_DOCUMENT: TypeAdapter[Document] = TypeAdapter(Document)


def load_document(path: Path) -> Document:
    """Read a document that ``translution report --data`` wrote.

    Raises:
        InputError: if the file is missing or invalid.
    """
    return parse_json(_DOCUMENT, read_input(path), str(path))


def read_input(path: Path) -> bytes:
    """Return the content of an input file.

    Raises:
        InputError: if the file is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _seconds(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f} s"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _single(value: float, kind: ColumnKind) -> str:
    if kind == "bytes":
        return format_bytes(round(value))
    if kind == "count":
        return format_count(round(value))
    if kind == "flops":
        return format_flops(round(value))
    if kind == "seconds":
        return _seconds(value)
    if kind == "times":
        return f"{value:,.0f}×" if value >= 10 else f"{value:.1f}×"
    forms: dict[ColumnKind, str] = {"integer": ",.0f", "ratio": ".3f", "share": ".1%", "number": ",.3f"}
    return format(value, forms[kind])


def format_value(value: CellValue, kind: ColumnKind) -> str:
    """Format a value for display.

    Args:
        value: value of a cell; a text is returned unchanged, whatever the column.
        kind: kind of its column.
    """
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if not isinstance(value, tuple):
        return _single(value, kind)
    if len(value) == 3:
        likely, low, high = (_single(number, kind) for number in value)
        return f"{likely} ({low} to {high})"
    first, second = value
    if kind == "ratio":
        return f"{first:.3f} to {second:.3f}"
    if kind == "share":
        return f"{first:.1%} ± {second * 100:.1f}"
    return f"{_single(first, kind)} ± {_single(second, kind)}"


def sort_value(value: CellValue) -> float | None:
    """Return the number by which a cell is sorted; None for texts and missing values."""
    if isinstance(value, tuple):
        return value[0]
    return None if value is None or isinstance(value, str) else float(value)
