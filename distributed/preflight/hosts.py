"""Check every host of a run through ssh, and compile DeepSpeed's ops on each."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from translution.planner.common import InputError, MissingPackageError, RunFailedError
from translution.planner.plans import Plan

from ..remote.rank_command import PDSH_SAFE, forwarded_variables, runner_environment, without_secrets
from ..remote.ssh import RemoteResult, Ssh, run_on_hosts, wait_for_host
from ..remote.target import LaunchTarget
from ..system.compiled_ops import COMPILE_SECONDS, OnMessage, needed_ops
from .checks import Check
from .node_report import NodeReport, compare_nodes, read_report

_REPORT_SECONDS = 120.0
"""Seconds that a host may take for its report, including the NVMe check."""


def check_programs() -> None:
    """Check that this machine has the programs that start commands on other hosts.

    Raises:
        MissingPackageError: if ssh or pdsh is not installed.
        InputError: if the path of this Python has characters that pdsh does not carry.
    """
    for program, package in (("ssh", "openssh-client"), ("pdsh", "pdsh")):
        if shutil.which(program) is None:
            raise MissingPackageError(
                f"{program} is missing: sudo apt-get install {package}, or start every node by itself with --no-ssh"
            )
    if not PDSH_SAFE.fullmatch(sys.executable):
        raise InputError(f"python: {sys.executable!r} is not allowed: pdsh carries only letters, digits and @+=:,./-")


def _environment(plan: Plan) -> dict[str, str]:
    python = {name: value for name, value in runner_environment().items() if name.startswith("PYTHON")}
    return without_secrets(forwarded_variables(plan.cluster)) | python


def _command(plan_folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "translution.cli", "preflight-node", str(plan_folder.resolve()), *options]


def _report(result: RemoteResult) -> NodeReport:
    """Return a host's report.

    Raises:
        InputError: if ssh does not reach the host, or the toolkit does not run there.
    """
    if result.unreachable:
        raise InputError(f"host {result.host}: cannot be reached through ssh: {result.last_error}")
    if result.exit_code:
        raise InputError(f"host {result.host}: cannot run this toolkit: {result.last_error}")
    return read_report(result.output, f"host {result.host}")


def _first_line(process: subprocess.Popen[str]) -> str:
    """Return the first line that a command prints; an empty string if it ends or takes too long."""
    lines: list[str] = []
    output = process.stdout
    assert output is not None
    thread = threading.Thread(target=lambda: lines.append(output.readline()), daemon=True)
    thread.start()
    thread.join(_REPORT_SECONDS)
    return "".join(lines)


def check_hosts(plan: Plan, plan_folder: Path, target: LaunchTarget) -> tuple[list[Check], int]:
    """Check all hosts; the first one listens on the ranks' port while the others try to reach it.

    Args:
        plan: the plan to run.
        plan_folder: its folder, which all hosts see at the same path.
        target: the hosts.

    Returns:
        The checks, and the port at which the ranks will meet.

    Raises:
        InputError: if the hostfile does not match the plan, or a host is not reached or cannot run this toolkit.
        MissingPackageError: if ssh or pdsh is not installed.
    """
    hosts, ssh, port = target.hosts(plan), Ssh(target.ssh_port), target.master_port
    check_programs()
    environment = _environment(plan)
    first = ssh.start(hosts[0], _command(plan_folder, "--listen", str(port or 0)), environment)
    try:
        line = _first_line(first)
        if not line.strip():
            result = wait_for_host(hosts[0], first, 10)
            _report(result)
            raise InputError(f"host {hosts[0]}: sent no report: {result.last_error}")
        reports = [read_report(line, f"host {hosts[0]}")]
        found = reports[0].port or port or 0
        reach = f"{target.master_addr or hosts[0].rpartition('@')[2]}:{found}"
        others = hosts[1:]
        commands = [_command(plan_folder, "--reach", reach)] * len(others)
        reports += [_report(result) for result in run_on_hosts(others, commands, ssh, environment, _REPORT_SECONDS)]
    finally:
        with contextlib.suppress(OSError):
            first.communicate("", timeout=10)
        first.kill()
    return compare_nodes(hosts, reports), found


def compile_on_hosts(plan: Plan, plan_folder: Path, target: LaunchTarget, on_message: OnMessage) -> None:
    """Compile the plan's DeepSpeed ops on every host, on all hosts at the same time.

    Args:
        plan: the plan to run.
        plan_folder: its folder, which all hosts see at the same path.
        target: the hosts.
        on_message: called with each line that a host says about its ops, after the host's name.

    Raises:
        RunFailedError: names a host on which an op does not compile.
    """
    hosts, ssh = target.hosts(plan), Ssh(target.ssh_port)
    timeout_s = COMPILE_SECONDS * len(needed_ops(plan)) + 60
    commands = [_command(plan_folder, "--compile")] * len(hosts)

    def show(host: str, line: str) -> None:
        on_message(f"{host}: {line}")

    for result in run_on_hosts(hosts, commands, ssh, _environment(plan), timeout_s, show):
        if result.exit_code:
            raise RunFailedError(f"host {result.host}: {result.last_error.removeprefix('translution: error: ')}")
