"""Whether a machine can run a plan's ranks, and what they need in their environment."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from translution.planner.common.errors import InputError, MissingPackageError
from translution.planner.common.machine import usable_cores
from translution.planner.hardware.cluster import ClusterSpec
from translution.planner.plans.plan import Plan

from .compiled_ops import needed_ops
from .packages import check_training_packages


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def own_path() -> str:
    """PATH with this Python's programs first, as in an environment that is activated.

    Its ninja compiles DeepSpeed's ops. Another one would compile them anew, and the next run with this one too:
    versions do not know each other's commands.
    """
    own, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    return path if path.split(os.pathsep)[0] == own else os.pathsep.join([own, path])


def launch_environment(cluster: ClusterSpec) -> dict[str, str]:
    """What the ranks need in their environment, beside this process's own."""
    path = own_path()
    if cluster.device == "cuda":
        return {"PATH": path}
    threads = max(1, usable_cores() // cluster.ranks_per_node)
    variables = {
        "PATH": path,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    if cluster.nodes == 1:
        # Ranks of one machine talk over the loopback, whatever its name resolves to.
        variables["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return variables


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
    """Whether this machine can run the ranks of one node of the plan.

    Raises:
        InputError: if one of its nodes needs more cores or GPUs.
        MissingPackageError: if DeepSpeed, the C++ compiler for its communication op or what the plan's training
            needs is absent.
    """
    cluster = plan.cluster
    check_packages(needed_ops(plan))
    check_training_packages(plan.training)
    if cluster.device == "cpu":
        cores = usable_cores()
        if cluster.ranks_per_node > cores:
            raise InputError(f"ranks: {cluster.ranks_per_node} is not allowed: this machine has {cores} cores")
        return
    import torch

    if torch.cuda.device_count() < cluster.ranks_per_node:
        raise InputError(
            f"ranks_per_node: {cluster.ranks_per_node} is not allowed: found {torch.cuda.device_count()} GPUs"
        )
