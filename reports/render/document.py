"""What a report holds, whatever it is written as: sections of tables and pictures, each with where it comes from.

Cells hold values; `format_value` makes a reader's text of them by the kind of their column. So one document gives the page,
the Markdown and the JSON, and the three cannot disagree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, TypeAdapter

from translution.planner.common.errors import InputError
from translution.planner.common.provenance import Provenance
from translution.planner.common.schema import Schema, parse_json
from translution.planner.common.units import format_bytes, format_count, format_flops

ColumnKind: TypeAlias = Literal[
    "text", "sentence", "code", "integer", "count", "bytes", "flops", "seconds", "ratio", "times", "share", "number",
]  # fmt: skip
"""How a column's values are written: "count" in powers of 1000, "ratio" as 1.000, "times" as 1×, "share" as 100.0%."""
CellValue: TypeAlias = int | float | str | tuple[float, ...] | None
"""A pair is a mean and its deviation, or the two ends of a span of ratios; three are likely, low and high."""
TEXT_KINDS: tuple[ColumnKind, ...] = ("text", "sentence", "code")
MISSING = "–"


class Column(Schema):
    """A column of a table."""

    title: str
    kind: ColumnKind = "text"


class Table(Schema):
    """Values in rows; the first of each names it."""

    part: Literal["table"] = "table"
    key: str
    heading: str | None = None
    text: str | None = None
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[CellValue, ...], ...]
    foot: tuple[tuple[CellValue, ...], ...] = ()
    """Stay below when the rows are sorted."""
    sortable: bool = True
    chosen_by: int | None = None
    """The column by whose values a reader may choose rows."""
    how: str = "Counted by"
    made: Provenance | None


class Picture(Schema):
    """A chart as a Vega-Lite specification, whose description says what it shows."""

    part: Literal["picture"] = "picture"
    key: str
    heading: str | None = None
    caption: str
    name: str
    """Of what scrolls."""
    spec: dict[str, Any]
    half: bool = False
    """Whether two stand beside each other where there is room."""
    how: str = "Counted by"
    made: Provenance | None

    @property
    def description(self) -> str:
        """For those who do not see it."""
        return str(self.spec.get("description", self.caption))


SectionPart: TypeAlias = Annotated[Table | Picture, Field(discriminator="part")]


class Section(Schema):
    """What stands below one heading."""

    key: str
    title: str
    text: tuple[str, ...] = ()
    parts: tuple[SectionPart, ...] = ()


class Document(Schema):
    """A whole report."""

    schema_version: Literal[1] = 1
    title: str
    about: str
    """What kind of report it is, for the window's title."""
    text: tuple[str, ...]
    sections: tuple[Section, ...]
    made: Provenance

    @property
    def pictures(self) -> list[Picture]:
        """All of them, in order."""
        return [part for section in self.sections for part in section.parts if isinstance(part, Picture)]

    @property
    def tables(self) -> list[Table]:
        """Likewise."""
        return [part for section in self.sections for part in section.parts if isinstance(part, Table)]


_DOCUMENT: TypeAdapter[Document] = TypeAdapter(Document)


def load_document(path: Path) -> Document:
    """The document that ``translution report --data`` has written.

    Raises:
        InputError: if the file is absent or damaged.
    """
    return parse_json(_DOCUMENT, read_input(path), str(path))


def read_input(path: Path) -> bytes:
    """The content of a file that was named.

    Raises:
        InputError: if it is absent or cannot be read.
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
    """A value as a reader sees it.

    Args:
        value: of a cell; a text stands for itself in any column.
        kind: of its column.
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
    """The number by which a cell is sorted; None for texts and what is missing."""
    if isinstance(value, tuple):
        return value[0]
    return None if value is None or isinstance(value, str) else float(value)
