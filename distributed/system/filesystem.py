"""File systems by path, and shared-memory buffers that dead ranks left."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def file_system(path: Path) -> str:
    """The kind of file system that a path lies on, ``ext4`` for instance; nothing where it cannot be told."""
    try:
        text = Path("/proc/mounts").read_text(encoding="utf-8")
    except OSError:
        return ""
    mounts = [line.split()[1:3] for line in text.splitlines()]
    where = [(folder, kind) for folder, kind in mounts if path.resolve().is_relative_to(folder)]
    return max(where, key=lambda mount: len(mount[0]), default=("", ""))[1]


def remove_shared_buffers(port: str | int, rank: int | None = None) -> None:
    """Delete what DeepSpeed's CPU communication leaves in shared memory, 66 MiB for every rank, for ever.

    Args:
        port: of the ranks' rendezvous, by which the files are named.
        rank: whose; None deletes those of all ranks.

    Source: DeepSpeed 0.19.8, csrc/cpu/comm/shm.cpp.
    """
    for path in Path("/dev/shm").glob(
        f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_{'*' if rank is None else rank}"
    ):
        with contextlib.suppress(OSError):
            path.unlink()
