"""A run's newest checkpoint as one safetensors file: the state dict of the network with whole tables.

The file is written from its beginning to its end, a piece of a parameter at a time, so that no more than a piece is in
memory, however large the model.

Source: the safetensors format, github.com/huggingface/safetensors: the header's length in 8 bytes, the header in JSON,
and the tensors' bytes, one after another, all little-endian.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from translution.models.networks import SPEC_KEY, empty_network
from translution.planner.common.errors import InputError
from translution.planner.common.schema import Schema
from translution.planner.plans.plan import version

from ..runs.folder import CHECKPOINT, require_run
from .manifest import newest
from .reader import MASTER, Stored

PIECE_ELEMENTS = 2**22
"""Elements that are in memory at once: 16 MiB in fp32."""
Dtype = Literal["fp32", "bf16"]
_DTYPES: dict[str, tuple[str, torch.dtype]] = {"fp32": ("F32", torch.float32), "bf16": ("BF16", torch.bfloat16)}
OnBytes = Callable[[int], None]


class Exported(Schema):
    """What was written."""

    out: Path
    run: Path
    step: int
    """Optimizer steps done by the checkpoint."""
    dtype: str
    tensors: int
    parameters: int
    file_bytes: int


def header(shapes: Mapping[str, tuple[int, ...]], dtype: str, metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with, its length included.

    Args:
        shapes: of the tensors, in the order of their bytes.
        dtype: one of "fp32" and "bf16".
        metadata: what else the file says.
    """
    code, kind = _DTYPES[dtype]
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * kind.itemsize
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    # The tensors begin at a multiple of 8.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _pieces(stored: Stored, name: str, numel: int) -> Iterator[Tensor]:
    buffer = torch.empty(min(PIECE_ELEMENTS, numel))
    for start in range(0, numel, PIECE_ELEMENTS):
        piece = buffer[: min(PIECE_ELEMENTS, numel - start)]
        stored.read(name, MASTER, start, piece)
        yield piece


def _write(
    file: BinaryIO, stored: Stored, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, on: OnBytes
) -> None:
    for name, shape in shapes.items():
        for piece in _pieces(stored, name, math.prod(shape)):
            on(file.write(piece.to(dtype).view(torch.uint8).numpy().data))


def export(
    run: Path, out: Path, *, dtype: Dtype = "fp32", force: bool = False, on_bytes: OnBytes = lambda _: None
) -> Exported:
    """Write the network of a run's newest checkpoint.

    Args:
        run: the run folder.
        out: the file to make.
        dtype: of the tensors; the master copy is rounded to bf16, where the training did so too.
        force: replace a file that exists.
        on_bytes: called with the bytes of every piece that was written.

    Raises:
        InputError: if the run has no whole checkpoint, or the file exists or cannot be written; nothing is left then.
    """
    saved = newest(require_run(run) / CHECKPOINT)
    if saved is None:
        raise InputError(f"{run / CHECKPOINT}: holds no whole checkpoint to export")
    if dtype not in _DTYPES:
        raise InputError(f"dtype: {dtype!r} is not allowed: must be one of {', '.join(_DTYPES)}")
    if out.exists() and not force:
        raise InputError(f"{out}: exists already: choose another file or pass --force to replace it")
    spec = saved.plan().model
    shapes = {name: tuple(value.shape) for name, value in empty_network(spec).state_dict().items()}
    stored = Stored(saved)
    for name in sorted({*shapes, *stored.numels}):
        asked, held = math.prod(shapes.get(name, (0,))), stored.numels.get(name, 0)
        if asked != held:
            raise InputError(f"{name}: {held} elements are not allowed: the model has {asked} ({stored.folder})")
    metadata = {
        "format": "pt", SPEC_KEY: spec.model_dump_json(), "step": str(saved.manifest.step),
        "made_by": f"translution-scale {version()}",
    }  # fmt: skip
    begin = header(shapes, dtype, metadata)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(begin)
            _write(file, stored, shapes, _DTYPES[dtype][1], on_bytes)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    parameters = sum(map(math.prod, shapes.values()))
    return Exported(
        out=out, run=run, step=saved.manifest.step, dtype=dtype, tensors=len(shapes), parameters=parameters,
        file_bytes=out.stat().st_size,
    )  # fmt: skip
