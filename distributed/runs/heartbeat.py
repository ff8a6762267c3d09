"""What joins ranks on other hosts to the process that launched them: two files that all nodes see.

    control/beat    changes every other second while the launcher lives, and goes when it ends
    control/stop    asks all ranks to save and end

A launcher's signals do not cross hosts, and pdsh leaves what it has started behind when it is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from translution.planner.common.errors import InputError

from ..system.filesystem import remove_shared_buffers
from ..system.signals import StopRequest

BEAT, STOP = "beat", "stop"
FOLLOWS = "TRANSLUTION_FOLLOWS_BEAT"
"""Set for ranks that must not outlive the beat of their run folder."""
SILENT_SECONDS = 60.0
"""A beat that has not changed for so long is that of a launcher that is gone."""
_BEAT_SECONDS = 2.0
_POLL_SECONDS = 1.0


def control_path(run: Path, name: str) -> Path:
    """Where a control file of a run lies."""
    return run / "control" / name


@contextlib.contextmanager
def beating(run: Path) -> Iterator[None]:
    """Keep the beat of a run while the block runs; its ranks end soon after it."""
    path, ended = control_path(run, BEAT), threading.Event()
    path.parent.mkdir(exist_ok=True)
    control_path(run, STOP).unlink(missing_ok=True)

    def beat() -> None:
        number = 0
        while True:
            with contextlib.suppress(OSError):  # A full disk must not end the ranks: they end when it lasts.
                # In place: the name of a new file may reach other hosts late.
                path.write_text(f"{number:012d}\n", encoding="ascii")
            number += 1
            if ended.wait(_BEAT_SECONDS):
                break
        path.unlink(missing_ok=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def request_stop(run: Path) -> None:
    """Ask every rank of a run to save after its step, and to end."""
    control_path(run, STOP).touch()


def read_beat(run: Path) -> str | None:
    """The beat as it stands, or None if the launcher has ended."""
    try:
        return control_path(run, BEAT).read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    except OSError:
        return ""  # A file system that does not answer now is no launcher that ended.


def require_beat(run: Path) -> None:
    """Whether this node sees the run folder in which its launcher's beat lies.

    Raises:
        InputError: if it should and does not.
    """
    if FOLLOWS in os.environ and read_beat(run) is None:
        raise InputError(f"{run}: the launcher's files are not seen from here: choose a folder that all nodes share")


def follow_beat(run: Path, rank: int, stop: StopRequest) -> None:
    """End this rank when the launcher's beat ends, and save first when it asks for that.

    Only for ranks that were started so; nothing is done for others.

    Args:
        run: the run folder.
        rank: this rank's number.
        stop: told when the launcher asks.
    """
    if FOLLOWS not in os.environ:
        return

    def watch() -> None:
        last, since = "", time.monotonic()
        while True:
            beat = read_beat(run)
            if beat is None or (beat == last and time.monotonic() - since > SILENT_SECONDS):
                remove_shared_buffers(os.environ.get("MASTER_PORT", ""), rank)
                os.kill(os.getpid(), signal.SIGKILL)
            if beat and beat != last:
                last, since = beat, time.monotonic()
            if stop.name is None and control_path(run, STOP).exists():
                stop.name = "its launcher"
            time.sleep(_POLL_SECONDS)

    threading.Thread(target=watch, daemon=True).start()
