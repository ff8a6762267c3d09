"""Runs a plan for a few steps and measures the memory of each rank from init to resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from translution.planner.common import OnProgress, ignore_progress
from translution.planner.plans import Plan, write_plan_folder

from ..launcher.launcher import launch, start_ranks
from ..runs.mode import RunMode

MEASURED_RUN_STEPS = 4
"""Steps of a measured run: allocations are traced in the third, the process is measured from the second on."""

_AGAIN = (
    (RunMode.MEASURE_RESUME, "loading the checkpoint"),
    (RunMode.MEASURE_PROCESS, "the processes instead of torch's allocator"),
    (RunMode.MEASURE_RESUME_PROCESS, "the processes while they load the checkpoint"),
)
"""How the ranks run again, and what is measured then."""


def measure_plan(
    plan: Plan,
    folder: Path,
    on_message: Callable[[str], None],
    *,
    resume: bool = True,
    on_progress: OnProgress = ignore_progress,
) -> Path:
    """Run a plan on this machine for a few steps, save, and resume from the checkpoint.

    Args:
        plan: the plan, with the steps of `few_steps`.
        folder: the plan folder to write.
        on_message: called with a line of text when something slow begins.
        resume: also restart the ranks to load the checkpoint, once to trace allocations and once to measure the
            processes.
        on_progress: called with the number of times that the ranks have run, and how often they will.

    Returns:
        The run folder, with the measurement of each rank.

    Raises:
        InputError: if this machine cannot run the plan, or the folder exists.
        RunFailedError: if a rank did not finish.
    """
    write_plan_folder(plan, folder)
    again = _AGAIN if resume else ()
    run = launch(folder, mode=RunMode.MEASURE, on_message=on_message).run
    for number, (mode, text) in enumerate(again, start=1):
        on_progress(number, len(again) + 1)
        on_message(f"restarting the ranks to measure {text}")
        start_ranks(plan, folder, run, mode=mode)
    on_progress(len(again) + 1, len(again) + 1)
    return run


def few_steps(plan: Plan) -> Plan:
    """Return the plan with as many steps as a measurement takes."""
    training = plan.training.model_copy(update={"steps": MEASURED_RUN_STEPS, "warmup_steps": 0})
    return plan.model_copy(update={"training": training})
