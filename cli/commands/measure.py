"""``translution measure``."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from translution.planner.common.errors import InputError, MissingPackageError
from translution.planner.plans.plan import PLAN_FILE, Plan, load_plan

from .verify import run_verify


def run_measure(plan: Plan, out: Path | None, *, resume: bool, as_json: bool) -> None:
    """Run a plan for a few steps and print predicted beside measured memory.

    Args:
        plan: what to run.
        out: the folder to keep plan and run in; None keeps neither.
        resume: also measure resuming.
        as_json: print JSON instead of a table.
    """
    try:
        from translution.distributed.verification.measured_run import few_steps, measure_plan
    except ImportError as error:
        raise MissingPackageError(f"{error.name} is missing: pip install 'translution-scale[train]'") from None
    console = Console(stderr=True, highlight=False, markup=False)
    kept = Path(tempfile.mkdtemp(prefix="translution-measure-")) if out is None else None
    try:
        folder = out if kept is None else kept / "plan"
        assert folder is not None
        run = measure_plan(few_steps(plan), folder, console.print, resume=resume)
        run_verify(run, as_json=as_json)
    finally:
        if kept is not None:
            shutil.rmtree(kept, ignore_errors=True)


def plan_of(folder: Path) -> Plan | None:
    """The plan, if it is a plan folder; None if it may be a model's name.

    Raises:
        InputError: if it is a folder without a plan.
    """
    if not folder.is_dir():
        return None
    if not (folder / PLAN_FILE).is_file():
        raise InputError(f"{folder}: is not a plan folder: must hold {PLAN_FILE}")
    return load_plan(folder)
