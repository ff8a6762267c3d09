"""What a shell may complete: names of presets, clusters, GPUs and choices, for which the planner is imported late.

`translution --install-completion` installs it for bash, zsh or fish.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

from translution.planner.common import SPEC_SUFFIXES

Complete: TypeAlias = Callable[[str], list[str]]
"""Returns the words that may follow what has been typed."""
_VARIABLE = "_TRANSLUTION_COMPLETE"
"""Set by the scripts of the shells, as Typer names it."""


def words_to_complete() -> list[str] | None:
    """Return the words after ``translution`` of the line that a shell asks to complete; None if none does."""
    if not os.environ.get(_VARIABLE, "").startswith("complete_"):
        return None
    line = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS", "")
    return line.split()[1:]


def choices(*values: str) -> Complete:
    """Return a completion of fixed words."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """Complete a preset's name, or the path of a model file."""
    from translution.planner.config import PRESET_NAMES

    return [*_starting(PRESET_NAMES, incomplete), *_files(incomplete)]


def complete_cluster(incomplete: str) -> list[str]:
    """Complete a cluster: this machine's ranks, a number of a GPU, a node, or the path of a cluster file."""
    from translution.planner.common import usable_cores
    from translution.planner.hardware import load_catalog

    known = load_catalog()
    if counts := re.match(r"(\d+x)+", incomplete):
        return [counts[0] + name for name in _starting([*known.gpus, *known.nodes], incomplete[counts.end() :])]
    local = [f"cpu:{ranks}" for ranks in range(1, usable_cores() + 1)]
    eight = [f"8x{gpu}" for gpu in known.gpus]
    return [*_starting([*local, *eight, *known.nodes], incomplete), *_files(incomplete)]


def complete_gpu(incomplete: str) -> list[str]:
    """Complete the name of a GPU."""
    from translution.planner.hardware import load_catalog

    return _starting(load_catalog().gpus, incomplete)


def complete_data(incomplete: str) -> list[str]:
    """Complete a kind of training data."""
    from typing import get_args

    from translution.planner.config import DataKind

    return _starting(get_args(DataKind), incomplete)


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.lower().startswith(incomplete.lower())]


def _files(incomplete: str) -> list[str]:
    """Return the spec files and folders whose path begins with what has been incomplete."""
    folder, name = os.path.split(incomplete)
    try:
        entries = sorted(Path(folder or ".").iterdir())
    except OSError:
        return []
    found = []
    for path in entries:
        hidden = path.name.startswith(".") and not name.startswith(".")
        if not path.name.startswith(name) or hidden:
            continue
        shown = os.path.join(folder, path.name)  # noqa: PTH118  # keeps a leading ./
        if path.is_dir():
            found.append(f"{shown}/")
        elif path.suffix in SPEC_SUFFIXES:
            found.append(shown)
    return found
