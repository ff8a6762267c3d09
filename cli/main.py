"""Entry of the command line: import the requested command, run it, and turn errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import importlib
import io
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any

import typer

from translution.planner.common import TranslutionError, check_line, printable

from .commands import app
from .completion import words_to_complete

COST, PLAN, RUN, INSPECT = "What it costs", "Plan", "Run", "Inspect what ran"
PANELS = {
    COST: {
        "estimate": "What a model costs: parameters, memory, operations.",
        "compare": "Full Translution, α-Translution and attention compared.",
        "clusters": "GPUs and nodes that --cluster knows, with sources.",
    },
    PLAN: {
        "plan": "The fastest way to train a model that fits a cluster.",
        "serve": "Costs and plans as a page in a browser.",
        "calibrate": "Measure this machine, for better predicted times.",
    },
    RUN: {
        "prepare": "Make training data of texts or image archives.",
        "preflight": "Check whether a plan can run here or on hosts.",
        "launch": "Train a plan on this machine or on several hosts.",
        "export": "Write a run's network as one file.",
        "import": "Read a checkpoint of the authors' code.",
        "experiment": "Answer a question of the paper with small models.",
    },
    INSPECT: {
        "status": "How far each rank of a run is.",
        "verify": "Predicted against measured memory of a run.",
        "verify-checkpoint": "Compare checkpoints with their checksums.",
        "measure": "Run a few steps and compare memory with its prediction.",
        "rehearse": "Run one rank of a large plan alone, for its memory.",
        "report": "A page about plans, runs, models and experiments.",
    },
}
"""The visible commands by panel of ``translution --help``, with their lines there."""
MODULES = {
    "estimate": "planning.estimate",
    "compare": "planning.compare",
    "clusters": "planning.clusters",
    "plan": "planning.plan",
    "serve": "planning.serve",
    "calibrate": "measuring.calibrate",
    "prepare": "training.prepare",
    "preflight": "training.preflight",
    "launch": "training.launch",
    "export": "training.export",
    "import": "training.import_",
    "experiment": "measuring.experiment",
    "status": "training.status",
    "verify": "measuring.verify",
    "verify-checkpoint": "training.verify_checkpoint",
    "measure": "measuring.measure",
    "rehearse": "measuring.rehearse",
    "report": "planning.report",
    "train": "training.ranks",
    "rank": "training.ranks",
    "calibrate-rank": "training.ranks",
    "preflight-node": "training.ranks",
    "rehearse-rank": "training.ranks",
}
"""Name of every command, in the order of ``--help``, and its module in `commands`."""
SHORT = ("estimate", "clusters", "--help", "-h", "--version")
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
    fail = partial(_report, as_json="--json" in arguments)
    arguments = arguments or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        # An encoding that lacks a character, such as ASCII, shows a question mark.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    try:
        for word in arguments:
            check_line(word)
    except ValueError as error:
        return fail(f"argument: {error}", 2)
    with _warnings_as_notes():
        return _run_command(arguments, fail)


def _run_command(arguments: Sequence[str], fail: Callable[[str, int], int]) -> int:
    try:
        app_of_command = _app_for(arguments)
        if not gc.isenabled() and arguments and arguments[0] not in SHORT:
            gc.set_threshold(50_000, 20, 20)
            gc.enable()
        code = app_of_command(args=list(arguments), prog_name="translution", standalone_mode=False)
        sys.stdout.flush()
    except TranslutionError as error:
        return fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:
        # The program that reads our output, such as head, has exited.
        sys.stderr.close()
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        # What is left in the buffer must not fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return fail(f"standard output: cannot be written: {error.strerror}", 1)
    except Exception as error:
        # Typer's usage errors: their classes moved between versions, their interface did not.
        if not hasattr(error, "format_message"):
            if type(error).__name__ == "Abort":
                return fail("interrupted", 130)
            raise
        message = error.format_message() or "no command given: see translution --help"
        return fail(_with_value(message, arguments), 2)
    # Typer turns Ctrl-C into this code and prints nothing.
    return fail("interrupted", 130) if code == 130 else code if isinstance(code, int) else 0


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
    words = words_to_complete()
    first = (arguments if words is None else words)[:1]
    if first and first[0] in MODULES:
        return _app_with(first)
    return _app_with([]) if list(first) == ["--version"] else full_app()


def _app_with(names: Iterable[str]) -> typer.Typer:
    """Import the modules of commands and return an application that has these commands in this order."""
    for name in names:
        importlib.import_module(f".commands.{MODULES[name]}", __package__)
    registered = {info.name: info for info in app.registered_commands}
    selected = copy.copy(app)
    selected.registered_commands = [copy.copy(registered[name]) for name in names]
    for info in selected.registered_commands:
        for panel, lines in PANELS.items():
            if info.name in lines:
                info.rich_help_panel, info.short_help = panel, lines[info.name]
    return selected


def _report(message: str, code: int, *, as_json: bool) -> int:
    """Print an error on stderr, as one line of text or of JSON, and return its exit code."""
    text = printable(" ".join(message.split()))
    line = json.dumps({"error": text, "exit_code": code}) if as_json else f"translution: error: {text}"
    print(line, file=sys.stderr)
    return code
