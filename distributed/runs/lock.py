"""Locks of a run's ranks: a run that still trains is neither resumed nor started again."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from translution.planner.common import InputError

from ..system.filesystem import try_lock
from .watchdog import process_state

_FOLDER, _POLL_SECONDS = "control", 0.05
_held: list[int] = []
"""Descriptors of the locks of this process, which end with it."""


def _path(run: Path, rank: int) -> Path:
    return run / _FOLDER / f"rank_{rank}.lock"


def _holder(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"


def _is_ending(path: Path) -> bool:
    """Return True if the holder of a lock is a process of this host that is dead but has not yet closed its files."""
    words = _holder(path).split()
    return (
        len(words) == 4
        and words[1].isdecimal()
        and words[3] == socket.gethostname()
        and not process_state(int(words[1])).alive
        and Path(f"/proc/{words[1]}").exists()
    )


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
            while (descriptor := try_lock(path)) is None and _is_ending(path):
                time.sleep(_POLL_SECONDS)
        except OSError:
            continue
        if descriptor is None:
            raise InputError(f"{run}: still runs: {_holder(path)} is its {path.stem.replace('_', ' ')}")
        os.close(descriptor)
