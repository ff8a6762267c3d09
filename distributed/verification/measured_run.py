"""Running a plan for a few steps, to measure what each rank holds from init to resume."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from translution.planner.plans.folder import write_plan_folder
from translution.planner.plans.plan import Plan

from ..launcher.launch import launch, start_ranks
from ..runs.mode import RunMode

STEPS = 4
"""In the third allocations are watched; the process is in all but the first."""


def measure_plan(plan: Plan, folder: Path, on_message: Callable[[str], None], *, resume: bool = True) -> Path:
    """Run a plan on this machine for a few steps, save, and resume.

    Args:
        plan: with as few steps as `few_steps` gives.
        folder: the plan folder to write.
        on_message: called with a line for people when something slow begins.
        resume: also start the ranks anew and read the checkpoint, once watching allocations and once
            the processes.

    Returns:
        The run folder, with what each rank measured.

    Raises:
        InputError: if this machine cannot run the plan, or the folder exists.
        RunFailedError: if a rank did not finish.
    """
    write_plan_folder(plan, folder)
    run = launch(folder, mode=RunMode.MEASURE, on_message=on_message).run
    if resume:
        on_message("starting the ranks anew, to resume from the checkpoint")
        start_ranks(plan, folder, run, mode=RunMode.MEASURE_RESUME)
        on_message("once more, to watch the processes instead of torch's allocator")
        with _freed_at_once():
            start_ranks(plan, folder, run, mode=RunMode.MEASURE_PROCESS)
    return run


@contextlib.contextmanager
def _freed_at_once() -> Iterator[None]:
    """Let glibc give freed tensors back to the system; how much it would keep else depends on their order."""
    name = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    os.environ[name] = str(2**17)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def few_steps(plan: Plan) -> Plan:
    """The plan with so few steps that it is over when everything has been measured."""
    training = plan.training.model_copy(update={"steps": STEPS, "warmup_steps": 0})
    return plan.model_copy(update={"training": training})
