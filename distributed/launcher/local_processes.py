"""Start processes on this machine, watch them, and end them together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from translution.planner.common import InputError, RunFailedError, read_json

from ..runs.folder import LOG, METRICS, log_path
from ..runs.progress import HEARTBEAT_SECONDS, read_progress, request_stacks
from ..runs.rank_watch import RankWatch
from ..runs.status import RankStatus, read_statuses, resume_hint
from ..runs.watchdog import LAUNCHER_PID
from ..system.compiled_ops import OnMessage
from ..system.signals import EndedError, ending_signals_raise

GRACE_SECONDS = 15.0
"""Seconds between asking processes to end and killing them."""
SAVE_SECONDS = 3600.0
"""Seconds that ranks may take to finish their step and save a checkpoint, once asked to stop."""
POLL_SECONDS = 0.2
"""Seconds between two looks at the processes and the metrics file."""

_STACKS_SECONDS = 1.0
"""Seconds in which a rank prints its stacks after a signal."""
HUNG_SECONDS = 20.0
"""Seconds in which ranks that were asked to save, because one hung, must begin a phase; saving may take longer."""
_WAIT_MESSAGE_SECONDS = 15.0
"""Seconds between two messages about what a stopping run waits for."""

OnMetrics = Callable[[Mapping[str, Any]], None]
"""Called with each line of the metrics file, as a mapping."""


def _no_message(_: str) -> None:
    """Default of `on_message`: do nothing."""


def _stop(process: subprocess.Popen[bytes], *, at_once: bool = False) -> None:
    """End the launcher and all ranks, which share its process group; `at_once` gives them no time to save."""
    for end in (signal.SIGKILL,) if at_once else (signal.SIGTERM, signal.SIGKILL):
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
                    found = read_json(line, str(self._path))
                    if isinstance(found, dict) and "event" in found:
                        self._on_metrics(found)


def run_ranks(
    command: Sequence[str],
    environment: Mapping[str, str],
    run: Path,
    on_metrics: OnMetrics,
    *,
    watch: RankWatch | None = None,
    on_message: OnMessage = _no_message,
) -> int:
    """Run the launcher in its own process group and wait for it; no rank outlives the call.

    Ranks also watch this process, and end by themselves if it is killed.

    Args:
        command: the launcher's command.
        environment: variables added to this process's environment.
        run: the run folder; all output goes to its launcher log.
        on_metrics: called with each line of the metrics file as it is written.
        watch: notices ranks that die or stand still; None watches nothing.
        on_message: called with what a stopping run waits for.

    Returns:
        The launcher's exit code.

    Raises:
        InterruptedRunError: if the user interrupted the run; the ranks have saved and ended.
        RunFailedError: if a signal ended the run, or a rank hung; the ranks have saved, if they could, and ended.
    """
    watch = watch or RankWatch(run, (), 0, None)
    reader = MetricsReader(run / METRICS, on_metrics)
    environment = {**os.environ, **environment, LAUNCHER_PID: str(os.getpid())}
    at_once = False
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
                watch.look()
                if hang := watch.find_hang():
                    at_once = not _save_hung(process, watch, hang, on_message)
                    raise RunFailedError("; ".join(filter(None, [hang, describe_outcome(run)])))
                time.sleep(POLL_SECONDS)
        except (KeyboardInterrupt, EndedError) as ended:
            at_once = True  # A second signal ends the wait, and then the ranks.
            at_once = not _let_ranks_save(process, run, watch, on_message)
            if hint := resume_hint(run):
                ended.args = (*ended.args, hint)
            raise
        finally:
            _stop(process, at_once=at_once)
    reader.poll()
    return process.returncode


def describe_outcome(run: Path) -> str:
    """Return what is left of a run that hung."""
    return resume_hint(run) or f"the stacks of the ranks are in {log_path(run, 0).parent}"


def _group_ranks(process: subprocess.Popen[bytes], run: Path) -> Iterator[RankStatus]:
    """Yield the statuses of the ranks of a launcher that are alive."""
    for status in read_statuses(run):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # The process id may belong to another process by now, but not to one of this group.
            if os.getpgid(status.pid) == process.pid:
                yield status


def _ask(process: subprocess.Popen[bytes], run: Path, number: int) -> bool:
    """Send a signal to the ranks that train or evaluate; return whether there is one."""
    asked = False
    for status in _group_ranks(process, run):
        if status.state in ("training", "evaluating"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(status.pid, number)
                asked = True
    return asked


def _save_hung(process: subprocess.Popen[bytes], watch: RankWatch, hang: str, on_message: OnMessage) -> bool:
    """Let the ranks of a run in which one hangs print their stacks, and save if they still can.

    Returns:
        True if all have ended by themselves.
    """
    on_message(f"{hang}; the ranks are asked to save and end")
    _print_stacks(process, watch.run)
    if not _ask(process, watch.run, signal.SIGUSR1):
        return False
    return wait_for_moves(process, watch)


def _print_stacks(process: subprocess.Popen[bytes], run: Path) -> None:
    """Let all ranks print their stacks to their logs, those too that a signal has stopped.

    Each is asked by a file, at which its heartbeat's thread looks. A signal's handler reads frames that other threads
    may be changing, and so may end a rank that runs Python. It is sent only to ranks without a heartbeat: there, a call
    keeps Python's lock.
    """
    statuses = list(_group_ranks(process, run))
    before = {status.rank: _heartbeat(run, status.rank) for status in statuses}
    request_stacks(run)
    _send(statuses, signal.SIGCONT)
    time.sleep(2 * HEARTBEAT_SECONDS)
    silent = [status for status in statuses if _heartbeat(run, status.rank) == before[status.rank]]
    if silent:
        _send(silent, signal.SIGUSR2)
        time.sleep(_STACKS_SECONDS)


def _heartbeat(run: Path, rank: int) -> int:
    """Return the number of a rank's heartbeats; 0 for a rank that has not started."""
    progress = read_progress(run, rank)
    return progress.heartbeat if progress else 0


def _send(statuses: Sequence[RankStatus], number: int) -> None:
    """Send a signal to ranks of this machine."""
    for status in statuses:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(status.pid, number)


def wait_for_moves(process: subprocess.Popen[bytes], watch: RankWatch) -> bool:
    """Wait for the end of ranks that were asked to save after one hung, as long as one of them goes on.

    Returns:
        True if all have ended.
    """
    moved, since = watch.count_moves(), time.monotonic()
    while process.poll() is None and time.monotonic() - since < watch.limit_after_request(HUNG_SECONDS):
        time.sleep(POLL_SECONDS)
        if (now := watch.count_moves()) != moved:
            moved, since = now, time.monotonic()
    return process.poll() is not None


def _let_ranks_save(process: subprocess.Popen[bytes], run: Path, watch: RankWatch, on_message: OnMessage) -> bool:
    """Ask training ranks to save and end, and wait for them; a second signal ends the wait.

    Returns:
        False if one of them hangs.
    """
    return not _ask(process, run, signal.SIGUSR1) or wait_for_saving(process, watch, on_message)


def wait_for_saving(process: subprocess.Popen[bytes], watch: RankWatch, on_message: OnMessage) -> bool:
    """Wait until ranks that were asked to save have ended, and tell what they are doing.

    Returns:
        False if one of them hangs, or they take longer than `SAVE_SECONDS`.
    """
    began, told = time.monotonic(), -_WAIT_MESSAGE_SECONDS
    while process.poll() is None:
        waited = time.monotonic() - began
        if waited - told >= _WAIT_MESSAGE_SECONDS:
            told = waited
            on_message(f"waiting until the ranks have saved; another Ctrl-C ends them at once. {watch.describe()}")
        if hang := watch.find_hang():
            on_message(hang)
            return False
        if waited > SAVE_SECONDS:
            return False
        time.sleep(POLL_SECONDS)
    return True


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
