"""Heartbeat between a launcher and its ranks on other hosts: two files in the run folder, which all nodes see.

    control/beat    rewritten every two seconds while the launcher runs, and removed when it ends
    control/stop    asks all ranks to save a checkpoint and end

Signals do not cross hosts, and a killed pdsh leaves the commands that it started running.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from translution.planner.common import InputError

from ..system.filesystem import remove_shared_buffers
from ..system.signals import StopRequest

HEARTBEAT, STOP_REQUEST = "beat", "stop"
"""Names of the control files."""
FOLLOW_HEARTBEAT = "TRANSLUTION_FOLLOW_HEARTBEAT"
"""Environment variable that is set for ranks that must exit when the heartbeat in their run folder stops."""
SILENT_SECONDS = 60.0
"""Seconds without a change of its heartbeat after which a launcher, or a rank on another host, counts as dead."""
_HEARTBEAT_SECONDS = 2.0
_POLL_SECONDS = 1.0


def control_path(run: Path, name: str) -> Path:
    """Path of a control file."""
    return run / "control" / name


@contextlib.contextmanager
def keep_heartbeat(run: Path) -> Iterator[None]:
    """Write the heartbeat of a run while the block runs; the ranks end soon after the block does."""
    path, ended = control_path(run, HEARTBEAT), threading.Event()
    path.parent.mkdir(exist_ok=True)
    control_path(run, STOP_REQUEST).unlink(missing_ok=True)

    def write() -> None:
        number = 0
        while True:
            with contextlib.suppress(OSError):  # A full disk ends the ranks only if it lasts.
                # Written in place: other hosts may see a renamed file late.
                path.write_text(f"{number:012d}\n", encoding="ascii")
            number += 1
            if ended.wait(_HEARTBEAT_SECONDS):
                break
        path.unlink(missing_ok=True)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def request_stop(run: Path) -> None:
    """Ask every rank of a run to save a checkpoint after its current step, and to end."""
    control_path(run, STOP_REQUEST).touch()


def read_heartbeat(run: Path) -> str | None:
    """Return the current heartbeat, an empty string if it cannot be read now, or None if the launcher has ended."""
    try:
        return control_path(run, HEARTBEAT).read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    except OSError:
        return ""  # A file system error does not mean that the launcher has ended.


def require_heartbeat(run: Path) -> None:
    """Check that this node sees the launcher's heartbeat, if its ranks follow one.

    Raises:
        InputError: if it does not.
    """
    if FOLLOW_HEARTBEAT in os.environ and read_heartbeat(run) is None:
        raise InputError(
            f"{run}: the launcher's files are not visible from this node: choose a folder that all nodes share"
        )


def follow_heartbeat(run: Path, rank: int, stop: StopRequest) -> None:
    """Kill this rank when the launcher's heartbeat stops, and pass on the launcher's stop request.

    Does nothing for ranks that do not follow a heartbeat.

    Args:
        run: the run folder.
        rank: this rank.
        stop: set when the launcher asks the ranks to stop.
    """
    if FOLLOW_HEARTBEAT not in os.environ:
        return

    def watch() -> None:
        last, since = "", time.monotonic()
        while True:
            heartbeat = read_heartbeat(run)
            if heartbeat is None or (heartbeat == last and time.monotonic() - since > SILENT_SECONDS):
                remove_shared_buffers(os.environ.get("MASTER_PORT", ""), rank)
                os.kill(os.getpid(), signal.SIGKILL)
            if heartbeat and heartbeat != last:
                last, since = heartbeat, time.monotonic()
            if stop.name is None and control_path(run, STOP_REQUEST).exists():
                stop.name = "its launcher"
            time.sleep(_POLL_SECONDS)

    threading.Thread(target=watch, daemon=True).start()
