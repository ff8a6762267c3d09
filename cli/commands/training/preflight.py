"""``translution preflight``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from translution.distributed.preflight import compile_plan_ops, preflight
from translution.distributed.remote import LaunchTarget

from ...options import (
    HostfileOption,
    JsonOption,
    MasterAddressOption,
    MasterPortOption,
    PlanFolderArgument,
    SshPortOption,
)
from ...output import note, print_json
from .. import app


@app.command(
    "preflight",
    epilog="Examples: **translution preflight plans/small** · **translution preflight plans/large --hostfile hosts** · "
    "**translution preflight plans/small --compile**",
)
def preflight_cli(
    plan_folder: PlanFolderArgument,
    hostfile: HostfileOption = None,
    master_addr: MasterAddressOption = None,
    master_port: MasterPortOption = None,
    ssh_port: SshPortOption = None,
    compile_ops: Annotated[
        bool,
        typer.Option("--compile", help="Also compile the DeepSpeed ops that the ranks need, so that launch need not."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Exit with 0 even if a check fails.")] = False,
    reports: Annotated[
        Path | None, typer.Option(help="Folder of reports that every node wrote with preflight-node --out.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check whether a plan can run on this machine or on the hosts of a hostfile; exit with 1 if a check fails."""
    target = LaunchTarget(hostfile, master_addr=master_addr, master_port=master_port, ssh_port=ssh_port)
    report = preflight(plan_folder, target=target, reports=reports)
    for text in report.warnings:
        note(text)
    if as_json:
        print_json({"checks": [check.model_dump() for check in report.checks]})
    else:
        for check in report.checks:  # Lines, because paths are too long for a table.
            print(f"{'ok' if check.passed else 'FAILED':8}{check.name}: {check.text}")
    if not force and not report.passed:
        raise typer.Exit(1)
    if compile_ops:
        compile_plan_ops(plan_folder, target=target, on_message=note)
        note("the DeepSpeed ops that the ranks need are compiled")
