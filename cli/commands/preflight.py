"""``translution preflight``."""

from __future__ import annotations

from pathlib import Path

import typer

from translution.distributed.launcher.launch import Where
from translution.distributed.preflight.checks import preflight
from translution.distributed.preflight.hosts import look_at_hosts, prepare_hosts
from translution.distributed.preflight.node_report import compile_on_node, judge_reports
from translution.distributed.remote.ssh import Ssh
from translution.distributed.system.environment import check_machine, version_warnings
from translution.planner.plans.plan import load_plan

from ..output import note, print_json


def run_preflight(
    plan_folder: Path, where: Where, reports: Path | None, *, compile_ops: bool, force: bool, as_json: bool
) -> None:
    """Print what was looked at, and end with 1 if anything would keep the plan from running.

    Without a hostfile this machine is looked at, as one node of the plan's.

    Args:
        plan_folder: as `translution plan` writes it.
        where: the hosts to look at.
        reports: a folder of what nodes have said of themselves, to judge instead.
        compile_ops: compile DeepSpeed's ops on each, too.
        force: end with 0 all the same.
        as_json: print JSON instead of lines.
    """
    plan = load_plan(plan_folder)
    hosts = where.check(plan, None) if where.hostfile else []
    if reports is not None:
        checks = judge_reports(reports, plan.cluster.nodes)
    elif hosts:
        ssh = Ssh(where.ssh_port)
        checks, _ = look_at_hosts(plan, plan_folder, hosts, ssh, where.master_addr, where.master_port)
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
            prepare_hosts(plan, plan_folder, hosts, ssh)
        else:
            compile_on_node(plan_folder)
