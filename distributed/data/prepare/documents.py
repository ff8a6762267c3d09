"""Reads documents from files of several formats, one after the other.

A JSON-lines or Parquet file, or a folder that `save_to_disk` of Hugging Face's `datasets` wrote, has one document per
row, in the field or column ``text``, as OpenWebText and other collections of web pages have it.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from translution.planner.common import InputError, MissingPackageError, read_json

FIELD = "text"
"""Name of the field or column with the text of a document."""
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_DATASET_FILES = ("dataset_dict.json", "state.json")
_ROWS = 1000
"""Rows of a table that are in memory at once."""


def holds_documents(path: Path) -> bool:
    """Return True if a path names documents rather than plain text."""
    return path.name.endswith((*_JSON_SUFFIXES, ".parquet")) or path.is_dir()


def read_documents(path: Path) -> Iterator[tuple[str, bool | None]]:
    """Yield the documents of a file or folder, and whether each is held out.

    The second value is None where the source has no held-out part of its own.

    Raises:
        InputError: if the path is not as described in this module.
        MissingPackageError: if `datasets` is needed and not installed.
    """
    if path.name.endswith(_JSON_SUFFIXES):
        for text in _read_json_lines(path):
            yield text, None
        return
    splits = _open_dataset(path) if path.is_dir() else {"": _open_parquet(path)}
    held_out = next((name for name in ("val", "validation", "test") if name in splits), None)
    if "train" in splits and held_out is not None:
        for name in ("train", held_out):
            for text in _column(splits[name], path):
                yield text, name != "train"
        return
    for split in splits.values():
        for text in _column(split, path):
            yield text, None


def _read_json_lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            lines: IO[bytes] = file  # type: ignore[assignment]  # gzip's file is one too
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _document(line, f"{path}: line {number}")
    except EOFError:
        raise InputError(f"{path}: ends too early: the file is cut") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _document(line: bytes, where: str) -> str:
    row = read_json(line, where)
    text = row.get(FIELD) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{where}: must be an object with the text of a document: {{"{FIELD}": "..."}}')
    return text


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingPackageError("datasets is missing: pip install 'translution-scale[train]'") from None
    return datasets


def _open_parquet(path: Path) -> Any:
    _datasets()  # Names the package that brings pyarrow.
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None


def _open_dataset(path: Path) -> dict[str, Any]:
    if not any((path / name).is_file() for name in _DATASET_FILES):
        raise InputError(f"{path}: is no plain file, and no folder that save_to_disk of datasets wrote")
    try:
        loaded = _datasets().load_from_disk(str(path))
    except MissingPackageError:
        raise
    except Exception as error:  # Arrow, JSON and the file system raise errors of different kinds.
        raise InputError(f"{path}: cannot be read as a data set: {' '.join(str(error).split())[:200]}") from None
    return dict(loaded) if isinstance(loaded, dict) else {"": loaded}


def _column(table: Any, path: Path) -> Iterator[str]:
    """Yield the texts of a table of `datasets` or of a Parquet file."""
    is_parquet = hasattr(table, "iter_batches")
    names = table.schema_arrow.names if is_parquet else table.column_names
    if FIELD not in names:
        raise InputError(f"{path}: columns {', '.join(names)}: must include {FIELD}")
    batches = (
        (batch.to_pydict()[FIELD] for batch in table.iter_batches(_ROWS, columns=[FIELD]))
        if is_parquet
        else (table[start : start + _ROWS][FIELD] for start in range(0, len(table), _ROWS))
    )
    for batch in batches:
        for text in batch:
            if not isinstance(text, str):
                raise InputError(f"{path}: column {FIELD}: {str(text)[:40]!r} is not allowed: must be a text")
            yield text
