"""``translution preflight``."""

from __future__ import annotations

from pathlib import Path

import typer

from translution.distributed.launch import check_machine, version_warnings
from translution.distributed.preflight import preflight
from translution.planner.plan import load_plan

from .output import note, print_json


def run_preflight(plan_folder: Path, *, as_json: bool) -> None:
    """Print what was looked at, and end with 1 if anything would keep the plan from running.

    Args:
        plan_folder: as `translution plan` writes it.
        as_json: print JSON instead of lines.
    """
    plan = load_plan(plan_folder)
    check_machine(plan)
    checks = preflight(plan, plan_folder)
    for text in version_warnings(plan):
        note(text)
    if as_json:
        print_json({"checks": [check.model_dump() for check in checks]})
    else:
        for check in checks:  # Lines, because paths are too long for a table.
            print(f"{'ok' if check.passed else 'FAILED':8}{check.name}: {check.text}")
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
