"""Check whether this machine can run a plan's ranks, and build their environment."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from translution.planner.common import InputError, MissingPackageError, usable_cores
from translution.planner.hardware import ClusterSpec
from translution.planner.plans import HUGE_PAGES, TESTED_TORCH, Plan

from .compiled_ops import needed_ops
from .packages import check_training_packages

_PORTS = range(20_000, 32_768)
"""Ports below those that Linux gives to connections: a connection would take one of those before it is used."""


def free_port() -> int:
    """Return a free TCP port on the loopback interface, outside the ports that connections get.

    Raises:
        InputError: if all ports are in use.
    """
    for port in random.Random(os.urandom(8)).sample(_PORTS, len(_PORTS)):
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port
    raise InputError(f"no port from {_PORTS[0]} to {_PORTS[-1]} is free")


def own_path() -> str:
    """Return PATH with this Python's programs first, as in an activated environment.

    DeepSpeed's ops are compiled with this Python's ninja: different versions of ninja recompile each other's output.
    """
    own, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    return path if path.split(os.pathsep)[0] == own else os.pathsep.join([own, path])


def launch_environment(cluster: ClusterSpec) -> dict[str, str]:
    """Return the environment variables that the ranks need in addition to this process's own."""
    variables = {"PATH": own_path()} | {name: os.environ.get(name, value) for name, value in HUGE_PAGES.items()}
    if cluster.device == "cuda":
        return variables
    threads = max(1, usable_cores() // cluster.ranks_per_node)
    variables |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    if cluster.nodes == 1:
        # Ranks of one machine use the loopback, whatever the host name resolves to.
        variables["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return variables


def check_packages(ops: Sequence[str]) -> None:
    """Check that torch and DeepSpeed are installed, and a C++ compiler if there are ops to compile.

    Raises:
        MissingPackageError: names the missing one.
    """
    import importlib.util

    for package in ("torch", "deepspeed"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(f"{package} is missing: pip install 'translution-scale[train]'")
    if ops and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise MissingPackageError("g++ is missing, DeepSpeed compiles with it: sudo apt-get install g++")


def version_warnings(plan: Plan) -> list[str]:
    """Return a sentence for each package that is not of the plan's version, nor one of torch that was tested."""
    import importlib.metadata

    def is_tested(torch_version: str) -> bool:
        oldest, newest = TESTED_TORCH
        return oldest <= tuple(map(int, re.findall(r"\d+", torch_version)[:2])) <= newest

    texts = []
    for package, made_for in (("deepspeed", plan.deepspeed_version), ("torch", plan.torch_version)):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if package == "torch" and is_tested(found) and is_tested(made_for):
            continue
        if not f"{found}.".startswith(f"{made_for}."):
            texts.append(f"{package} {found} is installed; the plan was made for {made_for}")
    return texts


def check_machine(plan: Plan) -> None:
    """Check that this machine can run the ranks of one node of the plan.

    Raises:
        InputError: if a node of the plan needs more cores or GPUs than this machine has.
        MissingPackageError: if DeepSpeed, the C++ compiler for its ops, or a package that the plan's training settings
            need is not installed.
    """
    cluster = plan.cluster
    check_packages(needed_ops(plan))
    check_training_packages(plan.training)
    if cluster.device == "cpu":
        cores = usable_cores()
        if cluster.ranks_per_node > cores:
            raise InputError(f"ranks: {cluster.ranks_per_node} is not allowed: this machine has {cores} cores")
        return
    check_gpus(cluster.ranks_per_node)


def check_gpus(count: int) -> None:
    """Check that this machine has a number of GPUs.

    Raises:
        InputError: if it has fewer.
    """
    import torch

    found = torch.cuda.device_count()
    if found < count:
        raise InputError(f"cluster: {count} GPUs are not allowed: this machine has {found}")
