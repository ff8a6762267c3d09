"""A rank watches its launcher's process and exits when it dies; heartbeat.py does the same across hosts."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from ..system.filesystem import remove_shared_buffers

LAUNCHER_PID = "TRANSLUTION_LAUNCHER_PID"
"""Environment variable with the process id of the ranks' launcher."""


def process_is_alive(pid: int) -> bool:
    """Return True if a process is running; a zombie is not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def end_with_launcher() -> None:
    """Kill this rank soon after its launcher has ended, for whatever reason.

    Does nothing for ranks without a launcher.
    """
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None:
        return

    def watch() -> None:
        while process_is_alive(int(launcher)):
            time.sleep(1.0)
        remove_shared_buffers(os.environ.get("MASTER_PORT", ""), int(os.environ.get("RANK", "0")))
        os.kill(os.getpid(), signal.SIGKILL)

    if Path("/proc/self").exists():
        threading.Thread(target=watch, daemon=True).start()
