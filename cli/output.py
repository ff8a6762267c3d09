"""Printing: tables for people, one JSON document for programs, notes on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from translution.planner.common import printable


def console(*, stderr: bool = False) -> Console:
    """Return the console for tables; it is 100 columns wide unless the output is a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(width=None if stream.isatty() else 100, highlight=False, markup=False, stderr=stderr)


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> Table:
    """Return a table whose first columns are text and whose other columns are figures.

    Args:
        title: printed above the table.
        columns: headings.
        rows: cells.
        text_columns: number of leading columns that are aligned left; the others are aligned right.
    """
    result = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        text = number < text_columns
        result.add_column(column, justify="left" if text else "right", overflow="fold", no_wrap=number == 0)
    for row in rows:
        result.add_row(*row)
    return result


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(document, indent=2))


def note(text: str) -> None:
    """Print a note on stderr, so that stdout holds results only."""
    print(f"note: {printable(text)}", file=sys.stderr, flush=True)
