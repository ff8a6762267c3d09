"""Starting the ranks of a plan on this machine through DeepSpeed's launcher, and judging the run."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from translution.planner.cluster import ClusterSpec, usable_cores
from translution.planner.errors import InputError, MissingPackageError
from translution.planner.plan import Plan, load_plan

from .host import remove_shared_buffers
from .ops import needed_ops, prepare_ops
from .preflight import preflight
from .processes import OnMetrics, run_ranks
from .resume import reshard_text, run_to_resume
from .run_files import CONTINUE, LOG, RUNS, clear_statuses, judge, make_run_folders

OnStage = Callable[[str], None]


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def launch_command(plan: Plan, plan_folder: Path, run: Path, port: int, *options: str) -> list[str]:
    """The command that starts all ranks: DeepSpeed's launcher with this toolkit's ``train``.

    For several nodes it is what each node runs, with HOSTFILE, NODE_RANK and FIRST_HOST to fill in.

    Args:
        plan: gives the number of ranks.
        plan_folder: what the ranks read.
        run: what they write to.
        port: of the rendezvous on the loopback.
        options: of this toolkit's ``train``.
    """
    if plan.cluster.nodes == 1:
        place = ["--num_gpus", str(plan.cluster.ranks_per_node), "--master_addr", "127.0.0.1"]
    else:
        place = ["--hostfile", "HOSTFILE", "--no_ssh", "--node_rank", "NODE_RANK", "--master_addr", "FIRST_HOST"]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", *place, "--master_port", str(port)]
    ranks = ["--no_local_rank", "--module", "translution.cli", "train", str(plan_folder.resolve()), str(run.resolve())]
    ranks += options
    return [*runner, *ranks]


def launch_environment(cluster: ClusterSpec) -> dict[str, str]:
    """What the ranks need in their environment, beside this process's own."""
    # An environment that is not activated still has its own ninja, which compiles DeepSpeed's ops. Another ninja
    # would compile them anew, and the next run with this one too: versions do not know each other's commands.
    own, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    path = path if path.split(os.pathsep)[0] == own else os.pathsep.join([own, path])
    if cluster.device == "cuda":
        return {"PATH": path}
    threads = max(1, usable_cores() // cluster.ranks_per_node)
    return {
        "PATH": path,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        # Ranks of one machine talk over the loopback, whatever its name resolves to.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }


def next_run_folder(plan_folder: Path) -> Path:
    """The first ``runs/NNN`` of a plan folder that does not exist."""
    number = 1
    while (plan_folder / RUNS / f"{number:03d}").exists():
        number += 1
    return plan_folder / RUNS / f"{number:03d}"


def new_run_folder(plan_folder: Path, run: Path | None) -> Path:
    """Make the run folder: the one named, or the next free ``runs/NNN`` of the plan folder.

    Raises:
        InputError: if the named one exists.
    """
    try:
        while True:
            folder = run or next_run_folder(plan_folder)
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                if run is not None:
                    raise InputError(f"{run}: exists already: choose another run folder") from None
        make_run_folders(folder, plan_folder)
    except OSError as error:
        raise InputError(f"{run or plan_folder}: cannot be written: {error.strerror}") from None
    return folder


def check_packages(ops: Sequence[str]) -> None:
    """Whether torch and DeepSpeed are installed, and a C++ compiler if there are ops to compile.

    Raises:
        MissingPackageError: naming the one that is absent.
    """
    import importlib.util

    for package in ("torch", "deepspeed"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(f"{package} is missing: pip install 'translution-scale[train]'")
    if ops and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise MissingPackageError("g++ is missing, DeepSpeed compiles with it: sudo apt-get install g++")


def version_warnings(plan: Plan) -> list[str]:
    """A sentence for each package whose version is not the one that the plan was made for."""
    import importlib.metadata

    texts = []
    for package, made_for in (("deepspeed", plan.deepspeed_version), ("torch", plan.torch_version)):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not f"{found}.".startswith(f"{made_for}."):
            texts.append(f"{package} {found} is installed; the plan was made for {made_for}")
    return texts


def check_machine(plan: Plan) -> None:
    """Whether this machine can run the plan's ranks.

    Raises:
        InputError: if the plan needs other nodes, more cores or GPUs.
        MissingPackageError: if DeepSpeed or the C++ compiler for its communication op is absent.
    """
    cluster = plan.cluster
    if cluster.nodes > 1:
        raise InputError(
            f"nodes: {cluster.nodes} is not allowed: launch starts the ranks of one machine; "
            "run the command that launch --dry-run prints on each node"
        )
    check_packages(needed_ops(plan))
    if cluster.device == "cpu":
        cores = usable_cores()
        if cluster.ranks > cores:
            raise InputError(f"ranks: {cluster.ranks} is not allowed: this machine has {cores} cores")
        return
    import torch

    if torch.cuda.device_count() < cluster.ranks_per_node:
        raise InputError(
            f"ranks_per_node: {cluster.ranks_per_node} is not allowed: found {torch.cuda.device_count()} GPUs"
        )


def launch(
    plan_folder: Path,
    run: Path | None,
    on_metrics: OnMetrics,
    on_stage: OnStage,
    *options: str,
    resume: bool = False,
    force: bool = False,
) -> Path:
    """Run a plan on this machine.

    Args:
        plan_folder: as `translution plan` writes it.
        run: the run folder to make; None takes the plan folder's next ``runs/NNN``.
        on_metrics: called with each metrics line.
        on_stage: called with a line for people when something slow begins.
        options: of this toolkit's ``train``.
        resume: go on with that run, or with the plan folder's newest that has a checkpoint.
        force: start although memory or a drive seems to lack room.

    Returns:
        The run folder.

    Raises:
        InputError: if this machine cannot run the plan, or the run cannot be resumed with it.
        RunFailedError: if any rank did not finish.
    """
    plan = load_plan(plan_folder)
    check_machine(plan)
    failed = [check for check in preflight(plan, plan_folder) if not check.passed]
    if failed and not force:
        more = f" (and {len(failed) - 1} more: translution preflight {plan_folder})" if len(failed) > 1 else ""
        raise InputError(f"{failed[0].name}: {failed[0].text}{more}; --force starts all the same")
    for check in failed:
        on_stage(f"{check.name}: {check.text}")
    if resume:
        run, saved = run_to_resume(plan, plan_folder, run)
        on_stage(f"going on with {run} from step {saved.manifest.step}")
        if text := reshard_text(plan, saved):
            on_stage(text)
        options = (*options, "--mode", CONTINUE)
    else:
        run = new_run_folder(plan_folder, run)
    ops = needed_ops(plan)
    if ops:
        on_stage(f"preparing {len(ops)} of DeepSpeed's ops, which the first run compiles in a minute or more each")
        prepare_ops(ops, launch_environment(plan.cluster), run / LOG)
    on_stage(f"starting {plan.cluster.ranks} ranks; they log to {run / LOG}")
    start_and_judge(plan, plan_folder, run, on_metrics, *options)
    return run


def start_and_judge(plan: Plan, plan_folder: Path, run: Path, on_metrics: OnMetrics, *options: str) -> None:
    """Start the ranks of a run whose folder exists, and wait for their end.

    Raises:
        RunFailedError: if any rank did not finish.
    """
    port = free_port()
    command = launch_command(plan, plan_folder, run, port, *options)
    clear_statuses(run)
    try:
        exit_code = run_ranks(command, launch_environment(plan.cluster), run, on_metrics)
    finally:
        remove_shared_buffers(port)
    judge(run, plan.cluster.ranks, exit_code)
