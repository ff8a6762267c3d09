"""Ranks on other hosts, through DeepSpeed's pdsh runner: started, watched, asked to save, and ended together."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..remote.ssh import SSH_ARGUMENTS
from ..runs.folder import LOG, METRICS
from ..runs.heartbeat import keep_heartbeat, request_stop
from ..runs.status import read_statuses, resume_hint
from ..system.signals import EndedError
from ..system.signals import ending_signals_raise as ending_signals
from .local_processes import GRACE_SECONDS, POLL_SECONDS, SAVE_SECONDS, MetricsReader, OnMetrics

_ENDED = re.compile(rb"^pdsh@[^:]*: [^:]*: ssh exited with exit code (\d+)", re.MULTILINE)
"""What pdsh says of a host whose command has failed, while those of other hosts still run."""


def run_remote_ranks(command: Sequence[str], environment: Mapping[str, str], run: Path, on_metrics: OnMetrics) -> int:
    """Start DeepSpeed's runner and wait; ranks on any host end with it, by the run folder's beat.

    Args:
        command: what to start.
        environment: all of it.
        run: the run folder, which all hosts see.
        on_metrics: called with each line of the metrics file as it is written.

    Returns:
        The runner's exit code, or that of the first host that failed.
    """
    reader = MetricsReader(run / METRICS, on_metrics)
    # A host that is gone must not be waited for as long as TCP would.
    alive = f"{environment.get(SSH_ARGUMENTS, '')} -o BatchMode=yes -o ServerAliveInterval=15".strip()
    with (run / LOG).open("ab") as log, ending_signals(), keep_heartbeat(run):
        offset = log.tell()
        process = subprocess.Popen(
            command,
            # Every node has the root folder, and its name needs no quoting.
            cwd="/",
            env={**environment, SSH_ARGUMENTS: alive},
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        failed = 0
        try:
            while process.poll() is None and not failed:
                reader.poll()
                time.sleep(POLL_SECONDS)
                failed = _failed(run, offset)
            if failed:
                # The others notice by themselves, as a rule, and say what they saw.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
        except (KeyboardInterrupt, EndedError) as ended:
            _let_ranks_save(process, run)
            if text := resume_hint(run):
                ended.args = (*ended.args, text)
            raise
        finally:
            if process.poll() is None:
                _abandon(process)
    reader.poll()
    return failed or process.returncode


def _failed(run: Path, offset: int) -> int:
    """The exit code of a host whose ranks have failed, or 1 if a rank says so; 0 if none has."""
    with (run / LOG).open("rb") as log:
        log.seek(offset)
        match = _ENDED.search(log.read())
    if match:
        return int(match[1])
    return int(any(status.state == "failed" for status in read_statuses(run)))


def _let_ranks_save(process: subprocess.Popen[bytes], run: Path) -> None:
    """Ask ranks that train to save and end, and wait for it; a second signal cuts the wait short."""
    if any(status.state == "training" for status in read_statuses(run)):
        request_stop(run)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SAVE_SECONDS)


def _abandon(process: subprocess.Popen[bytes]) -> None:
    """End the runner without a word.

    Asked to end, it would have pkill end every DeepSpeed launcher of this Python on the hosts, other runs' too
    (DeepSpeed 0.19.8, launcher/multinode_runner.py). The ranks end when the beat does.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
