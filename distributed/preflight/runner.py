"""Preflight: check whether a plan can run on its machines, before any rank starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from translution.planner.plans import PORT, Plan, load_plan

from ..remote.target import THIS_MACHINE, LaunchTarget
from ..system.compiled_ops import OnMessage
from ..system.environment import check_machine, free_port, version_warnings
from .checks import Check, check_node
from .hosts import check_hosts, compile_on_hosts
from .node_report import compare_reports, compile_on_node


@dataclass(frozen=True)
class PreflightReport:
    """Result of a preflight."""

    checks: tuple[Check, ...]
    """All checks, those of other hosts named ``HOST: NAME``."""
    warnings: tuple[str, ...]
    """A sentence for each package whose installed version differs from the plan's."""

    @property
    def passed(self) -> bool:
        """True if every check passed."""
        return all(check.passed for check in self.checks)


def preflight(
    plan_folder: Path | str, *, target: LaunchTarget = THIS_MACHINE, reports: Path | None = None
) -> PreflightReport:
    """Check the machines of a plan: memory, drives, ports, data, packages and versions.

    Without a hostfile this machine is checked, as one node of the plan.

    Args:
        plan_folder: folder that `translution plan` wrote.
        target: the hosts to check.
        reports: folder of node reports written by ``preflight-node --out``, to compare instead of checking hosts.

    Raises:
        InputError: if there is no plan, the hostfile does not match it, a host is not reached or cannot run this
            toolkit, a machine has too few cores or GPUs, or `reports` does not hold one report per node.
        MissingPackageError: if a package or program that the run needs is not installed.
    """
    plan_folder = Path(plan_folder)
    plan = load_plan(plan_folder)
    plan.require_deepspeed()
    if reports is not None:
        checks = compare_reports(reports, plan.cluster.nodes)
    else:
        checks, _ = check_target(plan, plan_folder, target)
    return PreflightReport(tuple(checks), tuple(version_warnings(plan)))


def check_target(
    plan: Plan, plan_folder: Path, target: LaunchTarget, *, saved_bytes: int = 0
) -> tuple[list[Check], int]:
    """Check the hosts of a target, or this machine.

    Args:
        plan: the plan to run.
        plan_folder: its folder.
        target: the machines.
        saved_bytes: bytes of the checkpoint that this machine's run resumes from, which the disk holds already.

    Returns:
        The checks, and the port at which the ranks will meet.

    Raises:
        InputError: if a host is not reached, or a machine cannot run the plan's ranks.
        MissingPackageError: if a package or program that the run needs is not installed.
    """
    if target.over_ssh:
        return check_hosts(plan, plan_folder, target)
    check_machine(plan)
    port = target.master_port or (PORT if target.no_ssh else free_port())
    return check_node(plan, plan_folder, saved_bytes), port


def compile_plan_ops(
    plan_folder: Path, *, target: LaunchTarget = THIS_MACHINE, on_message: OnMessage = lambda _: None
) -> None:
    """Compile the DeepSpeed ops of a plan on every host of a target, or on this machine.

    Ops that are compiled already are left as they are.

    Args:
        plan_folder: folder that `translution plan` wrote.
        target: the hosts to compile on.
        on_message: called with a line of text before and after each op is compiled, and while it takes long.

    Raises:
        InputError: if there is no plan, or the hostfile does not match it.
        MissingPackageError: if DeepSpeed or a compiler is not installed.
        RunFailedError: if an op does not compile.
    """
    if target.over_ssh:
        compile_on_hosts(load_plan(plan_folder), plan_folder, target, on_message)
    else:
        compile_on_node(plan_folder, on_message)
