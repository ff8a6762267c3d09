"""Makes token files from text files, a piece at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from translution.planner.common.errors import InputError, MissingPackageError
from translution.planner.common.files import new_folder, write_text
from translution.planner.config.datasets import BYTES_VOCABULARY

from .token_files import HELD_OUT, META, TOKENIZER, TRAINING, TokenMeta

CHUNK_BYTES = 2**20
"""About so much of a text is in memory at once."""
_UINT16_TOKENS = 2**16

Encode = Callable[[bytes, str, int], Sequence[int]]
"""Tokens of a piece of text, given its file and its place there in bytes."""


def _encode_bytes(piece: bytes, name: str, start: int) -> Sequence[int]:
    return piece


def open_tokenizer(path: Path) -> tuple[Encode, int]:
    """What encodes with a tokenizer, and the size of its vocabulary.

    Args:
        path: a tokenizer.json of Hugging Face's `tokenizers`.

    Raises:
        InputError: if it is absent or none.
        MissingPackageError: without `tokenizers`.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingPackageError("tokenizers is missing: pip install 'translution-scale[train]'") from None
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"tokenizer: {str(path)!r} cannot be read: {error.strerror}") from None
    except Exception as error:  # Its own errors have no class but this one.
        text = " ".join(str(error).split())[:200]
        raise InputError(f"tokenizer: {str(path)!r} is not allowed: must be a tokenizer.json: {text}") from None

    def encode(piece: bytes, name: str, start: int) -> Sequence[int]:
        try:
            text = piece.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: byte {start + error.start} is not UTF-8, which a tokenizer needs") from None
        tokens: Sequence[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return tokens

    # Numbers may have gaps: an added token need not follow the others.
    return encode, max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0) + 1


def _line_end(buffer: bytes) -> int:
    """Where the last whole line ends; in one that is very long, where its last whole character does."""
    end = buffer.rfind(b"\n") + 1
    if not end:
        end = len(buffer) - 1
        while end > 1 and buffer[end] & 0xC0 == 0x80:
            end -= 1
    return end


def find_split(file: BinaryIO, size: int, wanted: int) -> int:
    """The first beginning of a line, or if no line begins there the first of a UTF-8 character, at a place or later.

    Args:
        file: the text.
        size: its length in bytes.
        wanted: the place in bytes.
    """
    place = max(0, wanted - 1)
    file.seek(place)
    while more := file.read(CHUNK_BYTES):
        line = more.find(b"\n") + 1
        if line and place + line < size:
            return place + line
        place += len(more)
    file.seek(wanted)
    following = file.read(4)
    return wanted + next((n for n, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)


def pieces(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int]]:
    """A stretch of a text in pieces that end with a line, or where a line is very long with a character.

    Args:
        file: the text.
        start: where the stretch begins, in bytes.
        end: where it ends.

    Yields:
        A piece, and its place in bytes.
    """
    while start < end:
        file.seek(start)
        piece = file.read(min(CHUNK_BYTES, end - start))
        if not piece:
            return
        if start + len(piece) < end:
            piece = piece[: _line_end(piece)]
        yield piece, start
        start += len(piece)


def _write(texts: Sequence[Path], folder: Path, encode: Encode, dtype: str, share: float) -> tuple[int, int]:
    """Write both token files; how many tokens they hold."""
    import numpy as np

    counts = [0, 0]
    with (folder / TRAINING).open("wb") as training, (folder / HELD_OUT).open("wb") as held_out:
        for text in texts:
            for part, output in enumerate((training, held_out)):
                for piece, start in _read(text, share, part):
                    tokens = encode(piece, str(text), start)
                    raw = np.frombuffer(tokens, np.uint8) if isinstance(tokens, bytes) else np.array(tokens)
                    output.write(raw.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
                    counts[part] += len(tokens)
    return counts[0], counts[1]


def _read(text: Path, share: float, part: int) -> Iterator[tuple[bytes, int]]:
    """The pieces of a text that are to be trained on, or those held out."""
    try:
        with text.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            cut = find_split(file, size, round(size * (1 - share)))
            ends = (0, cut, size)
            yield from pieces(file, ends[part], ends[part + 1])
    except OSError as error:
        raise InputError(f"{text}: cannot be read: {error.strerror}") from None


def _check_text(text: Path) -> None:
    if not text.is_file():
        raise InputError(f"{text}: {'is no plain file' if text.exists() else 'no such file'}")
    if not os.access(text, os.R_OK):
        raise InputError(f"{text}: cannot be read: no right to")


def prepare(
    texts: Sequence[Path],
    out: Path,
    *,
    tokenizer: Path | None = None,
    held_out: float = 0.1,
    force: bool = False,
) -> TokenMeta:
    """Write a folder of tokens, whole or not at all.

    Args:
        texts: text files; the end of each is held out, from the beginning of a line.
        out: the folder to make.
        tokenizer: a tokenizer.json; None makes every byte a token.
        held_out: share of each text that is held out.
        force: replace a folder of tokens that exists.

    Returns:
        What the folder says of itself.

    Raises:
        InputError: for a text or tokenizer that is absent, cannot be read or is not UTF-8, a bad
            share, too little text, or a folder that cannot be written.
        MissingPackageError: without numpy or `tokenizers`.
    """
    if not 0 < held_out < 1:
        raise InputError(f"held-out: {held_out} is not allowed: must be above 0 and below 1")
    try:
        import numpy as np  # noqa: F401
    except ImportError:
        raise MissingPackageError("numpy is missing: pip install 'translution-scale[train]'") from None
    for text in texts:
        _check_text(text)
    encode, vocabulary = (_encode_bytes, BYTES_VOCABULARY) if tokenizer is None else open_tokenizer(tokenizer)
    dtype = "uint16" if vocabulary <= _UINT16_TOKENS else "uint32"
    with new_folder(out, marker=META, force=force) as folder:
        counts = _write(texts, folder, encode, dtype, held_out)
        if min(counts) < 2:
            raise InputError(
                f"texts: {counts[0]} tokens to train on and {counts[1]} held out are not allowed: "
                "must be 2 or more each"
            )
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / TOKENIZER)
        values = {
            "dtype": dtype,
            "vocabulary": vocabulary,
            "tokenizer": None if tokenizer is None else TOKENIZER,
            "training_tokens": counts[0],
            "held_out_tokens": counts[1],
        }
        meta = TokenMeta.model_validate(values)
        write_text(folder / META, meta.model_dump_json(indent=2) + "\n")
    return meta
