"""Entry of the command line: import the requested command, run it, and turn errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import importlib
import io
import itertools
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import typer

from translution.planner.common import TranslutionError, check_line, printable

from .commands import app

MODULES = {
    "estimate": "planning.estimate",
    "plan": "planning.plan",
    "compare": "planning.compare",
    "clusters": "planning.clusters",
    "report": "planning.report",
    "serve": "planning.serve",
    "calibrate": "measuring.calibrate",
    "prepare": "training.prepare",
    "preflight": "training.preflight",
    "launch": "training.launch",
    "status": "training.status",
    "verify": "measuring.verify",
    "measure": "measuring.measure",
    "rehearse": "measuring.rehearse",
    "verify-checkpoint": "training.verify_checkpoint",
    "export": "training.export",
    "import": "training.import_",
    "experiment": "measuring.experiment",
    "train": "training.ranks",
    "rank": "training.ranks",
    "calibrate-rank": "training.ranks",
    "preflight-node": "training.ranks",
    "rehearse-rank": "training.ranks",
}
"""Name of every command, in the order of ``--help``, and its module in `commands`."""
SHORT = ("estimate", "clusters", "--help", "--version")
"""Commands without garbage collection: they end within a second."""


def _print_version(requested: bool) -> None:
    if requested:
        from translution.planner.plans import version

        typer.echo(f"translution-scale {version()}")
        raise typer.Exit


@app.callback()
def common_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Plan and train full Translution models."""


def full_app() -> typer.Typer:
    """Return the application with all commands."""
    return _app_with(MODULES)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; print an error as one line on stderr.

    Args:
        arguments: the words after ``translution``.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        # An encoding that lacks a character, such as ASCII, shows a question mark.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    try:
        for word in arguments:
            check_line(word)
    except ValueError as error:
        return _fail(f"argument: {error}", 2)
    with _warnings_as_notes():
        return _run_command(arguments)


def _run_command(arguments: Sequence[str]) -> int:
    try:
        app_of_command = _app_for(arguments)
        if not gc.isenabled() and arguments and arguments[0] not in SHORT:
            gc.set_threshold(50_000, 20, 20)
            gc.enable()
        code = app_of_command(args=list(arguments), standalone_mode=False)
        sys.stdout.flush()
    except TranslutionError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The program that reads our output, such as head, has exited.
        sys.stderr.close()
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        # What is left in the buffer must not fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _fail(f"standard output: cannot be written: {error.strerror}", 1)
    except Exception as error:
        # Typer's usage errors: their classes moved between versions, their interface did not.
        if not hasattr(error, "format_message"):
            if type(error).__name__ == "Abort":
                return _fail("interrupted", 130)
            raise
        message = error.format_message() or "no command given: see translution --help"
        return _fail(_with_value(message, arguments), 2)
    # Typer turns Ctrl-C into this code and prints nothing.
    return _fail("interrupted", 130) if code == 130 else code if isinstance(code, int) else 0


@contextlib.contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Print the toolkit's own warnings as one line each, once; others stay as they are."""
    show, shown = warnings.showwarning, set()

    def print_note(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if category.__name__ != "EditedPlanWarning":
            show(message, category, *place, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            print(f"note: {printable(str(message))}", file=sys.stderr, flush=True)

    warnings.showwarning = print_note
    try:
        yield
    finally:
        warnings.showwarning = show


def _with_value(message: str, arguments: Sequence[str]) -> str:
    """Add the value to a usage error of Typer, of which some name only the option."""
    if not message.startswith("Invalid value for "):
        return message
    for option, value in itertools.pairwise(arguments):
        if f"'{option}'" in message and option.startswith("-") and repr(value) not in message:
            return f"{message}: {value[:60]!r} is not allowed"
    return message


def _app_for(arguments: Sequence[str]) -> typer.Typer:
    """Return the application with the requested command only, which is fast; with all for ``--help`` or an error."""
    if arguments and arguments[0] in MODULES:
        return _app_with([arguments[0]])
    return full_app()


def _app_with(names: Iterable[str]) -> typer.Typer:
    """Import the modules of commands and return an application that has these commands in this order."""
    for name in names:
        importlib.import_module(f".commands.{MODULES[name]}", __package__)
    registered = {info.name: info for info in app.registered_commands}
    selected = copy.copy(app)
    selected.registered_commands = [registered[name] for name in names]
    return selected


def _fail(message: str, code: int) -> int:
    print(f"translution: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code
