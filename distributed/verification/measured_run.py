"""Runs a plan for a few steps and measures the memory of each rank from init to resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from translution.planner.plans import Plan, write_plan_folder

from ..launcher.launcher import launch, start_ranks
from ..runs.mode import RunMode

MEASURED_RUN_STEPS = 4
"""Steps of a measured run: allocations are traced in the third, the process is measured from the second on."""


def measure_plan(plan: Plan, folder: Path, on_message: Callable[[str], None], *, resume: bool = True) -> Path:
    """Run a plan on this machine for a few steps, save, and resume from the checkpoint.

    Args:
        plan: the plan, with the steps of `few_steps`.
        folder: the plan folder to write.
        on_message: called with a line of text when something slow begins.
        resume: also restart the ranks to load the checkpoint, once to trace allocations and once to measure the
            processes.

    Returns:
        The run folder, with the measurement of each rank.

    Raises:
        InputError: if this machine cannot run the plan, or the folder exists.
        RunFailedError: if a rank did not finish.
    """
    write_plan_folder(plan, folder)
    run = launch(folder, mode=RunMode.MEASURE, on_message=on_message).run
    if resume:
        on_message("restarting the ranks to measure loading the checkpoint")
        start_ranks(plan, folder, run, mode=RunMode.MEASURE_RESUME)
        on_message("restarting the ranks to measure the processes instead of torch's allocator")
        start_ranks(plan, folder, run, mode=RunMode.MEASURE_PROCESS)
        start_ranks(plan, folder, run, mode=RunMode.MEASURE_RESUME_PROCESS)
    return run


def few_steps(plan: Plan) -> Plan:
    """Return the plan with as many steps as a measurement takes."""
    training = plan.training.model_copy(update={"steps": MEASURED_RUN_STEPS, "warmup_steps": 0})
    return plan.model_copy(update={"training": training})
