"""Reports of the nodes of a run before ranks start, and their comparison."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from translution.planner.common import InputError, Line, Schema, parse_json, write_text
from translution.planner.plans import PLAN_FILE, Plan, load_plan

from ..system.compiled_ops import OnMessage, needed_ops, prepare_ops
from ..system.environment import check_machine, check_packages, launch_environment
from .checks import Check, check_node

_PACKAGES = ("translution-scale", "torch", "deepspeed", "numpy")
_CONNECT_SECONDS = 5.0


class NodeReport(Schema):
    """Checks and versions of one node."""

    host: Line
    """Name of the node."""
    checks: tuple[Check, ...]
    """Results of its checks."""
    versions: dict[Line, Line]
    """Versions that must be equal on all nodes, by package."""
    plan_digest: Line
    """SHA-256 of its plan.json, which must be equal on all nodes."""
    port: int | None = None
    """Port on which it listens while the other nodes try to reach it; None if it does not listen."""


_REPORT: TypeAdapter[NodeReport] = TypeAdapter(NodeReport)


def read_report(text: str, what: str) -> NodeReport:
    """Parse the report in the last line of a node's output.

    Args:
        text: the output.
        what: name of the output for messages.

    Raises:
        InputError: if the line is not a report.
    """
    lines = text.strip().splitlines() or [""]
    return parse_json(_REPORT, lines[-1].encode(), what)


def node_name() -> str:
    """Return this node's name: Slurm's, or else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def node_versions(plan: Plan) -> dict[str, str]:
    """Return what must be equal on all nodes: versions of Python, the packages, CUDA and NCCL, and the GPU's name."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if plan.cluster.device == "cuda":
        import torch

        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
        found["GPU"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return found


def _reach(address: str) -> Check:
    host, _, port = address.rpartition(":")
    name = f"port {port} of {host}"
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        text = f"cannot be reached ({error.strerror or error}): open the port, or give another address (--master-addr)"
        return Check(name=name, passed=False, text=text)
    return Check(name=name, passed=True, text="can be reached")


def _listen(port: int) -> tuple[Check, socket.socket | None]:
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        text = f"cannot be opened ({error.strerror}): choose another (--master-port)"
        return Check(name=f"port {port}", passed=False, text=text), None
    return Check(name=f"port {server.getsockname()[1]}", passed=True, text="is free"), server


def report_node(
    plan_folder: Path, *, listen: int | None = None, reach: str | None = None, out: Path | None = None
) -> None:
    """Check this node, and print its report as one line of JSON or write it to a folder.

    Args:
        plan_folder: folder with plan.json.
        listen: port to listen on until standard input ends, for the other nodes to reach; 0 is any free one.
        reach: HOST:PORT of the node that listens.
        out: folder to write the report to, in a file named after the node; None prints it.

    Raises:
        InputError: if there is no plan, or this machine has too few cores or GPUs.
        MissingPackageError: if a package that the run needs is not installed.
    """
    plan = load_plan(plan_folder)
    plan.require_deepspeed()
    check_machine(plan)
    checks, server = [], None
    if reach is not None:
        checks.append(_reach(reach))
    if listen is not None:
        check, server = _listen(listen)
        checks.append(check)
    checks += check_node(plan, plan_folder)
    port = server.getsockname()[1] if server else None
    report = NodeReport(
        host=node_name(),
        checks=tuple(checks),
        versions=node_versions(plan),
        plan_digest=hashlib.sha256((plan_folder / PLAN_FILE).read_bytes()).hexdigest(),
        port=port,
    )
    text = report.model_dump_json()
    if out is not None:
        write_text(out / f"{report.host}.json", text + "\n")
        return
    print(text, flush=True)
    if server is not None:
        with server:
            sys.stdin.read()


def compare_nodes(hosts: Sequence[str], reports: Sequence[NodeReport]) -> list[Check]:
    """Return the checks of all nodes, named by host, with checks that versions and plan match the first node's.

    Args:
        hosts: names of the nodes for messages, in their order.
        reports: the report of each node.
    """
    checks = []
    for host, report in zip(hosts, reports, strict=True):
        checks += [check.model_copy(update={"name": f"{host}: {check.name}"}) for check in report.checks]
        for package, version in reports[0].versions.items():
            found = report.versions.get(package, "nothing")
            if found != version:
                text = f"{found} is not allowed: must be {version}, as on {hosts[0]}: install the same there"
                checks.append(Check(name=f"{host}: {package}", passed=False, text=text))
        if report.plan_digest != reports[0].plan_digest:
            text = f"differs from the plan on {hosts[0]}: plan into a folder that all nodes share"
            checks.append(Check(name=f"{host}: {PLAN_FILE}", passed=False, text=text))
    same = all(report.versions == reports[0].versions for report in reports)
    if same:
        text = ", ".join(f"{package} {version}" for package, version in reports[0].versions.items())
        checks.append(Check(name=f"versions on {len(hosts)} nodes", passed=True, text=text))
    return checks


def compare_reports(folder: Path, nodes: int) -> list[Check]:
    """Compare the reports that nodes have written to a folder, as `compare_nodes` does.

    Args:
        folder: folder with one file per node.
        nodes: number of nodes in the plan.

    Raises:
        InputError: if the number of reports differs from `nodes`, or a file is not a report.
    """
    paths = sorted(folder.glob("*.json"))
    if len(paths) != nodes:
        raise InputError(f"reports: {folder}: {len(paths)} are not allowed: must be {nodes}, one of each node")
    reports = [read_report(path.read_text(encoding="utf-8"), str(path)) for path in paths]
    return compare_nodes([report.host for report in reports], reports)


def compile_on_node(plan_folder: Path, on_message: OnMessage) -> None:
    """Compile the DeepSpeed ops of a plan on this node.

    Args:
        plan_folder: folder with plan.json.
        on_message: called with a line of text before and after each op is compiled, and while it takes long.

    Raises:
        MissingPackageError: if DeepSpeed or a compiler is not installed.
        RunFailedError: if an op does not compile.
    """
    plan = load_plan(plan_folder)
    plan.require_deepspeed()
    ops = needed_ops(plan)
    check_packages(ops)
    log = Path(tempfile.gettempdir()) / f"translution-ops-{os.getuid()}.log"
    prepare_ops(ops, launch_environment(plan.cluster), log, on_message)
