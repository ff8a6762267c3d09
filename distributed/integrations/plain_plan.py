"""Loads a plan for a trainer of another project, which builds its network itself."""

from __future__ import annotations

from pathlib import Path

from translution.planner.common import InputError
from translution.planner.plans import Plan, load_plan


def load_plain_plan(folder: str | Path, trainer: str) -> Plan:
    """Load a plan whose ranks all have the same parameters.

    Args:
        folder: the plan folder.
        trainer: name of the trainer, for the message.

    Raises:
        InputError: if the folder holds no plan, or one whose ranks share out the relations.
    """
    plan = load_plan(folder)
    if plan.parallel.relation > 1:
        raise InputError(
            f"{folder}: parallel.relation: {plan.parallel.relation} is not allowed: must be 1 for {trainer}; "
            "translution launch runs this plan"
        )
    return plan
