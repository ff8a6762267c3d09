"""Reading specs from YAML and JSON, and writing files that are whole or absent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError

SPEC_SUFFIXES = (".yaml", ".yml", ".json")


def read_mapping(path: Path) -> Any:
    """The content of a YAML or JSON file.

    Raises:
        InputError: if it is absent, unreadable or not YAML or JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not valid JSON: {error}") from None
    return read_yaml(text, str(path))


def read_yaml(text: str, what: str) -> Any:
    """The value of a YAML text.

    Raises:
        InputError: if it is not YAML, or holds a date that does not exist or endless nesting.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{what}: not valid YAML: {' '.join(str(error).split())}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, as `write_bytes` does.

    Raises:
        InputError: if the folder is absent or cannot be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole: under a temporary name beside it, then renamed.

    Raises:
        InputError: if the folder is absent or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


def check_new_folder(target: Path, *, marker: str, force: bool = False) -> bool:
    """Whether a folder that may be made or replaced exists.

    Args:
        target, marker, force: as in `new_folder`.

    Raises:
        InputError: if it exists and force is false, is of another kind, or cannot be looked at.
    """
    try:
        exists = target.exists()
        kind = (target / marker).is_file()
    except OSError as error:
        raise InputError(f"{str(target)[:200]}: cannot be written: {error.strerror}") from None
    if exists and not force:
        raise InputError(f"{target}: exists already: choose another folder or pass --force to replace it")
    if exists and not kind:
        raise InputError(f"{target}: is not replaced: --force replaces only a folder that holds {marker}")
    return exists


@contextlib.contextmanager
def new_folder(target: Path, *, marker: str, force: bool = False) -> Iterator[Path]:
    """A temporary folder that takes the name ``target`` when the block ends well.

    With ``force``, an existing folder keeps its name and whatever else it holds; the new files
    replace their namesakes one by one, the marker last.

    Args:
        target: the folder to make; its parents are made too.
        marker: a file of the new folder that tells its kind.
        force: allow an existing folder, if it holds the marker.

    Raises:
        InputError: if it exists and force is false, is of another kind, or cannot be written.
    """
    target = target.absolute()
    exists = check_new_folder(target, marker=marker, force=force)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temporary
        if exists:
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == marker):
                path.replace(target / path.name)
        else:
            temporary.chmod(0o755)
            temporary.rename(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary)
