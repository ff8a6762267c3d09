"""Looking at every host of a run before its ranks start, and compiling DeepSpeed's ops on each."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from translution.planner.common.errors import InputError, MissingPackageError, RunFailedError
from translution.planner.plans.plan import Plan

from ..remote.rank_command import SAFE, forwarded, runner_environment
from ..remote.ssh import Answer, Ssh, run_on, wait_for
from ..system.compiled_ops import COMPILE_SECONDS, needed_ops
from .checks import Check
from .node_report import NodeReport, judge_nodes, read_report

_REPORT_SECONDS = 120.0
"""How long a host may take to say how it is, NVMe drive and all."""


def check_programs() -> None:
    """Whether what starts commands on other hosts is here.

    Raises:
        MissingPackageError: without ssh or pdsh.
        InputError: if this Python lies where pdsh cannot name it.
    """
    for program, package in (("ssh", "openssh-client"), ("pdsh", "pdsh")):
        if shutil.which(program) is None:
            raise MissingPackageError(
                f"{program} is missing: sudo apt-get install {package}, or start every node by itself with --no-ssh"
            )
    if not SAFE.fullmatch(sys.executable):
        raise InputError(f"python: {sys.executable!r} is not allowed: pdsh carries only letters, digits and @+=:,./-")


def _environment(plan: Plan) -> dict[str, str]:
    python = {name: value for name, value in runner_environment().items() if name.startswith("PYTHON")}
    return forwarded(plan.cluster) | python


def _command(plan_folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "translution.cli", "preflight-node", str(plan_folder.resolve()), *options]


def _report(answer: Answer) -> NodeReport:
    """What a host says of itself.

    Raises:
        InputError: if ssh does not reach it, or the toolkit does not run there.
    """
    if answer.unreachable:
        raise InputError(f"host {answer.host}: is not reached through ssh: {answer.last_words}")
    if answer.exit_code:
        raise InputError(f"host {answer.host}: cannot run this toolkit: {answer.last_words}")
    return read_report(answer.output, f"host {answer.host}")


def _first_line(process: subprocess.Popen[str]) -> str:
    """The first line that a command prints; nothing if it ends, or is too slow."""
    lines: list[str] = []
    output = process.stdout
    assert output is not None
    thread = threading.Thread(target=lambda: lines.append(output.readline()), daemon=True)
    thread.start()
    thread.join(_REPORT_SECONDS)
    return "".join(lines)


def look_at_hosts(
    plan: Plan, plan_folder: Path, hosts: Sequence[str], ssh: Ssh, address: str | None, port: int | None
) -> tuple[list[Check], int]:
    """Look at all hosts; the first one listens on the rendezvous's port while the others try to reach it.

    Args:
        plan: what is to run.
        plan_folder: where it lies, on all of them.
        hosts: in the order of the nodes.
        ssh: how they are reached.
        address: of the first, for the others; None is its name.
        port: to try; None takes a free one.

    Returns:
        What was looked at, and the port.

    Raises:
        InputError: if a host is not reached, or cannot run this toolkit.
        MissingPackageError: as `check_programs` does.
    """
    check_programs()
    environment = _environment(plan)
    first = ssh.start(hosts[0], _command(plan_folder, "--listen", str(port or 0)), environment)
    try:
        line = _first_line(first)
        if not line.strip():
            answer = wait_for(hosts[0], first, 10)
            _report(answer)
            raise InputError(f"host {hosts[0]}: says nothing of itself: {answer.last_words}")
        reports = [read_report(line, f"host {hosts[0]}")]
        found = reports[0].port or port or 0
        reach = f"{address or hosts[0].rpartition('@')[2]}:{found}"
        others = hosts[1:]
        commands = [_command(plan_folder, "--reach", reach)] * len(others)
        reports += [_report(answer) for answer in run_on(others, commands, ssh, environment, _REPORT_SECONDS)]
    finally:
        with contextlib.suppress(OSError):
            first.communicate("", timeout=10)
        first.kill()
    return judge_nodes(hosts, reports), found


def prepare_hosts(plan: Plan, plan_folder: Path, hosts: Sequence[str], ssh: Ssh) -> None:
    """Compile the plan's ops on every host, in one process on each.

    Raises:
        RunFailedError: naming a host on which they do not compile.
    """
    timeout_s = COMPILE_SECONDS * len(needed_ops(plan)) + 60
    commands = [_command(plan_folder, "--compile")] * len(hosts)
    for answer in run_on(hosts, commands, ssh, _environment(plan), timeout_s):
        if answer.exit_code:
            raise RunFailedError(f"host {answer.host}: {answer.last_words.removeprefix('translution: error: ')}")
