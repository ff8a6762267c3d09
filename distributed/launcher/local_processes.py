"""Processes of a run: started together, watched, asked to save, and ended together."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runs.folder import LOG, METRICS
from ..runs.status import read_statuses, resume_hint
from ..runs.watchdog import LAUNCHER_PID
from ..system.signals import EndedError, ending_signals_raise

GRACE_SECONDS = 15.0
SAVE_SECONDS = 3600.0
"""How long ranks that were asked to end may take for their step and their checkpoint."""
POLL_SECONDS = 0.2

OnMetrics = Callable[[Mapping[str, Any]], None]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and every rank: they share its process group."""
    for end in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        # Ranks may outlive their launcher, to save.
        deadline = time.monotonic() + GRACE_SECONDS
        with contextlib.suppress(ProcessLookupError, PermissionError):
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(POLL_SECONDS / 4)


class MetricsReader:
    """Hands over each new whole line of the metrics file."""

    def __init__(self, path: Path, on_metrics: OnMetrics) -> None:
        # What an earlier launch of the same run wrote has been shown.
        self._offset = path.stat().st_size if path.exists() else 0
        self._path, self._on_metrics = path, on_metrics

    def poll(self) -> None:
        """Read what has been added."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            # A resumed run cuts off a torn line.
            self._offset = min(self._offset, os.fstat(file.fileno()).st_size)
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._on_metrics(json.loads(line))


def run_ranks(command: Sequence[str], environment: Mapping[str, str], run: Path, on_metrics: OnMetrics) -> int:
    """Start the launcher in its own process group and wait; no rank outlives the call.

    Ranks also watch this process, and end by themselves when it is killed.

    Args:
        command: what to start.
        environment: added to this process's own.
        run: the run folder; everything printed goes to its log.
        on_metrics: called with each line of the metrics file as it is written.

    Returns:
        The launcher's exit code.
    """
    reader = MetricsReader(run / METRICS, on_metrics)
    environment = {**os.environ, **environment, LAUNCHER_PID: str(os.getpid())}
    with (run / LOG).open("ab") as log, ending_signals_raise():
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                reader.poll()
                time.sleep(POLL_SECONDS)
        except (KeyboardInterrupt, EndedError) as ended:
            _let_ranks_save(process, run)
            if text := resume_hint(run):
                ended.args = (*ended.args, text)
            raise
        finally:
            _stop(process)
    reader.poll()
    return process.returncode


def _let_ranks_save(process: subprocess.Popen[bytes], run: Path) -> None:
    """Ask ranks that train to save and end, and wait for it; a second signal cuts the wait short."""
    asked = False
    for status in read_statuses(run):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # A number may have gone to another process, but not to one of this group.
            if status.state == "training" and os.getpgid(status.pid) == process.pid:
                os.kill(status.pid, signal.SIGUSR1)
                asked = True
    if asked:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SAVE_SECONDS)


def run_processes(
    command: Sequence[str], environments: Sequence[Mapping[str, str]], log: Path, poll: Callable[[], None]
) -> int:
    """Start a command once for every environment and wait for all; none outlives the call.

    Args:
        command: what to start.
        environments: one process's each, added to this process's own.
        log: where everything printed goes.
        poll: called a few times a second.

    Returns:
        0 if all ended well, else the first other exit code; the rest are ended then.
    """
    processes: list[subprocess.Popen[bytes]] = []
    with log.open("ab") as file, ending_signals_raise():
        try:
            for environment in environments:
                own = {**os.environ, **environment, LAUNCHER_PID: str(os.getpid())}
                process = subprocess.Popen(
                    command, env=own, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True
                )
                processes.append(process)
            while any(process.poll() is None for process in processes):
                if any(process.returncode for process in processes):
                    break
                poll()
                time.sleep(POLL_SECONDS)
        finally:
            failed = next((process.returncode for process in processes if process.returncode), 0)
            for process in processes:
                _stop(process)
    poll()
    return failed or next((process.returncode for process in processes if process.returncode), 0)
