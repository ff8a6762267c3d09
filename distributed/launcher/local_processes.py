"""Start processes on this machine, watch them, and end them together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from translution.planner.common import InputError, read_json

from ..runs.folder import LOG, METRICS
from ..runs.status import read_statuses, resume_hint
from ..runs.watchdog import LAUNCHER_PID
from ..system.signals import EndedError, ending_signals_raise

GRACE_SECONDS = 15.0
"""Seconds between asking processes to end and killing them."""
SAVE_SECONDS = 3600.0
"""Seconds that ranks may take to finish their step and save a checkpoint, once asked to stop."""
POLL_SECONDS = 0.2
"""Seconds between two looks at the processes and the metrics file."""

OnMetrics = Callable[[Mapping[str, Any]], None]
"""Called with each line of the metrics file, as a mapping."""


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and all ranks, which share its process group."""
    for end in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        # Ranks may outlive their launcher while they save.
        deadline = time.monotonic() + GRACE_SECONDS
        with contextlib.suppress(ProcessLookupError, PermissionError):
            while time.monotonic() < deadline:
                os.killpg(process.pid, 0)
                time.sleep(POLL_SECONDS / 4)


class MetricsReader:
    """Follows the metrics file of a run.

    Args:
        path: the metrics file, which need not exist yet.
        on_metrics: called with each new complete line.
    """

    def __init__(self, path: Path, on_metrics: OnMetrics) -> None:
        # Skip the lines that an earlier launch of the same run wrote.
        self._offset = path.stat().st_size if path.exists() else 0
        self._path, self._on_metrics = path, on_metrics

    def poll(self) -> None:
        """Read the lines added since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            # A resumed run removes an incomplete last line.
            self._offset = min(self._offset, os.fstat(file.fileno()).st_size)
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                # A line that a full disk has damaged is left out.
                with contextlib.suppress(InputError):
                    self._on_metrics(read_json(line, str(self._path)))


def run_ranks(command: Sequence[str], environment: Mapping[str, str], run: Path, on_metrics: OnMetrics) -> int:
    """Run the launcher in its own process group and wait for it; no rank outlives the call.

    Ranks also watch this process, and end by themselves if it is killed.

    Args:
        command: the launcher's command.
        environment: variables added to this process's environment.
        run: the run folder; all output goes to its launcher log.
        on_metrics: called with each line of the metrics file as it is written.

    Returns:
        The launcher's exit code.

    Raises:
        InterruptedRunError: if the user interrupted the run; the ranks have saved and ended.
        RunFailedError: if a signal ended the run; the ranks have saved and ended.
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
            if hint := resume_hint(run):
                ended.args = (*ended.args, hint)
            raise
        finally:
            _stop(process)
    reader.poll()
    return process.returncode


def _let_ranks_save(process: subprocess.Popen[bytes], run: Path) -> None:
    """Ask training ranks to save and end, and wait for them; a second signal ends the wait."""
    asked = False
    for status in read_statuses(run):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # The process id may belong to another process by now, but not to one of this group.
            if status.state in ("training", "evaluating") and os.getpgid(status.pid) == process.pid:
                os.kill(status.pid, signal.SIGUSR1)
                asked = True
    if asked:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SAVE_SECONDS)


def run_processes(
    command: Sequence[str], environments: Sequence[Mapping[str, str]], log: Path, poll: Callable[[], None]
) -> int:
    """Run one process per environment with the same command; none outlives the call.

    Args:
        command: the command.
        environments: for each process, variables added to this process's environment.
        log: file for all output.
        poll: called a few times per second.

    Returns:
        0 if all processes succeed, otherwise the exit code of the first that fails; the others are then ended.
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
