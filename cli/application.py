"""The application that commands are added to."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="translution",
    help="Plan and train full Translution models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
