"""A rank watches its launcher's process and exits when it dies; heartbeat.py does the same across hosts."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

from ..system.filesystem import remove_shared_buffers

LAUNCHER_PID = "TRANSLUTION_LAUNCHER_PID"
"""Environment variable with the process id of the ranks' launcher."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessState:
    """State of a process of this host."""

    alive: bool
    """True if it is running or stopped; a zombie is not."""
    stopped: bool = False
    """True if a signal or a debugger has stopped it."""
    signal: int | None = None
    """The signal that killed a zombie, as long as its parent has not waited for it."""


def process_state(pid: int) -> ProcessState:
    """Return the state of a process.

    Source: Linux, proc_pid_stat(5); its last field is the exit status as waitpid returns it.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ProcessState(alive=False)
    fields = stat.rpartition(")")[2].split()
    if fields[0] in ("Z", "X"):
        return ProcessState(alive=False, signal=(int(fields[-1]) & 0x7F) or None)
    return ProcessState(alive=True, stopped=fields[0] in ("T", "t"))


def process_is_alive(pid: int) -> bool:
    """Return True if a process is running; a zombie is not."""
    return process_state(pid).alive


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
