"""Windows of tokens, from token files or from the source of Python's standard library."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from translution.planner.common import InputError
from translution.planner.config import GptSpec

from .base import DataSource, Samples
from .token_files import HELD_OUT_FILE, META_FILE, TRAINING_FILE, open_tokens, read_meta

STDLIB_BYTES = 8_000_000
"""Maximum number of bytes read from Python's standard library."""
_OTHERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders under the standard library that are skipped."""
_HELD_OUT_EVERY = 10
_SAMPLED_BLOCKS, _BLOCK_TOKENS = 1024, 64
"""Number and length of the blocks whose content is part of the fingerprint."""
_SALT = 0x7011
"""Mixed into the seeds of random windows, so that they differ from those of other random draws."""


@dataclass(frozen=True)
class RandomWindows:
    """Windows that start at random tokens, at other ones in every epoch."""

    seed: int
    epoch_samples: int | None = None
    """Windows of an epoch; None takes as many as there are consecutive ones."""

    def start(self, number: int, epoch: int, starts: int) -> int:
        """Return the index of a window's first token, below `starts`."""
        return int(np.random.default_rng((_SALT, self.seed, epoch, number)).integers(starts))


@dataclass(frozen=True)
class TokenWindows(DataSource):
    """Windows of a text, each as long as the context; a token's target is the next token."""

    tokens: np.ndarray
    """Token numbers (T,), in memory or memory-mapped."""
    context: int
    vocabulary: int
    name: str
    """Name of the text in error messages."""
    random: RandomWindows | None = None
    """How windows are drawn; None takes consecutive ones."""

    def __post_init__(self) -> None:
        if len(self.tokens) <= self.context:
            raise InputError(
                f"{self.name}: {len(self.tokens)} tokens are not allowed: must be more than {self.context}, the context"
            )

    def __len__(self) -> int:
        if self.random is not None and self.random.epoch_samples is not None:
            return self.random.epoch_samples
        return (len(self.tokens) - 1) // self.context

    def _start(self, number: int, epoch: int) -> int:
        if self.random is None:
            return number * self.context
        return self.random.start(number, epoch, len(self.tokens) - self.context)

    def fingerprint(self) -> str:
        """Return a digest of the number of tokens and of blocks spread over the text."""
        digest = hashlib.sha256(str(len(self.tokens)).encode())
        for part in range(_SAMPLED_BLOCKS):
            start = len(self.tokens) * part // _SAMPLED_BLOCKS
            digest.update(np.asarray(self.tokens[start : start + _BLOCK_TOKENS], dtype="<u4").tobytes())
        return digest.hexdigest()

    def select(self, index: Tensor, epoch: int = 0) -> Samples:
        """Return the windows at the given indices: inputs and targets (B, context).

        Raises:
            InputError: if a token is outside the model's vocabulary.
        """
        windows = torch.empty(len(index), self.context + 1, dtype=torch.int64)
        for position, number in enumerate(index.tolist()):
            start = self._start(number, epoch)
            windows.numpy()[position] = self.tokens[start : start + self.context + 1]
        if int(windows.max()) >= self.vocabulary:
            self._reject(windows, index, epoch)
        return Samples(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    def _reject(self, windows: Tensor, index: Tensor, epoch: int) -> None:
        row, column = torch.nonzero(windows >= self.vocabulary)[0].tolist()
        position = self._start(int(index[row]), epoch) + column
        raise InputError(
            f"{self.name}: token {int(windows[row, column])} at byte {position * self.tokens.itemsize} is not "
            f"allowed: must be below {self.vocabulary}, the model's vocabulary"
        )


def load_tokens(spec: GptSpec, folder: Path, random: RandomWindows | None = None) -> tuple[TokenWindows, TokenWindows]:
    """Return the tokens of a folder: training and held-out samples.

    Args:
        spec: the model.
        folder: a token folder, laid out as described in `token_files`.
        random: how windows to train on are drawn; None takes consecutive ones.

    Raises:
        InputError: if a file is missing, damaged or too short, or the model's vocabulary is too small.
        MissingPackageError: if numpy is not installed.
    """
    meta = read_meta(folder)
    if meta.vocabulary is not None and meta.vocabulary > spec.vocabulary:
        raise InputError(
            f"vocabulary: {spec.vocabulary} is not allowed: "
            f"must be at least {meta.vocabulary}, as {folder / META_FILE} says"
        )

    def part(name: str, expected: int | None, random: RandomWindows | None) -> TokenWindows:
        tokens = open_tokens(folder / name, meta.dtype, expected)
        return TokenWindows(tokens, spec.context, spec.vocabulary, str(folder / name), random)

    return part(TRAINING_FILE, meta.training_tokens, random), part(HELD_OUT_FILE, meta.held_out_tokens, None)


def stdlib_files(root: Path) -> Iterator[Path]:
    """Yield the Python sources under a folder, ordered by name."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _OTHERS)
        yield from (Path(folder) / name for name in sorted(names) if name.endswith(".py"))


def load_stdlib(
    spec: GptSpec, root: Path | None = None, random: RandomWindows | None = None
) -> tuple[TokenWindows, TokenWindows]:
    """Return the source of Python's standard library as bytes: training and held-out samples.

    Every tenth file is held out. The source differs between Python versions, so the version is printed on stderr.

    Args:
        spec: the model.
        root: folder of the standard library; None uses the running Python's.
        random: how windows to train on are drawn; None takes consecutive ones.

    Raises:
        InputError: if there is no source, or too little for one context.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    parts: tuple[bytearray, bytearray] = bytearray(), bytearray()
    count = 0
    for path in stdlib_files(root):
        text = path.read_bytes()
        if len(parts[0]) + len(parts[1]) + len(text) > STDLIB_BYTES:
            break
        parts[count % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1].extend(text)
        count += 1
    size = len(parts[0]) + len(parts[1])
    print(f"data: stdlib of Python {platform.python_version()}, {count} files, {size} bytes", file=sys.stderr)

    def part(text: bytearray, random: RandomWindows | None) -> TokenWindows:
        tokens = np.frombuffer(bytes(text), dtype=np.uint8)
        return TokenWindows(tokens, spec.context, spec.vocabulary, f"stdlib in {root}", random)

    return part(parts[0], random), part(parts[1], None)
