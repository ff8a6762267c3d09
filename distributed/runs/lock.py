"""Locks of a run's ranks: a run that still trains is neither resumed nor started again."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from translution.planner.common import InputError

from ..system.filesystem import try_lock

_FOLDER = "control"
_held: list[int] = []
"""Descriptors of the locks of this process, which end with it."""


def _path(run: Path, rank: int) -> Path:
    return run / _FOLDER / f"rank_{rank}.lock"


def _holder(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"


def lock_rank(run: Path, rank: int) -> None:
    """Lock a rank of a run until this process ends. File systems without locks are not protected.

    Raises:
        InputError: if another process has the rank's lock.
    """
    path = _path(run, rank)
    path.parent.mkdir(exist_ok=True)
    try:
        descriptor = try_lock(path, create=True)
    except OSError:
        return
    if descriptor is None:
        raise InputError(f"{run}: still runs: {_holder(path)} is its rank {rank}")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} of {socket.gethostname()}\n".encode())
    _held.append(descriptor)


def is_rank_alive(run: Path, rank: int) -> bool | None:
    """Return whether a rank's process holds its lock, on whatever node; None if that cannot be known."""
    try:
        descriptor = try_lock(_path(run, rank))
    except OSError:
        return None
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def require_unlocked(run: Path) -> None:
    """Check that no rank of a run is running.

    Raises:
        InputError: names the process of the first rank that is.
    """
    for path in sorted((run / _FOLDER).glob("rank_*.lock")):
        try:
            descriptor = try_lock(path)
        except OSError:
            continue
        if descriptor is None:
            raise InputError(f"{run}: still runs: {_holder(path)} is its {path.stem.replace('_', ' ')}")
        os.close(descriptor)
