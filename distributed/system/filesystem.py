"""File system types, locks of files, and removal of the shared-memory buffers that ranks leave behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Collection, Iterator
from pathlib import Path

LOCK_PATIENCE_S = 10.0
"""Seconds that `locked` waits for a lock; its holders have it for milliseconds."""
_POLL_S = 0.02


def file_system(path: Path) -> str:
    """Return the type of the file system of a path, such as ``ext4``; an empty string if it is unknown."""
    try:
        text = Path("/proc/mounts").read_text(encoding="utf-8")
    except OSError:
        return ""
    mounts = [line.split()[1:3] for line in text.splitlines()]
    containing = [(folder, kind) for folder, kind in mounts if path.resolve().is_relative_to(folder)]
    return max(containing, key=lambda mount: len(mount[0]), default=("", ""))[1]


def try_lock(path: Path, *, create: bool = False) -> int | None:
    """Lock a file until the process ends or the returned descriptor is closed; None if another process holds it.

    Args:
        path: the file.
        create: create it if it does not exist.

    Raises:
        OSError: if the file cannot be opened, or its file system has no locks.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a file, which is created, while the block runs; wait for a process that holds it.

    The block runs in any case: without the lock if the file cannot be made, its file system has no locks, or another
    process holds it for more than `LOCK_PATIENCE_S`, for instance because it is stopped.

    Args:
        path: the file, which stays.

    Yields:
        True if the lock is held.
    """
    descriptor, deadline = None, time.monotonic() + LOCK_PATIENCE_S
    with contextlib.suppress(OSError):
        while (descriptor := try_lock(path, create=True)) is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


SHARED_MEMORY = Path("/dev/shm")
"""Folder of the buffers of DeepSpeed's CPU communication, 66 MiB for each rank. Source: csrc/cpu/comm/shm.cpp."""
_BUFFER = "deepspeed_allreduce_buffer"
STARTING_SECONDS = 60.0
"""Age in seconds below which a buffer may be one that ranks are about to map."""


def remove_shared_buffers(port: str | int, rank: int | None = None) -> None:
    """Delete the buffers that DeepSpeed's CPU communication leaves in /dev/shm, 66 MiB for each rank.

    Args:
        port: port at which the ranks met; it is part of the file names.
        rank: rank whose buffers to delete; None deletes those of all ranks.

    Source: DeepSpeed 0.19.8, csrc/cpu/comm/shm.cpp.
    """
    for path in SHARED_MEMORY.glob(f"{_BUFFER}_{os.getuid()}_*_{port}_{'*' if rank is None else rank}"):
        with contextlib.suppress(OSError):
            path.unlink()


def _used(paths: Collection[Path]) -> set[Path]:
    """Return those of some files that a process maps or holds open, as far as this process may see them."""
    names, used = {str(path): path for path in paths}, set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            lines = (process / "maps").read_text(encoding="utf-8", errors="replace").splitlines()
            used |= {names[line[line.find("/") :]] for line in lines if line[line.find("/") :] in names}
        for link in process.glob("fd/*"):
            with contextlib.suppress(OSError):
                used |= {names[name] for name in [str(link.readlink())] if name in names}
    return used


def remove_dead_buffers() -> list[int]:
    """Delete the buffers in /dev/shm that ranks left when they and their launcher were killed.

    Only buffers of this user go, which no process maps or holds open and which are older than `STARTING_SECONDS`. Ranks
    of another container, whose processes are not seen here, have mapped theirs by then and need the name no longer.

    Returns:
        The bytes of each deleted buffer.
    """
    found = {}
    for path in SHARED_MEMORY.glob(f"{_BUFFER}_{os.getuid()}_*") if Path("/proc/self/maps").exists() else ():
        with contextlib.suppress(OSError):
            status = path.lstat()
            old = time.time() - max(status.st_mtime, status.st_ctime) > STARTING_SECONDS
            if old and status.st_uid == os.getuid() and stat.S_ISREG(status.st_mode):
                found[path] = status.st_blocks * 512
    removed = []
    for path in found.keys() - _used(found) if found else ():
        with contextlib.suppress(OSError):
            path.unlink()
            removed.append(found[path])
    return removed
