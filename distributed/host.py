"""What the operating system says of this process: resident and locked memory, and files on NVMe."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import socket
import struct
import sys
from pathlib import Path
from typing import Any

from translution.planner.deepspeed_config import aio_section

_STATUS = Path("/proc/self/status")
_FIELDS = {"resident": "VmRSS", "peak": "VmHWM", "locked": "VmLck", "pinned": "VmPin"}
_SIOCGIFADDR = 0x8915
"""Linux's request for an interface's address (netdevice(7))."""
SWAP_FOLDER = "zero_stage_3"
"""What DeepSpeed makes under an NVMe path."""


def process_bytes() -> dict[str, int]:
    """Resident, highest resident, locked (mlock) and pinned (by a driver) memory of this process.

    Only the highest is known where there is no /proc.
    """
    try:
        text = _STATUS.read_text(encoding="ascii")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak": peak if sys.platform == "darwin" else peak * 1024}
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    return {name: int(lines.get(field, 0)) * 1024 for name, field in _FIELDS.items()}


def forget_peak() -> None:
    """Let the highest resident memory begin anew at the present one, where Linux allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def swap_folders(nvme_path: str, rank: int) -> list[Path]:
    """The folders in which DeepSpeed keeps one rank's files under an NVMe path."""
    base = Path(nvme_path) / SWAP_FOLDER
    return [base / "optimizer" / f"rank{rank}", *(path / f"rank{rank}" for path in base.glob("*params"))]


def _kind(path: Path) -> str:
    """What a swap file holds, from the name that DeepSpeed gave it."""
    if path.parent.parent.name.endswith("params"):
        return "parameters"
    for kind in ("gradient", "exp_avg_sq", "exp_avg"):
        if kind in path.name:
            return {"gradient": "gradients"}.get(kind, kind)
    return "master parameters"


def disk_bytes(nvme_path: str | None, rank: int) -> dict[str, int]:
    """Bytes of a rank's files under an NVMe path, by what they hold."""
    result: dict[str, int] = {}
    for folder in swap_folders(nvme_path, rank) if nvme_path else []:
        for path in folder.glob("**/*"):
            if path.is_file():
                kind = _kind(path)
                result[kind] = result.get(kind, 0) + path.stat().st_size
    return result


def remove_swap_files(nvme_path: str | None, rank: int) -> None:
    """Delete a rank's own files under an NVMe path: no later run can use them."""
    for folder in swap_folders(nvme_path, rank) if nvme_path else []:
        shutil.rmtree(folder, ignore_errors=True)


def file_system(path: Path) -> str:
    """The kind of file system that a path lies on, ``ext4`` for instance; nothing where it cannot be told."""
    try:
        text = Path("/proc/mounts").read_text(encoding="utf-8")
    except OSError:
        return ""
    mounts = [line.split()[1:3] for line in text.splitlines()]
    where = [(folder, kind) for folder, kind in mounts if path.resolve().is_relative_to(folder)]
    return max(where, key=lambda mount: len(mount[0]), default=("", ""))[1]


def interface_towards(address: str) -> str | None:
    """The network interface through which this machine reaches another, or itself at that address.

    gloo takes the one that this machine's own name resolves to, which often is the loopback.

    Args:
        address: name or IPv4 address.

    Returns:
        Its name; None where that cannot be told.
    """
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # Sends nothing: only the route is chosen.
            own = socket.inet_aton(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):
                    asked = struct.pack("256s", name.encode()[:15])
                    if fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, asked)[20:24] == own:
                        return name
    except (ImportError, OSError):
        pass
    return None


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


def io_handle() -> Any:
    """DeepSpeed's I/O library, set as a plan's config sets it; its op is compiled if it is not yet.

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
