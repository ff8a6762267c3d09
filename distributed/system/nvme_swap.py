"""DeepSpeed's swap files on an NVMe drive: a locked folder for each rank of a run, their sizes and removal."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from translution.planner.common import InputError
from translution.planner.deepspeed import aio_section

from .filesystem import try_lock

PREFIX = "translution-swap-"
"""Start of the name of a rank's folder under an NVMe path."""
_GONE = f".{PREFIX}gone-"
"""Start of the name of a folder that is being deleted."""
_PATIENCE_S = 5.0
"""Seconds for which a locked folder may be one that another rank examines."""
OWNER = "owner"
"""File in a rank's folder that its process keeps locked; it names the run and the process."""


class SwapFolder:
    """A rank's own folder under an NVMe path: DeepSpeed's file names tell nothing of the run.

    The folder is locked as long as the process lives, so that others can tell what a dead run has left.

    Args:
        nvme_path: the plan's folder on the drive.
        run: the run folder.
        rank: number of the rank.

    Raises:
        InputError: if a living process of the same run and rank uses it.
    """

    def __init__(self, nvme_path: str, run: Path, rank: int) -> None:
        base = Path(nvme_path)
        base.mkdir(parents=True, exist_ok=True)
        self.path = base / f"{PREFIX}{_digest(run)}-rank{rank}"
        _clear(nvme_path, self.path, rank)
        # Renamed when it is locked: until then nobody can take it for stale.
        made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}new-", dir=base))
        (made / OWNER).write_text(f"{run.resolve()}, process {os.getpid()}\n", encoding="utf-8")
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):  # Without locks nothing is ever stale.
            self._descriptor = try_lock(made / OWNER)
        made.rename(self.path)

    def remove(self) -> None:
        """Delete the folder: no later run can use its files."""
        _discard(self.path)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _clear(nvme_path: str, path: Path, rank: int) -> None:
    """Delete what dead runs have left, the folder of this rank among it.

    Raises:
        InputError: if a living process uses that folder.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        remove_stale(nvme_path)
        if not path.exists():
            return
        try:
            descriptor = try_lock(path / OWNER)
        except OSError:
            # Its file system has no locks, or somebody is deleting it.
            _discard(path)
            return
        if descriptor is not None:
            os.close(descriptor)
        elif time.monotonic() > deadline:
            raise InputError(f"nvme_path: {nvme_path!r} is not allowed: {_read_owner(path)} uses it for rank {rank}")
        # Another rank that looks for what it may delete briefly holds its lock.
        time.sleep(_PATIENCE_S / 100)


def _discard(folder: Path) -> None:
    """Delete a folder, whose name is free at once: its files may take long.

    If the process is killed meanwhile, `remove_stale` deletes the rest.
    """
    gone = folder.with_name(f"{_GONE}{secrets.token_hex(8)}")
    with contextlib.suppress(OSError):
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _digest(run: Path) -> str:
    return hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:12]


def _read_owner(folder: Path) -> str:
    try:
        return (folder / OWNER).read_text(encoding="utf-8").strip()
    except OSError:
        return "an unknown process"


def _owned(nvme_path: Path | str) -> Iterator[tuple[Path, int | None]]:
    """Yield the ranks' folders of this user under an NVMe path, with a descriptor of the lock of a dead run's.

    The descriptor is closed afterwards; it is None for the folder of a living process.
    """
    for folder in sorted(Path(nvme_path).glob(f"{PREFIX}*")):
        try:
            descriptor = try_lock(folder / OWNER) if folder.stat().st_uid == os.getuid() else None
        except OSError:
            continue
        try:
            yield folder, descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)


def remove_stale(nvme_path: Path | str) -> None:
    """Delete what dead runs of this user have left under an NVMe path."""
    for folder, descriptor in _owned(nvme_path):
        if descriptor is not None:
            _discard(folder)
    for gone in Path(nvme_path).glob(f"{_GONE}*"):
        shutil.rmtree(gone, ignore_errors=True)


def stale_bytes(nvme_path: Path | str) -> int:
    """Return the bytes of what dead runs of this user have left under an NVMe path."""
    folders = [folder for folder, descriptor in _owned(nvme_path) if descriptor is not None]
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*.swp"))


def living_owners(nvme_path: Path | str) -> list[str]:
    """Return the run and process of every folder under an NVMe path that a living process of this user holds."""
    return [_read_owner(folder) for folder, descriptor in _owned(nvme_path) if descriptor is None]


def kind_of_swap_file(path: Path) -> str:
    """Return the kind of tensor in a swap file, from DeepSpeed's file name, such as ``exp_avg``."""
    if path.parent.parent.name.endswith("params"):
        return "parameters"
    for kind in ("gradient", "exp_avg_sq", "exp_avg"):
        if kind in path.name:
            return {"gradient": "gradients"}.get(kind, kind)
    return "master parameters"


def disk_bytes(folder: Path | None) -> dict[str, int]:
    """Return the bytes of the swap files in a rank's folder, by kind of tensor."""
    result: dict[str, int] = {}
    for path in folder.rglob("*") if folder is not None else ():
        if path.is_file() and path.name != OWNER:
            kind = kind_of_swap_file(path)
            result[kind] = result.get(kind, 0) + path.stat().st_size
    return result


def io_handle() -> Any:
    """Return DeepSpeed's I/O handle with the settings of a plan's config; compiles the op if needed.

    Source: DeepSpeed 0.19.8, csrc/aio/py_lib/py_ds_aio.cpp.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    settings = aio_section()
    return (
        AsyncIOBuilder()
        .load()
        .aio_handle(
            settings["block_size"],
            settings["queue_depth"],
            settings["single_submit"],
            settings["overlap_events"],
            settings["intra_op_parallelism"],
        )
    )
