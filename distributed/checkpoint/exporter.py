"""Exports a run's newest or best checkpoint as one safetensors file: the state dict of the network without tiles.

The file is written sequentially, a piece of a parameter at a time, so memory does not grow with the model.

Source: the safetensors format, github.com/huggingface/safetensors: the length of the header in 8 bytes, the header in
JSON, and the bytes of the tensors, all little-endian.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from translution.models.networks import empty_network
from translution.planner.common import InputError, Schema
from translution.planner.config import SPEC_KEY, ModelSpec
from translution.planner.plans import version

from ..runs.folder import CHECKPOINT, find_run
from .manifest import best_checkpoint, newest_checkpoint
from .reader import MASTER_COPY, CheckpointReader

PIECE_ELEMENTS = 2**22
"""Number of elements in memory at once: 16 MiB in fp32."""
Dtype = Literal["fp32", "bf16"]
_DTYPES: dict[str, tuple[str, torch.dtype]] = {"fp32": ("F32", torch.float32), "bf16": ("BF16", torch.bfloat16)}
OnBytes = Callable[[int], None]


class ExportedFile(Schema):
    """Description of an exported file."""

    out: Path
    """Path of the file."""
    run: Path
    """Run folder of the checkpoint."""
    step: int
    """Number of optimizer steps done at the checkpoint."""
    dtype: str
    """Dtype of the tensors, "fp32" or "bf16"."""
    tensors: int
    """Number of tensors."""
    parameters: int
    """Number of elements of all tensors."""
    file_bytes: int
    """Size of the file in bytes."""


def safetensors_header(shapes: Mapping[str, tuple[int, ...]], dtype: str, metadata: Mapping[str, str]) -> bytes:
    """Return the header of a safetensors file, preceded by its length.

    Args:
        shapes: shapes of the tensors by name, in the order of the file.
        dtype: "fp32" or "bf16".
        metadata: further strings to store.
    """
    code, kind = _DTYPES[dtype]
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * kind.itemsize
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    # The tensors must start at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _pieces(reader: CheckpointReader, name: str, numel: int) -> Iterator[Tensor]:
    buffer = torch.empty(min(PIECE_ELEMENTS, numel))
    for start in range(0, numel, PIECE_ELEMENTS):
        piece = buffer[: min(PIECE_ELEMENTS, numel - start)]
        reader.read(name, MASTER_COPY, start, piece)
        yield piece


def _write(
    file: BinaryIO,
    reader: CheckpointReader,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    on_bytes: OnBytes,
) -> None:
    for name, shape in shapes.items():
        for piece in _pieces(reader, name, math.prod(shape)):
            on_bytes(file.write(piece.to(dtype).view(torch.uint8).numpy().data))


def network_metadata(spec: ModelSpec) -> dict[str, str]:
    """Return what a file of this project says of its network."""
    return {"format": "pt", SPEC_KEY: spec.model_dump_json(), "made_by": f"translution-scale {version()}"}


def check_new(out: Path, *, force: bool) -> None:
    """Check that a file may be written.

    Raises:
        InputError: if it exists and may not be replaced.
    """
    if out.exists() and not force:
        raise InputError(f"{out}: exists already: choose another file or pass --force to replace it")


@contextlib.contextmanager
def new_file(out: Path) -> Iterator[BinaryIO]:
    """Open a file that appears, or replaces another, only when the block has ended without an error.

    Raises:
        InputError: if it cannot be written; nothing is left.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def export(
    run: Path,
    out: Path,
    *,
    dtype: Dtype = "fp32",
    best: bool = False,
    force: bool = False,
    on_bytes: OnBytes = lambda _: None,
) -> ExportedFile:
    """Write the network of a run's newest checkpoint to a file.

    Args:
        run: the run folder, or a plan folder whose newest run is used.
        out: the file to write.
        dtype: dtype of the tensors; "bf16" rounds the master copy as training in bf16 does.
        best: take the checkpoint with the best evaluation instead of the newest one.
        force: replace an existing file.
        on_bytes: called with the number of bytes of each piece written.

    Raises:
        InputError: if the run has no such checkpoint, or the file exists or cannot be written; no partial file is left.
    """
    run = find_run(run)
    ref = (best_checkpoint if best else newest_checkpoint)(run / CHECKPOINT)
    if ref is None:
        kind = "checkpoint that was evaluated" if best else "complete checkpoint to export"
        raise InputError(f"{run / CHECKPOINT}: holds no {kind}")
    if dtype not in _DTYPES:
        raise InputError(f"dtype: {dtype!r} is not allowed: must be one of {', '.join(_DTYPES)}")
    check_new(out, force=force)
    spec = ref.plan().model
    shapes = {name: tuple(value.shape) for name, value in empty_network(spec).named_parameters()}
    reader = CheckpointReader(ref)
    for name in sorted({*shapes, *reader.numels}):
        expected, held = math.prod(shapes.get(name, (0,))), reader.numels.get(name, 0)
        if expected != held:
            raise InputError(f"{name}: {held} elements are not allowed: the model has {expected} ({reader.folder})")
    metadata = network_metadata(spec) | {"step": str(ref.manifest.step)}
    header = safetensors_header(shapes, dtype, metadata)
    with new_file(out) as file:
        file.write(header)
        _write(file, reader, shapes, _DTYPES[dtype][1], on_bytes)
    parameters = sum(map(math.prod, shapes.values()))
    return ExportedFile(
        out=out, run=run, step=ref.manifest.step, dtype=dtype, tensors=len(shapes), parameters=parameters,
        file_bytes=out.stat().st_size,
    )  # fmt: skip
