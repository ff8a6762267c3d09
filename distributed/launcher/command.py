"""The command that starts the ranks of a run."""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path

from translution.planner.plans import PORT, Plan

from ..remote.hostfile import read_hostfile
from ..remote.rank_command import make_rank_command
from ..remote.target import THIS_MACHINE, LaunchTarget
from ..runs.mode import RunMode


def launch_command(
    plan: Plan,
    plan_folder: Path,
    run: Path,
    target: LaunchTarget = THIS_MACHINE,
    port: int = PORT,
    mode: RunMode = RunMode.TRAIN,
    *,
    check_swap: bool = False,
) -> list[str]:
    """Return the command that starts all ranks, or one node's: DeepSpeed's launcher with this toolkit's ``train``.

    On hosts the command is DeepSpeed's runner. On this machine it is what the runner would start: the runner itself
    takes seconds longer and ignores CUDA_VISIBLE_DEVICES.

    Args:
        plan: the plan; it gives the number of ranks.
        plan_folder: folder that the ranks read the plan from.
        run: run folder that the ranks write to.
        target: the machines.
        port: port at which the ranks meet.
        mode: what the ranks do.
        check_swap: compare what is read from NVMe with what was written; on one machine the environment tells it.
    """
    ranks = ["train", str(plan_folder.resolve()), str(run.resolve())]
    ranks += ["--mode", mode] if mode is not RunMode.TRAIN else []
    if target.hostfile is None:
        world = json.dumps({"localhost": _devices(plan)}).encode()
        runner = [sys.executable, "-m", "deepspeed.launcher.launch", "--master_addr", "127.0.0.1"]
        runner += [f"--world_info={base64.urlsafe_b64encode(world).decode()}"]
    else:
        runner = [sys.executable, "-m", "deepspeed.launcher.runner"]
        address = target.master_addr or read_hostfile(target.hostfile, plan.cluster)[0].rpartition("@")[2]
        runner += ["--hostfile", str(target.hostfile.resolve()), "--master_addr", address]
        if target.no_ssh:
            runner += ["--no_ssh", "--node_rank", str(target.node_rank or 0)]
        else:
            runner += ["--launcher", "pdsh", "--force_multi", "--no_ssh_check"]
            runner += [] if target.ssh_port is None else ["--ssh_port", str(target.ssh_port)]
            command = make_rank_command(plan_folder, run, plan.cluster, mode, follows=True, check_swap=check_swap)
            ranks = ["rank", command.to_payload()]
    return [*runner, "--master_port", str(port), "--no_local_rank", "--module", "translution.cli", *ranks]


def _devices(plan: Plan) -> list[int | str]:
    """Return the GPUs of this machine that the ranks use: the visible ones, or else the first ones."""
    count = plan.cluster.ranks_per_node
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if plan.cluster.device == "cuda" else ""
    chosen = [name.strip() for name in visible.split(",") if name.strip()][:count]
    return list(chosen) if len(chosen) == count else list(range(count))
