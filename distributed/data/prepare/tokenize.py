"""Writes token files from texts, one chunk at a time, or from documents."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from translution.planner.common import InputError, MissingPackageError, new_folder, write_text
from translution.planner.config import BYTES_VOCABULARY

from ..token_files import HELD_OUT_FILE, META_FILE, TOKENIZER_FILE, TRAINING_FILE, TokenMeta
from .documents import holds_documents, read_documents

CHUNK_BYTES = 2**20
"""Bytes of text read into memory at once."""
_UINT16_TOKENS = 2**16

END_OF_TEXT = "<|endoftext|>"
"""Token that GPT-2's and similar tokenizers have for the end of a document."""
_DOCUMENTS = 1000
"""Documents that are tokenized at once, on all processors."""
_SEED = 2357
"""Seed of the choice of held-out documents."""


class Encoder:
    """Turns text into tokens; without a tokenizer every byte is a token."""

    vocabulary = BYTES_VOCABULARY
    """Number of different tokens."""

    def encode(self, chunk: bytes, name: str, start: int) -> Sequence[int]:
        """Return the tokens of a chunk of text.

        Args:
            chunk: the text in UTF-8.
            name: name of its file, for messages.
            start: its byte offset there, for messages.

        Raises:
            InputError: if a tokenizer is given bytes that are not UTF-8.
        """
        del name, start
        return chunk

    def encode_documents(self, documents: list[str]) -> list[Sequence[int]]:
        """Return the tokens of documents, each with the token for its end, or a line end without a tokenizer."""
        # A lone surrogate, which JSON can express, is no character of UTF-8.
        return [document.encode("utf-8", "replace") + b"\n" for document in documents]


class TokenizerEncoder(Encoder):
    """Encodes with a tokenizer of Hugging Face's `tokenizers`.

    Args:
        path: its tokenizer.json.

    Raises:
        InputError: if the file is missing or is not a tokenizer.
        MissingPackageError: if `tokenizers` is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise MissingPackageError("tokenizers is missing: pip install 'translution-scale[train]'") from None
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"tokenizer: {str(path)!r} cannot be read: {error.strerror}") from None
        except Exception as error:  # tokenizers raises plain Exceptions.
            text = " ".join(str(error).split())[:200]
            raise InputError(f"tokenizer: {str(path)!r} is not allowed: must be a tokenizer.json: {text}") from None
        known = self._tokenizer.get_vocab(with_added_tokens=True)
        # Token numbers may have gaps: an added token need not follow the others.
        self.vocabulary = max(known.values(), default=0) + 1
        self._end = known.get(END_OF_TEXT)
        self._path = path

    def encode(self, chunk: bytes, name: str, start: int) -> Sequence[int]:
        """Return the tokens of a chunk of text, as `Encoder.encode` describes."""
        try:
            text = chunk.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: byte {start + error.start} is not UTF-8, which a tokenizer needs") from None
        tokens: Sequence[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return tokens

    def encode_documents(self, documents: list[str]) -> list[Sequence[int]]:
        """Return the tokens of documents, each with the token for its end; the text of a special token is plain text.

        Raises:
            InputError: if the tokenizer has no token for the end.
        """
        if self._end is None:
            raise InputError(f"tokenizer: {str(self._path)!r} has no token {END_OF_TEXT}, which separates documents")
        self._tokenizer.encode_special_tokens = True
        plain = [document.encode("utf-8", "replace").decode("utf-8") for document in documents]
        return [[*made.ids, self._end] for made in self._tokenizer.encode_batch(plain, add_special_tokens=False)]


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


class _TokenWriter:
    """Appends tokens to the two files of a token folder.

    Args:
        files: the open files, of training and of held-out tokens.
        encoder: makes the tokens.
        dtype: dtype of the files.
        share: fraction that is held out.
    """

    def __init__(self, files: tuple[BinaryIO, BinaryIO], encoder: Encoder, dtype: str, share: float) -> None:
        import numpy as np

        self.files, self.encoder, self.share = files, encoder, share
        self.counts = [0, 0]
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._random = np.random.default_rng(_SEED)

    def _append(self, part: int, tokens: Sequence[int]) -> None:
        import numpy as np

        raw = np.frombuffer(tokens, np.uint8) if isinstance(tokens, bytes) else np.array(tokens)
        self.files[part].write(raw.astype(self._dtype).tobytes())
        self.counts[part] += len(tokens)

    def write_text(self, text: Path) -> None:
        """Tokenize a text, whose end is held out."""
        for part in (0, 1):
            for chunk, start in _read(text, self.share, part):
                self._append(part, self.encoder.encode(chunk, str(text), start))

    def write_documents(self, path: Path) -> None:
        """Tokenize documents, of which some are held out: those of the source's own held-out part, or random ones."""
        documents = read_documents(path)
        while rows := list(islice(documents, _DOCUMENTS)):
            tokens = self.encoder.encode_documents([text for text, _ in rows])
            for (_, is_held_out), encoded in zip(rows, tokens, strict=True):
                chosen = self._random.random() < self.share if is_held_out is None else is_held_out
                self._append(int(chosen), encoded)


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
    if not text.is_file() and not (text.is_dir() and holds_documents(text)):
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
    """Tokenize texts into a token folder, which is written completely or not at all.

    Args:
        texts: text files, of each of which the end is held out, from the start of a line; or documents, as `documents`
            describes them.
        out: the token folder to create.
        tokenizer: a tokenizer.json; None makes every byte a token.
        held_out: fraction of each text, or of the documents, that is held out, between 0 and 1; documents with a
            held-out part of their own keep it.
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
    encoder = Encoder() if tokenizer is None else TokenizerEncoder(tokenizer)
    dtype = "uint16" if encoder.vocabulary <= _UINT16_TOKENS else "uint32"
    with new_folder(out, marker=META_FILE, force=force) as folder:
        with (folder / TRAINING_FILE).open("wb") as training, (folder / HELD_OUT_FILE).open("wb") as held:
            writer = _TokenWriter((training, held), encoder, dtype, held_out)
            for text in texts:
                (writer.write_documents if holds_documents(text) else writer.write_text)(text)
        counts = writer.counts
        if min(counts) < 2:
            raise InputError(
                f"texts: {counts[0]} tokens to train on and {counts[1]} held out are not allowed: "
                "must be 2 or more each"
            )
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
        values = {
            "dtype": dtype,
            "vocabulary": encoder.vocabulary,
            "tokenizer": None if tokenizer is None else TOKENIZER_FILE,
            "training_tokens": counts[0],
            "held_out_tokens": counts[1],
        }
        meta = TokenMeta.model_validate(values)
        write_text(folder / META_FILE, meta.model_dump_json(indent=2) + "\n")
    return meta
