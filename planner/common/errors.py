"""The exceptions of the toolkit, each with the exit code of the command line.

TranslutionError            any error that the user can fix; exit code 2
├── InputError              an invalid name, value, file or flag; exit code 2
├── DoesNotFitError         the requested plan does not fit on the cluster; exit code 3
├── MissingPackageError     an optional dependency or a system package is missing; exit code 2
└── RunFailedError          a rank failed, was killed or never reported; exit code 1
    └── InterruptedRunError Ctrl-C ended the run; exit code 130
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TranslutionError(Exception):
    """Base of all errors that the toolkit raises on purpose; the text is one line."""

    exit_code = 2


class InputError(TranslutionError):
    """An invalid input; the text names the field, the value and the allowed values."""


class DoesNotFitError(TranslutionError):
    """The plan needs more memory than a rank of the cluster has."""

    exit_code = 3


class MissingPackageError(TranslutionError):
    """A package that the command needs is missing; the text explains how to install it."""


class RunFailedError(TranslutionError):
    """A launched run did not succeed on every rank."""

    exit_code = 1


class InterruptedRunError(RunFailedError):
    """Ctrl-C ended a run."""

    exit_code = 130


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint with the known name closest to a mistyped one, `` (did you mean 'x'?)``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
