"""The commands, one module each, in folders by use.

A module has the signature with its help and examples, and a thin body that prints the result.
"""

from __future__ import annotations

import typer

__all__ = ["app"]

app = typer.Typer(
    name="translution",
    help="Plan and train full Translution models.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
"""Every command module adds its command here when it is imported; `main` imports the modules."""
