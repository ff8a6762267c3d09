"""Start ranks on other hosts through DeepSpeed's pdsh runner, watch them, and end them together."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from translution.planner.common import RunFailedError

from ..remote.ssh import SSH_ARGUMENTS, Ssh, run_on_hosts
from ..runs.folder import LOG, METRICS
from ..runs.heartbeat import keep_heartbeat, request_stop
from ..runs.progress import HEARTBEAT_SECONDS, RankProgress, request_stacks
from ..runs.rank_watch import RankWatch
from ..runs.status import read_statuses, resume_hint
from ..system.compiled_ops import OnMessage
from ..system.signals import EndedError, ending_signals_raise
from .local_processes import (
    GRACE_SECONDS,
    POLL_SECONDS,
    MetricsReader,
    OnMetrics,
    describe_outcome,
    wait_for_moves,
    wait_for_saving,
)

SignalRank = Callable[[RankProgress, str], None]
"""Sends a signal to a rank, on its host."""
_SIGNAL_SECONDS = 15.0
_HOST_FAILED = re.compile(rb"^pdsh@[^:]*: [^:]*: ssh exited with exit code (\d+)", re.MULTILINE)
"""What pdsh prints when the command of one host has failed, while those of other hosts still run."""


def run_remote_ranks(
    command: Sequence[str],
    environment: Mapping[str, str],
    run: Path,
    on_metrics: OnMetrics,
    *,
    watch: RankWatch,
    on_message: OnMessage,
    signal_rank: SignalRank,
) -> int:
    """Run DeepSpeed's runner and wait for it; the ranks on all hosts end when the run folder's heartbeat stops.

    Args:
        command: the runner's command.
        environment: the runner's complete environment.
        run: the run folder, which all hosts see.
        on_metrics: called with each line of the metrics file as it is written.
        watch: notices ranks that stand still.
        on_message: called with what a stopping run waits for.
        signal_rank: sends a signal to a rank, on its host.

    Returns:
        The runner's exit code, or that of the first host that failed.

    Raises:
        InterruptedRunError: if the user interrupted the run; the ranks have saved and ended.
        RunFailedError: if a signal ended the run, or a rank hung; the ranks have saved, if they could, and ended.
    """
    reader = MetricsReader(run / METRICS, on_metrics)
    # Without keep-alive messages ssh would wait for a lost host until TCP gives up.
    ssh_arguments = f"{environment.get(SSH_ARGUMENTS, '')} -o BatchMode=yes -o ServerAliveInterval=15".strip()
    with (run / LOG).open("ab") as log, ending_signals_raise(), keep_heartbeat(run):
        offset = log.tell()
        process = subprocess.Popen(
            command,
            # The runner changes to this folder on every host: the root folder exists and needs no quoting.
            cwd="/",
            env={**environment, SSH_ARGUMENTS: ssh_arguments},
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
                if not failed and (hang := watch.find_hang()):
                    on_message(f"{hang}; the ranks are asked to save and end")
                    _save_hung(process, watch, signal_rank)
                    raise RunFailedError("; ".join(filter(None, [hang, describe_outcome(run)])))
            if failed:
                # Usually the other ranks notice by themselves and report an error.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
        except (KeyboardInterrupt, EndedError) as ended:
            if any(status.state in ("training", "evaluating") for status in read_statuses(run)):
                request_stop(run)
                wait_for_saving(process, watch, on_message)
            if hint := resume_hint(run):
                ended.args = (*ended.args, hint)
            raise
        finally:
            if process.poll() is None:
                _abandon(process)
    reader.poll()
    return failed or process.returncode


def signals_of_hosts(hosts: Sequence[str], ranks_per_node: int, ssh_port: int | None) -> SignalRank:
    """Return a function that sends a signal to a rank of one of the hosts through ssh; what fails is left.

    Args:
        hosts: the hosts, in the order of the nodes.
        ranks_per_node: ranks of each host.
        ssh_port: port of the ssh servers.
    """

    def send(rank: RankProgress, name: str) -> None:
        # By now the number may be that of another process.
        check = f"grep -q translution /proc/{rank.pid}/cmdline && kill -{name} {rank.pid}"
        host = hosts[rank.rank // ranks_per_node]
        run_on_hosts([host], [["sh", "-c", check]], Ssh(ssh_port), {}, _SIGNAL_SECONDS)

    return send


def _failed(run: Path, offset: int) -> int:
    """Return the exit code of a host whose command failed, 1 if a rank reports a failure, otherwise 0."""
    with (run / LOG).open("rb") as log:
        log.seek(offset)
        match = _HOST_FAILED.search(log.read())
    if match:
        return int(match[1])
    return int(any(status.state == "failed" for status in read_statuses(run)))


def _save_hung(process: subprocess.Popen[bytes], watch: RankWatch, signal_rank: SignalRank) -> None:
    """Let ranks print their stacks after one of them hung, and save if they still can; kill the one that cannot."""
    hung = watch.hung
    request_stacks(watch.run)
    if hung is not None:
        signal_rank(hung, "CONT")
    time.sleep(2 * HEARTBEAT_SECONDS)
    request_stop(watch.run)
    if not wait_for_moves(process, watch) and hung is not None:
        # Without a process that runs it does not see that its launcher has ended.
        signal_rank(hung, "KILL")


def _abandon(process: subprocess.Popen[bytes]) -> None:
    """Kill the runner.

    On SIGTERM the runner would call pkill on the hosts, which ends every DeepSpeed launcher of this Python, including
    those of other runs (DeepSpeed 0.19.8, launcher/multinode_runner.py). The ranks end when the heartbeat stops.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
