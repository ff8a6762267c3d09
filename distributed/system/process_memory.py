"""Memory of this process, as the operating system reports it, and what its C library does with freed memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
MMAP_THRESHOLD_BYTES = 2**17
"""Smallest block that `return_freed_blocks` makes glibc map on its own: the value that a process starts with."""
_M_MMAP_THRESHOLD = -3
"""Number of the option, from glibc's malloc.h."""
_FIELDS = {"resident": "VmRSS", "peak": "VmHWM", "locked": "VmLck", "pinned": "VmPin"}


def process_bytes() -> dict[str, int]:
    """Return the bytes of this process: resident, peak (resident), locked (mlock) and pinned (by a driver).

    Without /proc only the peak is known.
    """
    try:
        text = _STATUS.read_text(encoding="ascii")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak": peak if sys.platform == "darwin" else peak * 1024}
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    return {name: int(lines.get(field, 0)) * 1024 for name, field in _FIELDS.items()}


def reset_peak() -> None:
    """Reset the process's peak resident memory to its current value, if Linux allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def return_freed_blocks() -> bool:
    """Make glibc give freed blocks of `MMAP_THRESHOLD_BYTES` or more back to the system, for the rest of this process.

    By default glibc raises the threshold with every mapped block that is freed, up to 32 MiB. It then keeps smaller
    blocks, among them a rank's share of a tile, and the process holds far more than its tensors. A threshold that is
    set stays as it is. One that the user has set in the environment is left alone.

    Returns:
        Whether this process's C library has the option and took it.

    Source: glibc 2.36, malloc/malloc.c (M_MMAP_THRESHOLD); mallopt(3).
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "glibc.malloc.mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    return set_option is not None and bool(set_option(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES))
