"""Starting the ranks of a plan through DeepSpeed's launcher, on this machine or on the hosts of a hostfile."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from translution.planner.common.errors import InputError
from translution.planner.plans.launch_scripts import PORT
from translution.planner.plans.plan import Plan, load_plan

from ..checkpoint.resume import reshard_text, run_to_resume
from ..preflight.checks import preflight, refuse
from ..preflight.hosts import look_at_hosts, prepare_hosts
from ..remote.hostfile import read_hostfile
from ..remote.rank_command import rank_command, runner_environment
from ..remote.ssh import Ssh
from ..runs.folder import LOG, RUNS, make_run_folders
from ..runs.mode import RunMode
from ..runs.status import clear_statuses, raise_unless_finished
from ..system.compiled_ops import needed_ops, prepare_ops
from ..system.environment import check_machine, free_port, launch_environment
from ..system.filesystem import remove_shared_buffers
from .local_processes import OnMetrics, run_ranks
from .pdsh import run_remote_ranks

OnStage = Callable[[str], None]


@dataclass(frozen=True)
class Where:
    """The machines of a launch; by default this one."""

    hostfile: Path | None = None
    """One line for each host of the plan, ``HOST slots=RANKS``."""
    no_ssh: bool = False
    """Start only this host's ranks: the same is done by hand on every other host."""
    node_rank: int = 0
    """This host's line in the hostfile, from 0, without ssh."""
    master_addr: str | None = None
    """How all hosts reach the first; None is its name in the hostfile."""
    master_port: int | None = None
    """None takes a free one; without ssh, DeepSpeed's 29500."""
    ssh_port: int | None = None

    def check(self, plan: Plan, run: Path | None) -> list[str]:
        """The hosts of a plan; none for a launch on this machine.

        Raises:
            InputError: if the hostfile does not suit the plan, or something is missing.
        """
        if self.hostfile is None:
            if plan.cluster.nodes > 1:
                raise InputError(
                    f"hostfile: is required for a plan of {plan.cluster.nodes} nodes: --hostfile FILE, "
                    f"one line HOST slots={plan.cluster.ranks_per_node} for each"
                )
            return []
        hosts = read_hostfile(self.hostfile, plan.cluster)
        if self.no_ssh and not 0 <= self.node_rank < len(hosts):
            raise InputError(f"node_rank: {self.node_rank} is not allowed: must be from 0 to {len(hosts) - 1}")
        if self.no_ssh and run is None:
            raise InputError("run: is required with --no-ssh: --run FOLDER, the same on every node")
        return hosts


HERE = Where()


def launch_command(
    plan: Plan, plan_folder: Path, run: Path, where: Where = HERE, port: int = PORT, mode: RunMode = RunMode.TRAIN
) -> list[str]:
    """The command that starts all ranks, or one node's: DeepSpeed's launcher with this toolkit's ``train``.

    On this machine it is what DeepSpeed's runner would start, which takes seconds to do so and ignores
    CUDA_VISIBLE_DEVICES; on hosts it is the runner.

    Args:
        plan: gives the number of ranks.
        plan_folder: what the ranks read.
        run: what they write to.
        where: on which machines.
        port: of the rendezvous.
        mode: what the ranks do.
    """
    ranks = ["train", str(plan_folder.resolve()), str(run.resolve())]
    ranks += ["--mode", mode] if mode is not RunMode.TRAIN else []
    if where.hostfile is None:
        world = json.dumps({"localhost": _devices(plan)}).encode()
        runner = [sys.executable, "-m", "deepspeed.launcher.launch", "--master_addr", "127.0.0.1"]
        runner += [f"--world_info={base64.urlsafe_b64encode(world).decode()}"]
    else:
        runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
        address = where.master_addr or read_hostfile(where.hostfile, plan.cluster)[0].rpartition("@")[2]
        runner += ["--hostfile", str(where.hostfile.resolve()), "--master_addr", address]
        if where.no_ssh:
            runner += ["--no_ssh", "--node_rank", str(where.node_rank)]
        else:
            runner += ["--launcher", "pdsh", "--force_multi", "--no_ssh_check"]
            runner += [] if where.ssh_port is None else ["--ssh_port", str(where.ssh_port)]
            ranks = ["rank", rank_command(plan_folder, run, plan.cluster, mode, follows=True).encode()]
    return [*runner, "--master_port", str(port), "--no_local_rank", "--module", "translution.cli", *ranks]


def _devices(plan: Plan) -> list[int | str]:
    """Which of this machine's GPUs its ranks use: those that are visible, or the first ones."""
    count = plan.cluster.ranks_per_node
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if plan.cluster.device == "cuda" else ""
    chosen = [name.strip() for name in visible.split(",") if name.strip()][:count]
    return list(chosen) if len(chosen) == count else list(range(count))


def next_run_folder(plan_folder: Path) -> Path:
    """The first ``runs/NNN`` of a plan folder that does not exist."""
    number = 1
    while (plan_folder / RUNS / f"{number:03d}").exists():
        number += 1
    return plan_folder / RUNS / f"{number:03d}"


def new_run_folder(plan_folder: Path, run: Path | None, *, shared: bool = False) -> Path:
    """Make the run folder: the one named, or the next free ``runs/NNN`` of the plan folder.

    Args:
        plan_folder: whose plan is copied.
        run: the one named.
        shared: other nodes make the same one, which may be there already.

    Raises:
        InputError: if the named one exists, unless it is shared.
    """
    try:
        while True:
            folder = run or next_run_folder(plan_folder)
            try:
                folder.mkdir(parents=True, exist_ok=shared)
                break
            except FileExistsError:
                if run is not None:
                    raise InputError(f"{run}: exists already: choose another run folder") from None
        make_run_folders(folder, plan_folder)
    except OSError as error:
        raise InputError(f"{run or plan_folder}: cannot be written: {error.strerror}") from None
    return folder


def launch(
    plan_folder: Path,
    run: Path | None,
    on_metrics: OnMetrics,
    on_stage: OnStage,
    *,
    where: Where = HERE,
    mode: RunMode = RunMode.TRAIN,
    resume: bool = False,
    force: bool = False,
) -> Path:
    """Run a plan.

    Args:
        plan_folder: as `translution plan` writes it.
        run: the run folder to make; None takes the plan folder's next ``runs/NNN``.
        on_metrics: called with each metrics line.
        on_stage: called with a line for people when something slow begins.
        where: on which machines.
        mode: what the ranks do.
        resume: go on with that run, or with the plan folder's newest that has a checkpoint.
        force: start although memory or a drive seems to lack room.

    Returns:
        The run folder.

    Raises:
        InputError: if a machine cannot run the plan, or the run cannot be resumed with it.
        RunFailedError: if any rank did not finish.
    """
    plan = load_plan(plan_folder)
    hosts = where.check(plan, run)
    port = where.master_port or (PORT if where.no_ssh else free_port())
    remote = bool(hosts) and not where.no_ssh
    if remote:
        ssh = Ssh(where.ssh_port)
        checks, port = look_at_hosts(plan, plan_folder, hosts, ssh, where.master_addr, where.master_port)
    else:
        check_machine(plan)
        checks = preflight(plan, plan_folder)
    for check in refuse(checks, plan_folder, force=force):
        on_stage(f"{check.name}: {check.text}")
    if resume:
        run, saved = run_to_resume(plan, plan_folder, run)
        on_stage(f"going on with {run} from step {saved.manifest.step}")
        if text := reshard_text(plan, saved):
            on_stage(text)
        mode = RunMode.CONTINUE
    else:
        run = new_run_folder(plan_folder, run, shared=where.no_ssh)
    ops = needed_ops(plan)
    if ops:
        on_stage(f"preparing {len(ops)} of DeepSpeed's ops, which the first run compiles in a minute or more each")
        if remote:
            prepare_hosts(plan, plan_folder, hosts, ssh)
        else:
            prepare_ops(ops, launch_environment(plan.cluster), run / LOG)
    places = f" on {', '.join(hosts)}" if remote else ""
    on_stage(f"starting {plan.cluster.world_size} ranks{places}; they log to {run / LOG}")
    start_and_judge(plan, plan_folder, run, on_metrics, mode=mode, where=where, port=port)
    return run


def start_and_judge(
    plan: Plan,
    plan_folder: Path,
    run: Path,
    on_metrics: OnMetrics,
    *,
    mode: RunMode = RunMode.TRAIN,
    where: Where = HERE,
    port: int | None = None,
) -> None:
    """Start the ranks of a run whose folder exists, and wait for their end.

    Raises:
        RunFailedError: if any rank did not finish.
    """
    port = port or free_port()
    command = launch_command(plan, plan_folder, run, where, port, mode)
    per_node = plan.cluster.ranks_per_node
    own = range(where.node_rank * per_node, (where.node_rank + 1) * per_node)
    ranks = own if where.no_ssh else range(plan.cluster.world_size)
    clear_statuses(run, ranks)
    if where.hostfile is not None and not where.no_ssh:
        exit_code = run_remote_ranks(command, runner_environment(), run, on_metrics)
    else:
        try:
            exit_code = run_ranks(command, launch_environment(plan.cluster), run, on_metrics)
        finally:
            remove_shared_buffers(port)
    raise_unless_finished(run, ranks, exit_code)
