"""How often the kernel has killed a process for want of memory."""

from __future__ import annotations

from pathlib import Path


def count_memory_kills(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return how many processes the kernel has killed for memory on this machine or in this control group; None if
    neither says so.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (memory.events) and mm/vmstat.c.
    """
    counts = [_field(proc / "vmstat", "oom_kill")]
    try:
        own = (proc / "self" / "cgroup").read_text(encoding="utf-8").strip().splitlines()
    except OSError:
        own = []
    for line in own:
        if line.startswith("0::"):
            counts.append(_field(cgroups / line[3:].lstrip("/") / "memory.events", "oom_kill"))
    known = [count for count in counts if count is not None]
    return max(known) if known else None


def _field(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)
