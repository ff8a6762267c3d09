"""``translution preflight``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from translution.distributed.launcher.launch import Where
from translution.distributed.preflight.checks import preflight
from translution.distributed.preflight.hosts import check_hosts, compile_on_hosts
from translution.distributed.preflight.node_report import compare_reports, compile_on_node
from translution.distributed.remote.ssh import Ssh
from translution.distributed.system.environment import check_machine, version_warnings
from translution.planner.plans.plan import load_plan

from ..options import (
    HostfileOption,
    JsonOption,
    MasterAddressOption,
    MasterPortOption,
    PlanFolderArgument,
    SshPortOption,
)
from ..output import note, print_json
from . import app


@app.command(
    "preflight",
    epilog="Examples: **translution preflight plans/small** · **translution preflight plans/large --hostfile hosts**",
)
def preflight_cli(
    plan_folder: PlanFolderArgument,
    hostfile: HostfileOption = None,
    master_addr: MasterAddressOption = None,
    master_port: MasterPortOption = None,
    ssh_port: SshPortOption = None,
    compile_ops: Annotated[
        bool, typer.Option("--compile", help="Also compile the DeepSpeed ops that the ranks need.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Exit with 0 even if a check fails.")] = False,
    reports: Annotated[
        Path | None, typer.Option(help="Folder of reports that every node wrote with preflight-node --out.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check whether a plan can run on this machine or on the hosts of a hostfile; exit with 1 if a check fails."""
    where = Where(hostfile, master_addr=master_addr, master_port=master_port, ssh_port=ssh_port)
    plan = load_plan(plan_folder)
    hosts = where.check(plan, None) if where.hostfile else []
    if reports is not None:
        checks = compare_reports(reports, plan.cluster.nodes)
    elif hosts:
        ssh = Ssh(where.ssh_port)
        checks, _ = check_hosts(plan, plan_folder, hosts, ssh, where.master_addr, where.master_port)
    else:
        check_machine(plan)
        checks = preflight(plan, plan_folder)
    for text in version_warnings(plan):
        note(text)
    if as_json:
        print_json({"checks": [check.model_dump() for check in checks]})
    else:
        for check in checks:  # Lines, because paths are too long for a table.
            print(f"{'ok' if check.passed else 'FAILED':8}{check.name}: {check.text}")
    if not force and not all(check.passed for check in checks):
        raise typer.Exit(1)
    if compile_ops:
        note("compiling what the ranks need of DeepSpeed, a minute or more for each op unless it is there already")
        if hosts:
            compile_on_hosts(plan, plan_folder, hosts, ssh)
        else:
            compile_on_node(plan_folder)
