"""The exceptions of the toolkit, each with the exit code that the command line gives it.

TranslutionError            anything a user can put right; exit code 2
├── InputError              a bad name, value, file or flag; exit code 2
├── DoesNotFitError         no room on the cluster for the plan that was asked for; exit code 3
├── MissingPackageError     an optional dependency or a system package is absent; exit code 2
└── RunFailedError          a rank failed, was killed or never reported; exit code 1
    └── InterruptedRunError Ctrl-C ended it; exit code 130
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TranslutionError(Exception):
    """Base of every error that the toolkit raises on purpose; its text is one line."""

    exit_code = 2


class InputError(TranslutionError):
    """A bad input; the text names the field, the value and what is allowed."""


class DoesNotFitError(TranslutionError):
    """The plan needs more memory than a rank of the cluster has."""

    exit_code = 3


class MissingPackageError(TranslutionError):
    """A package that this command needs is absent; the text says how to install it."""


class RunFailedError(TranslutionError):
    """A launched run did not end well on every rank."""

    exit_code = 1


class InterruptedRunError(RunFailedError):
    """Ctrl-C ended a run."""

    exit_code = 130


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name closest to a mistyped one, as a hint: `` (did you mean 'x'?)`` or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
