"""Tokens in files, as nanoGPT lays them out: train.bin and val.bin hold nothing but numbers.

train.bin               tokens to train on, little-endian
val.bin                 tokens held out
meta.json               TokenMeta; without it tokens are uint16
tokenizer.json          what made the tokens, where it was no plain bytes
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter

from translution.planner.common.errors import InputError, MissingPackageError
from translution.planner.common.schema import Schema, parse_json
from translution.planner.config.model import Positive

if TYPE_CHECKING:
    import numpy as np

TRAINING, HELD_OUT, META, TOKENIZER = "train.bin", "val.bin", "meta.json", "tokenizer.json"


class TokenMeta(Schema):
    """What a folder of tokens holds."""

    dtype: Literal["uint16", "uint32"] = "uint16"
    vocabulary: Positive | None = None
    """Tokens are below it."""
    tokenizer: str | None = None
    """File of the folder; null where tokens are bytes."""
    training_tokens: Positive | None = None
    held_out_tokens: Positive | None = None


_META: TypeAdapter[TokenMeta] = TypeAdapter(TokenMeta)


def read_meta(folder: Path) -> TokenMeta:
    """What a folder says of its tokens; uint16 if it says nothing.

    Raises:
        InputError: if there is no folder, or its meta.json is damaged.
    """
    if not folder.is_dir():
        raise InputError(
            f"data_path: {str(folder)!r} is not allowed: must be a folder with {TRAINING} and {HELD_OUT}, "
            "as translution prepare writes it"
        )
    path = folder / META
    try:
        return parse_json(_META, path.read_bytes(), str(path)) if path.exists() else TokenMeta()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def open_tokens(path: Path, dtype: str, expected: int | None) -> np.ndarray:
    """The tokens of a file, read from disk as they are asked for.

    Args:
        path: of the file.
        dtype: uint16 or uint32.
        expected: how many it must hold, if that is known.

    Raises:
        InputError: if it is absent, cannot be read or was cut off.
        MissingPackageError: without numpy.
    """
    try:
        import numpy as np
    except ImportError:
        raise MissingPackageError("numpy is missing: pip install 'translution-scale[train]'") from None
    item = np.dtype(dtype).newbyteorder("<")
    try:
        size = path.stat().st_size
        if size % item.itemsize:
            raise InputError(f"{path}: {size} bytes are cut off: must be a multiple of {item.itemsize}, for {dtype}")
        count = size // item.itemsize
        if expected is not None and count != expected:
            raise InputError(f"{path}: holds {count} tokens, must hold {expected} as {META} says: it was cut off?")
        # An empty file cannot be mapped.
        return np.memmap(path, dtype=item, mode="r") if count else np.zeros(0, dtype=item)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
