"""Memory of this process, as the operating system reports it."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
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
