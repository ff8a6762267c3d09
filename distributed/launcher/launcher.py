"""Launch a plan: check the machines, start the ranks through DeepSpeed's launcher, and watch them until they end."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from translution.planner.common import InputError, format_bytes
from translution.planner.plans import PORT, Plan, load_plan

from ..checkpoint.integrity import note_verified, verify_checkpoint
from ..checkpoint.resume import describe_resharding, find_resumable, prepare_resume
from ..preflight.checks import require_passed
from ..preflight.hosts import compile_on_hosts
from ..preflight.runner import check_target
from ..remote.rank_command import RankCommand, hand_over_secrets, make_rank_command, runner_environment
from ..remote.target import THIS_MACHINE, LaunchTarget
from ..runs.folder import LOG, new_run_folder, next_run_folder, set_first_weights
from ..runs.lock import require_unlocked
from ..runs.memory_kills import count_memory_kills
from ..runs.mode import CHECK_SWAP, RunMode
from ..runs.rank_watch import RankWatch, hang_limits
from ..runs.status import clear_statuses
from ..runs.verdict import raise_unless_finished
from ..system.compiled_ops import OnMessage, needed_ops, prepare_ops
from ..system.environment import free_port, launch_environment, version_warnings
from ..system.filesystem import remove_shared_buffers
from ..system.nvme_swap import remove_stale
from .command import launch_command
from .local_processes import OnMetrics, run_ranks
from .pdsh import run_remote_ranks, signals_of_hosts


def _ignore_metrics(_: Mapping[str, Any]) -> None:
    """Default of `on_metrics`: do nothing."""


def _ignore_message(_: str) -> None:
    """Default of `on_message` and `on_warning`: do nothing."""


@dataclass(frozen=True)
class LaunchResult:
    """A finished launch, or the launch that a dry run would have started."""

    run: Path
    """The run folder; after a dry run it need not exist."""
    command: tuple[str, ...]
    """The command that starts the ranks."""
    environment: dict[str, str]
    """Variables added to this process's own environment; none over ssh."""
    rank_command: RankCommand | None = None
    """Over ssh, the command that every rank runs; its payload is the last argument of `command`."""

    def shell_line(self) -> str:
        """Return the command as one line for a shell, with the variables that this process does not have."""
        command = shlex.join(self.command)
        if self.rank_command is not None:
            return f"cd / && {command}"
        changed = [f"{name}={shlex.quote(x)}" for name, x in self.environment.items() if os.environ.get(name) != x]
        return " ".join([*changed, command])


def launch(
    plan_folder: Path | str,
    *,
    run: Path | str | None = None,
    target: LaunchTarget = THIS_MACHINE,
    mode: RunMode = RunMode.TRAIN,
    resume: bool = False,
    weights: Path | str | None = None,
    force: bool = False,
    verify: bool = True,
    hang_minutes: float | None = None,
    check_swap: bool = False,
    dry_run: bool = False,
    on_metrics: OnMetrics = _ignore_metrics,
    on_message: OnMessage = _ignore_message,
    on_warning: OnMessage = _ignore_message,
) -> LaunchResult:
    """Run a plan and wait until all its ranks have ended.

    A signal that ends this process makes the ranks save a checkpoint first.

    Args:
        plan_folder: folder that `translution plan` wrote.
        run: run folder to create, or to resume; None is the plan folder's next ``runs/NNN``, or with `resume` its
            newest run that has a checkpoint.
        target: the machines that run the ranks.
        mode: what the ranks do, unless a run is resumed.
        resume: resume the run from its newest checkpoint.
        weights: network file from which a new run starts, visible to every node; None draws weights at random.
        force: start even if preflight finds a problem.
        verify: compare the checksums of the checkpoint that is resumed before any rank starts.
        hang_minutes: minutes after which a rank that stands still in a step ends the run, as `hang_limits` says; None
            is a multiple of the predicted time, 0 never.
        check_swap: compare what the ranks read from NVMe with what they wrote; a file that has changed ends the run.
        dry_run: only find out what would be started.
        on_metrics: called with each line of the metrics file.
        on_message: called with a line of text before each slow step, and for each check that failed.
        on_warning: called with a sentence for each package whose installed version differs from the plan's.

    Returns:
        The run folder and the command.

    Raises:
        InputError: if there is no plan, the hostfile does not match it, a machine cannot run it, the run folder
            exists, or the run cannot be resumed with this plan.
        MissingPackageError: if a package or program that the run needs is not installed.
        RunFailedError: if a rank did not finish, or a signal ended the launch.
        InterruptedRunError: if the user interrupted the launch.
    """
    plan_folder, run = Path(plan_folder), None if run is None else Path(run)
    plan = load_plan(plan_folder)
    plan.require_deepspeed()
    hosts = target.hosts(plan)
    if hosts and target.no_ssh and run is None:
        raise InputError("run: is required with --no-ssh: --run FOLDER, the same on every node")
    if check_swap and not plan.zero.uses_nvme:
        raise InputError("check-swap: is not allowed: the plan puts nothing on NVMe")
    first = _checked_weights(weights, plan, resume=resume)
    hang_limits(plan, hang_minutes)
    if dry_run:
        mode = RunMode.CONTINUE if resume else mode
        return _dry_run(plan, plan_folder, run, target, mode, check_swap=check_swap)
    for text in version_warnings(plan):
        on_warning(text)
    saved_bytes = find_resumable(plan, plan_folder, run)[1].manifest.total_bytes if resume else 0
    checks, port = check_target(plan, plan_folder, target, saved_bytes=saved_bytes)
    for check in require_passed(checks, plan_folder, force=force):
        on_message(f"{check.name}: {check.text}")
    if resume:
        run = _prepare_resume(plan, plan_folder, run, on_message, verify=verify)
        mode = RunMode.CONTINUE
    else:
        run = new_run_folder(plan_folder, run, shared=target.no_ssh)
        set_first_weights(run, first)
    ops = needed_ops(plan)
    if ops:
        if target.over_ssh:
            compile_on_hosts(plan, plan_folder, target, on_message)
        else:
            prepare_ops(ops, launch_environment(plan.cluster), run / LOG, on_message)
    places = f" on {', '.join(hosts)}" if target.over_ssh else ""
    on_message(f"starting {plan.cluster.world_size} ranks{places}; they log to {run / LOG}")
    return start_ranks(
        plan,
        plan_folder,
        run,
        on_metrics=on_metrics,
        on_message=on_message,
        mode=mode,
        target=target,
        port=port,
        hang_minutes=hang_minutes,
        check_swap=check_swap,
    )


def _prepare_resume(plan: Plan, plan_folder: Path, run: Path | None, on_message: OnMessage, *, verify: bool) -> Path:
    """Verify the checkpoint that is resumed, before anything in its run changes; return the run."""
    # Imports torch, which a launch that resumes nothing does not need.
    from ..checkpoint.unpickle import require_harmless

    run, saved = find_resumable(plan, plan_folder, run)
    require_unlocked(run)
    if verify and saved.manifest.checksums:
        on_message(f"verifying {format_bytes(saved.manifest.total_bytes)} of {saved.path}")
        verify_checkpoint(saved)
    require_harmless(saved.path)
    prepare_resume(plan, plan_folder, run, saved)
    note_verified(run, saved)
    on_message(f"resuming {run} from step {saved.manifest.step}")
    if text := describe_resharding(plan, saved):
        on_message(text)
    return run


def _checked_weights(weights: Path | str | None, plan: Plan, *, resume: bool) -> Path | None:
    """Return the network file from which a run starts, after checking that the plan can."""
    if weights is None:
        return None
    if resume:
        raise InputError("from: is not allowed with --resume, which continues from a checkpoint")
    # torch is imported only to read a network file.
    from ..checkpoint.weights import check_first_weights

    check_first_weights(Path(weights), plan)
    return Path(weights)


def _dry_run(
    plan: Plan, plan_folder: Path, run: Path | None, target: LaunchTarget, mode: RunMode, *, check_swap: bool
) -> LaunchResult:
    if mode is RunMode.CONTINUE:
        run, _ = find_resumable(plan, plan_folder, run)
    run, port = run or next_run_folder(plan_folder), target.master_port or PORT
    return _prepare(plan, plan_folder, run, target, port, mode, check_swap=check_swap)


def _prepare(
    plan: Plan, plan_folder: Path, run: Path, target: LaunchTarget, port: int, mode: RunMode, *, check_swap: bool
) -> LaunchResult:
    """Return the command and environment that start the ranks of a run."""
    command = tuple(launch_command(plan, plan_folder, run, target, port, mode, check_swap=check_swap))
    if target.over_ssh:
        rank_command = make_rank_command(plan_folder, run, plan.cluster, mode, follows=True, check_swap=check_swap)
        return LaunchResult(run, command, {}, rank_command)
    environment = launch_environment(plan.cluster) | ({CHECK_SWAP: "1"} if check_swap else {})
    return LaunchResult(run, command, environment)


def start_ranks(
    plan: Plan,
    plan_folder: Path,
    run: Path,
    *,
    on_metrics: OnMetrics = _ignore_metrics,
    on_message: OnMessage = _ignore_message,
    mode: RunMode = RunMode.TRAIN,
    target: LaunchTarget = THIS_MACHINE,
    port: int | None = None,
    hang_minutes: float | None = None,
    check_swap: bool = False,
) -> LaunchResult:
    """Start the ranks of a run whose folder exists, and wait until they have ended.

    Args:
        plan: the plan.
        plan_folder: folder that the ranks read the plan from.
        run: run folder that the ranks write to.
        on_metrics: called with each line of the metrics file.
        on_message: called with what a run waits for that is stopped or hangs.
        mode: what the ranks do.
        target: the machines that run the ranks.
        port: port at which the ranks meet; None is a free one of this machine.
        hang_minutes: as `launch` has it.
        check_swap: compare what the ranks read from NVMe with what they wrote.

    Raises:
        RunFailedError: if a rank did not finish, or a signal ended the launch.
        InterruptedRunError: if the user interrupted the launch.
    """
    port = port or free_port()
    launched = _prepare(plan, plan_folder, run, target, port, mode, check_swap=check_swap)
    per_node = plan.cluster.ranks_per_node
    ranks = range(plan.cluster.world_size)
    if target.no_ssh:
        first = (target.node_rank or 0) * per_node
        ranks = range(first, first + per_node)
    clear_statuses(run, ranks, plan.cluster.world_size)
    watch = RankWatch(run, ranks, plan.cluster.world_size, hang_limits(plan, hang_minutes))
    offset = (run / LOG).stat().st_size if (run / LOG).exists() else 0
    memory_kills = count_memory_kills()
    if target.over_ssh:
        with hand_over_secrets(run, plan.cluster):
            exit_code = run_remote_ranks(
                launched.command,
                runner_environment(),
                run,
                on_metrics,
                watch=watch,
                on_message=on_message,
                signal_rank=signals_of_hosts(target.hosts(plan), per_node, target.ssh_port),
            )
    else:
        try:
            exit_code = run_ranks(
                launched.command, launched.environment, run, on_metrics, watch=watch, on_message=on_message
            )
        finally:
            remove_shared_buffers(port)
            # A killed rank leaves its files.
            for path in {plan.zero.offload_optimizer.nvme_path, plan.zero.offload_param.nvme_path} - {None}:
                remove_stale(str(path))
    raise_unless_finished(run, ranks, exit_code, deaths=watch.deaths, log_offset=offset, memory_kills=memory_kills)
    return launched
