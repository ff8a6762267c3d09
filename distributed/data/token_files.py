"""Token files in nanoGPT's layout: train.bin and val.bin hold only token numbers.

train.bin               training tokens, little-endian
val.bin                 held-out tokens
meta.json               `TokenMeta`; without it, tokens are uint16
tokenizer.json          the tokenizer; absent if every byte is a token
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter

from translution.planner.common import InputError, Line, MissingPackageError, Positive, Schema, parse_json

if TYPE_CHECKING:
    import numpy as np

TRAINING_FILE, HELD_OUT_FILE, META_FILE, TOKENIZER_FILE = "train.bin", "val.bin", "meta.json", "tokenizer.json"


class TokenMeta(Schema):
    """Contents of a token folder."""

    dtype: Literal["uint16", "uint32"] = "uint16"
    vocabulary: Positive | None = None
    """Size of the vocabulary; every token is below it."""
    tokenizer: Line | None = None
    """Name of the tokenizer file in the folder; null if every byte is a token."""
    training_tokens: Positive | None = None
    """Number of tokens in train.bin."""
    held_out_tokens: Positive | None = None
    """Number of tokens in val.bin."""


_META: TypeAdapter[TokenMeta] = TypeAdapter(TokenMeta)


def read_meta(folder: Path) -> TokenMeta:
    """Read the meta.json of a token folder; without one, tokens are uint16.

    Raises:
        InputError: if the folder does not exist, or its meta.json is damaged.
    """
    if not folder.is_dir():
        raise InputError(
            f"data_path: {str(folder)!r} is not allowed: must be a folder with {TRAINING_FILE} and {HELD_OUT_FILE}, "
            "as translution prepare writes it"
        )
    path = folder / META_FILE
    try:
        return parse_json(_META, path.read_bytes(), str(path)) if path.exists() else TokenMeta()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def open_tokens(path: Path, dtype: str, expected: int | None) -> np.ndarray:
    """Memory-map the tokens of a file.

    Args:
        path: the token file.
        dtype: uint16 or uint32.
        expected: number of tokens that the file must hold, or None if unknown.

    Raises:
        InputError: if the file is missing, unreadable or truncated.
        MissingPackageError: if numpy is not installed.
    """
    try:
        import numpy as np
    except ImportError:
        raise MissingPackageError("numpy is missing: pip install 'translution-scale[train]'") from None
    item = np.dtype(dtype).newbyteorder("<")
    try:
        size = path.stat().st_size
        if size % item.itemsize:
            raise InputError(
                f"{path}: {size} bytes are not allowed: must be a multiple of {item.itemsize}, for {dtype}"
            )
        count = size // item.itemsize
        if expected is not None and count != expected:
            raise InputError(
                f"{path}: holds {count} tokens, must hold {expected} as {META_FILE} says: is the file truncated?"
            )
        # An empty file cannot be memory-mapped.
        return np.memmap(path, dtype=item, mode="r") if count else np.zeros(0, dtype=item)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
