"""Printing: tables for people, one JSON document for programs, notes on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from translution.planner.common import printable


def console(*, stderr: bool = False) -> Console:
    """Return the console for text and tables: as wide as the terminal or as COLUMNS says, otherwise 80 columns."""
    return Console(highlight=False, markup=False, stderr=stderr)


_LONG_WORD = 24
"""Characters of the longest word that a text column keeps whole; longer ones are paths and addresses."""


def _longest_word(texts: Sequence[str]) -> int:
    return max((len(word) for text in texts for word in text.split()), default=1)


def fit_columns(columns: Sequence[Sequence[str]], available: int, solid: Sequence[bool]) -> tuple[list[int], int]:
    """Choose the widths at which the columns of a table fit, without breaking a word if there is a way to.

    Args:
        columns: the texts of every column, its heading first.
        available: characters of a line.
        solid: for each column whether its cells, such as figures with units, should stay on one line.

    Returns:
        The width of each column, and the spaces between two of them.
    """
    widths = [max(len(text) for text in texts) for texts in columns]
    words = [
        _longest_word(texts) if whole else min(_longest_word(texts), _LONG_WORD)
        for texts, whole in zip(columns, solid, strict=True)
    ]
    cells = [max(len(text) for text in texts[1:]) if texts[1:] and whole else 0
             for texts, whole in zip(columns, solid, strict=True)]  # fmt: skip
    least = [max(pair) for pair in zip(words, cells, strict=True)]
    gap = 2 if sum(least) + 2 * (len(columns) - 1) <= available else 1
    room = available - gap * (len(columns) - 1)
    # Headings and texts wrap first, then figures leave their units; a word breaks only if nothing else is left.
    for floor in (least, words, [1] * len(widths)):
        while sum(widths) > room:
            wide = [number for number, width in enumerate(widths) if width > floor[number]]
            if not wide:
                break
            widths[max(wide, key=lambda number: widths[number])] -= 1
    return widths, gap


class FittedTable(Table):
    """A table whose columns share the width of the console so that words and figures stay whole.

    Args:
        title: printed above the table.
        columns: headings.
        rows: cells.
        text_columns: number of leading columns that are aligned left; the others are aligned right.
    """

    def __init__(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int) -> None:
        super().__init__(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for number, column in enumerate(columns):
            self.add_column(column, justify="left" if number < text_columns else "right", overflow="fold")
        for row in rows:
            self.add_row(*row)
        # Rich would wrap a title of the table at the width of its columns.
        self._heading = Text(title, style="bold")
        self._texts = [list(texts) for texts in zip(columns, *rows, strict=True)]
        self._solid = [number == 0 or number >= text_columns for number in range(len(columns))]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths, gap = fit_columns(self._texts, options.max_width, self._solid)
        self.padding = (0, gap - 1, 0, 0)
        for column, width in zip(self.columns, widths, strict=True):
            column.width = width
        yield self._heading
        yield from super().__rich_console__(console, options)


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> Table:
    """Return a table whose first columns are text and whose other columns are figures.

    Args:
        title: printed above the table.
        columns: headings.
        rows: cells.
        text_columns: number of leading columns that are aligned left; the others are aligned right.
    """
    return FittedTable(title, columns, rows, text_columns=text_columns)


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(document, indent=2))


def note(text: str) -> None:
    """Print a note on stderr, so that stdout holds results only."""
    print(f"note: {printable(text)}", file=sys.stderr, flush=True)
