"""File system types, and removal of the shared-memory buffers that ranks leave behind."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def file_system(path: Path) -> str:
    """Return the type of the file system of a path, such as ``ext4``; an empty string if it is unknown."""
    try:
        text = Path("/proc/mounts").read_text(encoding="utf-8")
    except OSError:
        return ""
    mounts = [line.split()[1:3] for line in text.splitlines()]
    containing = [(folder, kind) for folder, kind in mounts if path.resolve().is_relative_to(folder)]
    return max(containing, key=lambda mount: len(mount[0]), default=("", ""))[1]


def remove_shared_buffers(port: str | int, rank: int | None = None) -> None:
    """Delete the buffers that DeepSpeed's CPU communication leaves in /dev/shm, 66 MiB for each rank.

    Args:
        port: port at which the ranks met; it is part of the file names.
        rank: rank whose buffers to delete; None deletes those of all ranks.

    Source: DeepSpeed 0.19.8, csrc/cpu/comm/shm.cpp.
    """
    for path in Path("/dev/shm").glob(
        f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_{'*' if rank is None else rank}"
    ):
        with contextlib.suppress(OSError):
            path.unlink()
