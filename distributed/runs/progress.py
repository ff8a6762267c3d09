"""Where each rank is: one small file per rank in the run folder, which the launcher and other ranks read.

    control/rank_N.progress    rewritten in place at every phase of a step, and every two seconds by a thread

It is written in place, so that a rank can also report its failure on a full disk. Its size never changes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from translution.planner.common import InputError, Phase, Schema, parse_json

from .heartbeat import control_path

Cause = Literal["", "own", "connection", "other"]
"""Why a rank failed: by its own error, because others ended, or it ended because of what another one does."""

ENDED = "end"
"""The phase of a rank that has done everything."""
STACKS_REQUEST = "stacks"
"""Name of the control file that asks all ranks to print their stacks to their logs."""
HEARTBEAT_SECONDS = 2.0
"""Seconds between two heartbeats."""
_FILE_BYTES = 2048
_FAILURE_CHARACTERS = 600
_PHASES: dict[str, str] = {
    Phase.INIT: "its start",
    Phase.STEP: "its update",
    Phase.SAVE: "a checkpoint's saving",
    Phase.EVALUATION: "an evaluation",
    Phase.RESUME: "a checkpoint's loading",
}
"""Phases as messages name them, where they have other names there."""


def request_stacks(run: Path) -> None:
    """Ask all ranks to print their stacks to their logs; they see it at their next heartbeat."""
    with contextlib.suppress(OSError):
        control_path(run, STACKS_REQUEST).touch()


class RankProgress(Schema):
    """What a rank was last doing."""

    rank: int
    pid: int
    host: str
    step: int = 0
    """Number of the step that it does or has done last, from 1; 0 before the first one."""
    steps_begun: int = 0
    """Steps that this process has begun."""
    phase: str = Phase.INIT
    """The phase of the step, or what it does outside of steps."""
    moves: int = 0
    """Number of phases begun; all ranks begin the same phases."""
    heartbeat: int = 0
    """Grows while the process runs."""
    failure: str = ""
    """The error with which it ended; also there if its status could not be written."""
    cause: Cause = ""

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        phase = _PHASES.get(self.phase, self.phase)
        return f"at step {self.step}, in {phase}" if self.step else f"in {phase}"


_PROGRESS: TypeAdapter[RankProgress] = TypeAdapter(RankProgress)


def progress_path(run: Path, rank: int) -> Path:
    """Path of a rank's progress file."""
    return control_path(run, f"rank_{rank}.progress")


def read_progress(run: Path, rank: int) -> RankProgress | None:
    """Return what a rank was last doing; None if it has not said so, or its file cannot be read now."""
    path = progress_path(run, rank)
    try:
        return parse_json(_PROGRESS, path.read_bytes(), str(path))
    except (OSError, InputError):
        return None


class Progress:
    """Says where this rank is. Before `open` it keeps it to itself."""

    def __init__(self) -> None:
        self.step = self.steps_begun = self.moves = 0
        self.phase: str = Phase.INIT
        self._rank, self._heartbeat, self._failure = 0, 0, ("", "")
        self._path: Path | None = None
        self._file = -1
        self._lock = threading.Lock()

    def open(self, run: Path, rank: int) -> None:
        """Create the file and begin the heartbeats, whose thread prints all stacks to the log when it is asked to.

        SIGUSR2 prints them without a heartbeat. Its handler needs no lock of Python, so it may end a process that runs
        Python.
        """
        self._path, self._rank = progress_path(run, rank), rank
        try:
            self._path.parent.mkdir(exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError:
            return  # The rank's status tells why, if it can.
        self._write(self._file)
        with contextlib.suppress(ValueError, OSError):  # Under pytest, stderr may be no file.
            faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)
        threading.Thread(target=self._report_forever, args=(control_path(run, STACKS_REQUEST),), daemon=True).start()

    def begin_step(self, step: int) -> None:
        """Say that a step begins, numbered from 0."""
        self.step, self.steps_begun = step + 1, self.steps_begun + 1

    def move(self, phase: str) -> None:
        """Say that a phase begins."""
        self.phase, self.moves = phase, self.moves + 1
        if self._file >= 0:
            self._write(self._file)

    def end(self) -> None:
        """Say that the rank has done everything, together with all others."""
        self.move(ENDED)

    def fail(self, text: str, cause: Cause) -> None:
        """Say that the rank ends with an error."""
        self._failure = (text[:_FAILURE_CHARACTERS], cause)
        if self._file >= 0:
            self._write(self._file)

    def _write(self, file: int) -> None:
        with self._lock:
            values = {
                "rank": self._rank,
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "step": self.step,
                "steps_begun": self.steps_begun,
                "phase": self.phase,
                "moves": self.moves,
                "heartbeat": self._heartbeat,
                "failure": self._failure[0],
                "cause": self._failure[1],
            }
            text = json.dumps(values)
            while len(text) >= _FILE_BYTES and values["failure"]:
                values["failure"] = str(values["failure"])[:-50]
                text = json.dumps(values)
            with contextlib.suppress(OSError):
                os.pwrite(file, text.encode("ascii").ljust(_FILE_BYTES - 1) + b"\n", 0)

    def _report_forever(self, request: Path) -> None:
        assert self._path is not None
        printed = False
        while True:
            self._heartbeat += 1
            with contextlib.suppress(OSError):
                # Opened and closed: other nodes see what a process has closed.
                file = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
                self._write(file)
                os.close(file)
            if not printed and request.exists():
                printed = True
                faulthandler.dump_traceback(all_threads=True)
            time.sleep(HEARTBEAT_SECONDS)
