"""The failure of a rank in words: what went wrong, and whether the rank itself is the cause."""

from __future__ import annotations

import errno
import os
import shutil
import traceback
from collections.abc import Iterable
from pathlib import Path

from ..runs.progress import Cause
from ..runs.verdict import tells_lost_connection

_FULL_BYTES = 16 * 2**20
"""A drive with less room is full: what a rank could not write may have been larger than what is left."""
_WRITES = (
    "pytorchstreamwriter", "inline_container", "unexpected pos", "file write failed", "parent directory", "aio",
    "swap", "no space",
)  # fmt: skip
"""What messages of a failed write or read of a file contain, in lower case."""


def describe_failure(error: BaseException, folders: Iterable[Path]) -> tuple[str, Cause]:
    """Return an error in one line of words, and whether the rank caused it or only lost its connection to others.

    Args:
        error: what ended the rank.
        folders: folders that the rank writes to; a full, read-only or missing one is named.
    """
    chain = list(_chain(error))
    text = f"{type(error).__name__}: {_words(error)}"
    if any(_is_connection(each) for each in chain):
        return text, "connection"
    if any(_is_about_files(each) for each in chain) and (trouble := _missing_file(error) or _trouble(folders)):
        text = f"{text}; {trouble}"
    return text, "own"


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    """Yield an error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _words(error: BaseException) -> str:
    """Return an error's message; for one without a message, the line of code that raised it."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    if text := " ".join(str(error).split()):
        return text[:500]
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "without a message"
    last = frames[-1]
    return f"without a message, from `{last.line}` in {Path(last.filename).name}, line {last.lineno}"


def _is_connection(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.filename:
        return False
    return type(error).__name__.startswith("Dist") or tells_lost_connection(str(error))


def _is_about_files(error: BaseException) -> bool:
    if isinstance(error, OSError | AssertionError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in _WRITES)


def _missing_file(error: BaseException) -> str:
    """Return which file is missing, if the function that failed has its path in a variable."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for name in ("path", "swap_path", "filename"):
            path = frame.f_locals.get(name)
            if isinstance(path, str) and Path(path).is_absolute() and not Path(path).exists():
                return f"{path} does not exist any more"
    return ""


def _trouble(folders: Iterable[Path]) -> str:
    """Return what is wrong with the first folder in trouble; an empty string if all can be written."""
    for folder in folders:
        if not folder.exists():
            return f"{folder} does not exist any more"
        try:
            if os.statvfs(folder).f_flag & os.ST_RDONLY or not os.access(folder, os.W_OK):
                return f"{folder} cannot be written: {os.strerror(errno.EROFS)}"
            free = shutil.disk_usage(folder).free
        except OSError as error:
            return f"{folder} cannot be read: {error.strerror}"
        if free < _FULL_BYTES:
            return f"{os.strerror(errno.ENOSPC)}: {folder} has {free:,} bytes left"
    return ""
