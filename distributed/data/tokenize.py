"""Write token files from text files, one chunk at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from translution.planner.common import InputError, MissingPackageError, new_folder, write_text
from translution.planner.config import BYTES_VOCABULARY

from .token_files import HELD_OUT_FILE, META_FILE, TOKENIZER_FILE, TRAINING_FILE, TokenMeta

CHUNK_BYTES = 2**20
"""Bytes of text read into memory at once."""
_UINT16_TOKENS = 2**16

Encode = Callable[[bytes, str, int], Sequence[int]]
"""Tokens of a chunk of text, given the chunk, the name of its file and its byte offset there."""


def _encode_bytes(chunk: bytes, name: str, start: int) -> Sequence[int]:
    return chunk


def open_tokenizer(path: Path) -> tuple[Encode, int]:
    """Return a tokenizer's encoder and the size of its vocabulary.

    Args:
        path: a tokenizer.json of Hugging Face's `tokenizers`.

    Raises:
        InputError: if the file is missing or is not a tokenizer.
        MissingPackageError: if `tokenizers` is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingPackageError("tokenizers is missing: pip install 'translution-scale[train]'") from None
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"tokenizer: {str(path)!r} cannot be read: {error.strerror}") from None
    except Exception as error:  # tokenizers raises plain Exceptions.
        text = " ".join(str(error).split())[:200]
        raise InputError(f"tokenizer: {str(path)!r} is not allowed: must be a tokenizer.json: {text}") from None

    def encode(chunk: bytes, name: str, start: int) -> Sequence[int]:
        try:
            text = chunk.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: byte {start + error.start} is not UTF-8, which a tokenizer needs") from None
        tokens: Sequence[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return tokens

    # Token numbers may have gaps: an added token need not follow the others.
    return encode, max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0) + 1


def _line_end(buffer: bytes) -> int:
    """Return the end of the last complete line, or, within a very long line, of the last complete character."""
    end = buffer.rfind(b"\n") + 1
    if not end:
        end = len(buffer) - 1
        while end > 1 and buffer[end] & 0xC0 == 0x80:
            end -= 1
    return end


def find_split(file: BinaryIO, size: int, wanted: int) -> int:
    """Return the offset at which to split a text: the first line start at or after `wanted`.

    If no line starts there, the first start of a UTF-8 character is returned.

    Args:
        file: the text.
        size: its length in bytes.
        wanted: the preferred offset in bytes.
    """
    offset = max(0, wanted - 1)
    file.seek(offset)
    while more := file.read(CHUNK_BYTES):
        line = more.find(b"\n") + 1
        if line and offset + line < size:
            return offset + line
        offset += len(more)
    file.seek(wanted)
    following = file.read(4)
    return wanted + next((n for n, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)


def read_chunks(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int]]:
    """Read a range of a text in chunks that end with a line, or, within a very long line, with a character.

    Args:
        file: the text.
        start: start of the range in bytes.
        end: end of the range in bytes.

    Yields:
        A chunk and its byte offset.
    """
    while start < end:
        file.seek(start)
        chunk = file.read(min(CHUNK_BYTES, end - start))
        if not chunk:
            return
        if start + len(chunk) < end:
            chunk = chunk[: _line_end(chunk)]
        yield chunk, start
        start += len(chunk)


def _write(texts: Sequence[Path], folder: Path, encode: Encode, dtype: str, share: float) -> tuple[int, int]:
    """Write both token files; return the number of training and held-out tokens."""
    import numpy as np

    counts = [0, 0]
    with (folder / TRAINING_FILE).open("wb") as training, (folder / HELD_OUT_FILE).open("wb") as held_out:
        for text in texts:
            for part, output in enumerate((training, held_out)):
                for chunk, start in _read(text, share, part):
                    tokens = encode(chunk, str(text), start)
                    raw = np.frombuffer(tokens, np.uint8) if isinstance(tokens, bytes) else np.array(tokens)
                    output.write(raw.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
                    counts[part] += len(tokens)
    return counts[0], counts[1]


def _read(text: Path, share: float, part: int) -> Iterator[tuple[bytes, int]]:
    """Read the chunks of a text's training part (0) or held-out part (1)."""
    try:
        with text.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            split = find_split(file, size, round(size * (1 - share)))
            ends = (0, split, size)
            yield from read_chunks(file, ends[part], ends[part + 1])
    except OSError as error:
        raise InputError(f"{text}: cannot be read: {error.strerror}") from None


def _check_text(text: Path) -> None:
    if not text.is_file():
        raise InputError(f"{text}: {'is no plain file' if text.exists() else 'no such file'}")
    if not os.access(text, os.R_OK):
        raise InputError(f"{text}: cannot be read: no right to")


def prepare_tokens(
    texts: Sequence[Path],
    out: Path,
    *,
    tokenizer: Path | None = None,
    held_out: float = 0.1,
    force: bool = False,
) -> TokenMeta:
    """Tokenize text files into a token folder, which is written completely or not at all.

    Args:
        texts: text files; the end of each is held out, from the start of a line.
        out: the token folder to create.
        tokenizer: a tokenizer.json; None makes every byte a token.
        held_out: fraction of each text that is held out, between 0 and 1.
        force: replace an existing token folder.

    Returns:
        The contents of the token folder.

    Raises:
        InputError: if a text or the tokenizer is missing, unreadable or not UTF-8, `held_out` is out of range,
            there is too little text, or the folder cannot be written.
        MissingPackageError: if numpy or `tokenizers` is not installed.
    """
    if not 0 < held_out < 1:
        raise InputError(f"held-out: {held_out} is not allowed: must be above 0 and below 1")
    try:
        import numpy as np  # noqa: F401 - checks that it is installed
    except ImportError:
        raise MissingPackageError("numpy is missing: pip install 'translution-scale[train]'") from None
    for text in texts:
        _check_text(text)
    encode, vocabulary = (_encode_bytes, BYTES_VOCABULARY) if tokenizer is None else open_tokenizer(tokenizer)
    dtype = "uint16" if vocabulary <= _UINT16_TOKENS else "uint32"
    with new_folder(out, marker=META_FILE, force=force) as folder:
        counts = _write(texts, folder, encode, dtype, held_out)
        if min(counts) < 2:
            raise InputError(
                f"texts: {counts[0]} tokens to train on and {counts[1]} held out are not allowed: "
                "must be 2 or more each"
            )
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
        values = {
            "dtype": dtype,
            "vocabulary": vocabulary,
            "tokenizer": None if tokenizer is None else TOKENIZER_FILE,
            "training_tokens": counts[0],
            "held_out_tokens": counts[1],
        }
        meta = TokenMeta.model_validate(values)
        write_text(folder / META_FILE, meta.model_dump_json(indent=2) + "\n")
    return meta
