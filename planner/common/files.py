"""Read specs from YAML and JSON, and write files and folders atomically: readers see all of a file or none of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError
from .types import check_line

SPEC_SUFFIXES = (".yaml", ".yml", ".json")
MOST_YAML_VALUES = 100_000
"""Values of a YAML text, with aliases written out, of which the largest spec has some hundred."""
MOST_JSON_LEVELS = 64
"""Objects and arrays of a JSON text that may be nested; charts of a report have fewer than twenty."""


def read_mapping(path: Path) -> Any:
    """Return the content of a YAML or JSON file.

    Raises:
        InputError: if the file is missing, unreadable, or not valid YAML or JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not text in UTF-8: see its byte {error.start + 1}") from None
    return read_json(text, str(path)) if path.suffix == ".json" else read_yaml(text, str(path))


def read_json(text: str | bytes, what: str) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the JSON text.
        what: name of the text, which begins the error line.

    Raises:
        InputError: if the text is not valid JSON, an object has a key twice, or it is nested more deeply than
            `MOST_JSON_LEVELS`: to print or to validate such a value could take more frames than Python has.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object_of_pairs)
    except _RepeatedKeyError:
        found = text if isinstance(text, str) else text.decode(json.detect_encoding(text))
        raise InputError(f"{what}: {_repeated_json_key(found)}") from None
    except RecursionError:
        raise InputError(f"{what}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{what}: not valid JSON: {error}") from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_JSON_LEVELS):
        if not level:
            return value
        parts = (part for outer in level for part in (outer.values() if isinstance(outer, dict) else outer))
        level = [part for part in parts if isinstance(part, dict | list)]
    if level:
        raise InputError(f"{what}: not valid JSON: nested too deeply: at most {MOST_JSON_LEVELS} levels are allowed")
    return value


class _RepeatedKeyError(Exception):
    """An object has a key twice."""


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of its keys and values, of which json keeps the last one of equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedKeyError
    return found


def _describe_repeated(key: str, first: int, second: int) -> str:
    return f"key {key!r} is not allowed twice: it is on line {first} and again on line {second}"


_JSON_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}]', re.DOTALL)


def _repeated_json_key(text: str) -> str:
    """Describe the first repeated key of a valid JSON text; the parser itself tells no lines."""
    objects: list[dict[str, int]] = []
    for token in _JSON_TOKEN.finditer(text):
        if token[0] == "{":
            objects.append({})
        elif token[0] == "}":
            objects.pop()
        elif token[2]:
            key, line = json.loads(token[1]), text.count("\n", 0, token.start()) + 1
            if key in objects[-1]:
                return _describe_repeated(key, objects[-1][key], line)
            objects[-1][key] = line
    return "a key is not allowed twice"


def require_line(path: Path, what: str) -> None:
    """Refuse a path with control characters, which would get into messages, scripts and command lines.

    Args:
        path: the path.
        what: name of the path, which begins the error line.

    Raises:
        InputError: with the path and what is allowed.
    """
    try:
        check_line(str(path))
    except ValueError as error:
        raise InputError(f"{what}: {error}") from None


def read_yaml(text: str, what: str) -> Any:
    """Return the value of a YAML text.

    Args:
        text: the YAML text.
        what: name of the text, which begins the error line.

    Raises:
        InputError: if the text is not valid YAML, contains an impossible date, is nested too deeply, has a key twice,
            or has more values than `MOST_YAML_VALUES` when its aliases are written out.
    """
    import yaml

    try:
        # Aliases are references, which nothing has written out yet: a few lines can stand for billions of values.
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        values = _count_values(tree, {})
        if values > MOST_YAML_VALUES:
            raise InputError(
                f"{what}: more than {MOST_YAML_VALUES:,} values are not allowed; with aliases it has {values:,}"
            )
        if (repeated := _repeated_yaml_key(tree)) is not None:
            raise InputError(f"{what}: {repeated}")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{what}: not valid YAML: {' '.join(str(error).split())}") from None


def _repeated_yaml_key(root: Any) -> str | None:
    """Describe the first key that a mapping of a YAML tree has twice; None if there is none.

    YAML itself keeps the last of equal keys and says nothing.
    """
    import yaml

    nodes, known = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in known or not isinstance(node, yaml.CollectionNode):
            continue
        known.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += reversed(node.value)
            continue
        keys: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                # A merge, "<<", may be written several times: what it brings in gives way to the mapping's own keys.
                if (key.tag, key.value) in keys and key.tag != "tag:yaml.org,2002:merge":
                    return _describe_repeated(key.value, keys[key.tag, key.value], line)
                keys[key.tag, key.value] = line
        nodes += [value for _, value in reversed(node.value)]
    return None


def _count_values(node: Any, counted: dict[int, int]) -> int:
    """Return the number of values of a YAML node with its aliases written out.

    Args:
        node: the node; None is an empty text.
        counted: the numbers of nodes that are known, by identity; 0 for those that are being counted.
    """
    if node is None or isinstance(node.value, str):
        return 1
    if id(node) in counted:
        if not counted[id(node)]:
            raise ValueError("a value contains itself")
        return counted[id(node)]
    counted[id(node)] = 0
    parts = (part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,)))
    counted[id(node)] = 1 + sum(_count_values(part, counted) for part in parts)
    return counted[id(node)]


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a text file atomically, as `write_bytes` does.

    Raises:
        InputError: if the folder is absent or cannot be written.
    """
    write_bytes(path, text.encode(), durable=durable)


def write_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file atomically: under a temporary name in the same folder, then renamed.

    Args:
        path: the file.
        content: what it holds afterwards.
        durable: flush it before and its folder after the renaming, so that a power loss leaves the old or the new file.

    Raises:
        InputError: if the folder is absent or cannot be written.
    """
    # Nobody can have prepared a link under a name that is drawn now and must be new.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            flush_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


def flush_folder(folder: Path) -> None:
    """Make the names in a folder durable.

    Raises:
        OSError: if it cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_new_file(path: Path, what: str, *, force: bool = False) -> None:
    """Check that a file may be written, before the work on its content begins.

    Args:
        path: the file.
        what: name of the path, such as the option that gives it; begins the error line.
        force: accept an existing file, which is then replaced.

    Raises:
        InputError: if its folder is absent, or it exists and force is false, or is no regular file.
    """
    if not path.parent.is_dir():
        raise InputError(f"{what}: {str(path)!r} is not allowed: {path.parent} must be a folder")
    if path.exists() and not path.is_file():
        raise InputError(f"{what}: {str(path)!r} is not allowed: must be a file")
    if not force and (path.exists() or path.is_symlink()):
        raise InputError(f"{what}: {path} exists already: choose another file or pass --force to replace it")


def check_new_folder(target: Path, *, marker: str, force: bool = False) -> bool:
    """Check that `new_folder` may create or replace a folder; return True if the folder exists.

    Args:
        target, marker, force: as in `new_folder`.

    Raises:
        InputError: if the folder exists and force is false, does not hold the marker, or cannot be accessed, or its
            path holds control characters.
    """
    require_line(target, "folder")
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
    """Yield a temporary folder, and rename it to ``target`` when the block ends without an error.

    With ``force``, an existing folder stays and keeps its other files; the new files replace the files of
    the same names one by one, the marker last.

    Args:
        target: the folder to create; missing parents are created too.
        marker: name of a file in the new folder that identifies its kind, such as ``plan.json``.
        force: accept an existing folder if it holds the marker.

    Raises:
        InputError: if the folder exists and force is false, does not hold the marker, or cannot be written.
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
