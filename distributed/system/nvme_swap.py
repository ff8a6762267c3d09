"""DeepSpeed's swap files on an NVMe drive: their paths, sizes and removal."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from translution.planner.deepspeed import aio_section

SWAP_FOLDER = "zero_stage_3"
"""Folder that DeepSpeed creates under an NVMe path."""


def swap_folders(nvme_path: str, rank: int) -> list[Path]:
    """Return the folders of one rank's swap files under an NVMe path."""
    base = Path(nvme_path) / SWAP_FOLDER
    return [base / "optimizer" / f"rank{rank}", *(path / f"rank{rank}" for path in base.glob("*params"))]


def _kind(path: Path) -> str:
    """Return the kind of tensor in a swap file, from DeepSpeed's file name."""
    if path.parent.parent.name.endswith("params"):
        return "parameters"
    for kind in ("gradient", "exp_avg_sq", "exp_avg"):
        if kind in path.name:
            return {"gradient": "gradients"}.get(kind, kind)
    return "master parameters"


def all_bytes(nvme_path: Path | str) -> int:
    """Return the bytes of all ranks' swap files under an NVMe path."""
    files = (path for path in (Path(nvme_path) / SWAP_FOLDER).glob("**/*.swp"))
    return sum(path.stat().st_size for path in files)


def disk_bytes(nvme_path: str | None, rank: int) -> dict[str, int]:
    """Return the bytes of a rank's swap files under an NVMe path, by kind of tensor."""
    result: dict[str, int] = {}
    for folder in swap_folders(nvme_path, rank) if nvme_path else []:
        for path in folder.glob("**/*"):
            if path.is_file():
                kind = _kind(path)
                result[kind] = result.get(kind, 0) + path.stat().st_size
    return result


def remove_swap_files(nvme_path: str | None, rank: int) -> None:
    """Delete a rank's swap files under an NVMe path: no later run can use them."""
    for folder in swap_folders(nvme_path, rank) if nvme_path else []:
        shutil.rmtree(folder, ignore_errors=True)


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
