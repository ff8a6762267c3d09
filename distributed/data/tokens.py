"""Text to train on: windows of tokens from files, or from the source of Python's own library."""

from __future__ import annotations

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

from translution.planner.common.errors import InputError
from translution.planner.config.model import GptSpec

from .base import Samples, DataSource
from .token_files import HELD_OUT, META, TRAINING, open_tokens, read_meta

STDLIB_BYTES = 8_000_000
"""The most that is read of Python's library."""
_OTHERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
"""Folders of the library's that hold no source of it."""
_HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class TokenWindows(DataSource):
    """Windows of a text side by side, each of the context's size; a token's target is the one after it."""

    tokens: np.ndarray
    """Numbers (T,), in memory or in a mapped file."""
    context: int
    vocabulary: int
    name: str
    """What error lines call the text."""

    def __post_init__(self) -> None:
        if len(self.tokens) <= self.context:
            raise InputError(
                f"{self.name}: {len(self.tokens)} tokens are not allowed: must be more than {self.context}, the context"
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def select(self, index: Tensor, epoch: int = 0) -> Samples:
        """The windows of an index tensor: inputs and targets (B, context), the same in every epoch.

        Raises:
            InputError: for a token that the model does not know.
        """
        windows = torch.empty(len(index), self.context + 1, dtype=torch.int64)
        for place, number in enumerate(index.tolist()):
            start = number * self.context
            windows.numpy()[place] = self.tokens[start : start + self.context + 1]
        if int(windows.max()) >= self.vocabulary:
            self._refuse(windows, index)
        return Samples(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    def _refuse(self, windows: Tensor, index: Tensor) -> None:
        place, within = torch.nonzero(windows >= self.vocabulary)[0].tolist()
        position = int(index[place]) * self.context + within
        raise InputError(
            f"{self.name}: token {int(windows[place, within])} at byte {position * self.tokens.itemsize} is not "
            f"allowed: must be below {self.vocabulary}, the model's vocabulary"
        )


def load_tokens(spec: GptSpec, folder: Path) -> tuple[TokenWindows, TokenWindows]:
    """The tokens of a folder: training and held-out.

    Args:
        spec: the model.
        folder: laid out as `token_files` describes.

    Raises:
        InputError: if a file is absent, damaged or too short, or the model's vocabulary too small.
        MissingPackageError: without numpy.
    """
    meta = read_meta(folder)
    if meta.vocabulary is not None and meta.vocabulary > spec.vocabulary:
        raise InputError(
            f"vocabulary: {spec.vocabulary} is not allowed: must be at least {meta.vocabulary}, as {folder / META} says"
        )

    def part(name: str, expected: int | None) -> TokenWindows:
        tokens = open_tokens(folder / name, meta.dtype, expected)
        return TokenWindows(tokens, spec.context, spec.vocabulary, str(folder / name))

    return part(TRAINING, meta.training_tokens), part(HELD_OUT, meta.held_out_tokens)


def stdlib_files(root: Path) -> Iterator[Path]:
    """Python sources under a folder, in an order that depends on their names alone."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _OTHERS)
        yield from (Path(folder) / name for name in sorted(names) if name.endswith(".py"))


def load_stdlib(spec: GptSpec, root: Path | None = None) -> tuple[TokenWindows, TokenWindows]:
    """The source of Python's standard library as bytes: training, and every tenth file held out.

    It differs between versions of Python, which is why it is said on stderr which one is read.

    Args:
        spec: the model.
        root: the library's folder; None takes that of this Python.

    Raises:
        InputError: if there is no source, or too little for the context.
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
    training, held_out = (
        TokenWindows(np.frombuffer(bytes(part), dtype=np.uint8), spec.context, spec.vocabulary, f"stdlib in {root}")
        for part in parts
    )
    return training, held_out
