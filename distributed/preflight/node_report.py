"""What every node of a run says of itself before ranks start, and whether all say the same."""

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

from translution.planner.common.errors import InputError
from translution.planner.common.files import write_text
from translution.planner.common.schema import Schema, parse_json
from translution.planner.plans.plan import PLAN_FILE, Plan, load_plan

from ..system.compiled_ops import needed_ops, prepare_ops
from ..system.environment import check_machine, check_packages, launch_environment
from .checks import Check, preflight

_PACKAGES = ("translution-scale", "torch", "deepspeed", "numpy")
_CONNECT_SECONDS = 5.0


class NodeReport(Schema):
    """One node's."""

    host: str
    checks: tuple[Check, ...]
    versions: dict[str, str]
    plan_digest: str
    """Of plan.json: all nodes must see the same."""
    port: int | None = None
    """That it listens on while the others try to reach it."""


_REPORT: TypeAdapter[NodeReport] = TypeAdapter(NodeReport)


def read_report(text: str, what: str) -> NodeReport:
    """A report as a node printed it, the last line of its output.

    Raises:
        InputError: if it is none.
    """
    lines = text.strip().splitlines() or [""]
    return parse_json(_REPORT, lines[-1].encode(), what)


def node_name() -> str:
    """What this node is called: by Slurm, or by itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def versions(plan: Plan) -> dict[str, str]:
    """Versions that must be equal on all nodes: Python's, the packages', CUDA's, NCCL's and the driver's ABI."""
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
        text = f"cannot be reached ({error.strerror or error}): open it, or name another address (--master-addr)"
        return Check(name=name, passed=False, text=text)
    return Check(name=name, passed=True, text="is reached")


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
    """Look at this node and print its report as one line of JSON, or write it to a folder.

    Args:
        plan_folder: holds plan.json.
        listen: a port for the other nodes to reach, 0 for any, until standard input ends.
        reach: HOST:PORT of the node that listens.
        out: the folder, in which the file is named after the node.
    """
    plan = load_plan(plan_folder)
    check_machine(plan)
    checks, server = [], None
    if reach is not None:
        checks.append(_reach(reach))
    if listen is not None:
        check, server = _listen(listen)
        checks.append(check)
    checks += preflight(plan, plan_folder)
    port = server.getsockname()[1] if server else None
    report = NodeReport(
        host=node_name(),
        checks=tuple(checks),
        versions=versions(plan),
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


def judge_nodes(hosts: Sequence[str], reports: Sequence[NodeReport]) -> list[Check]:
    """Every node's checks, named by host, and whether versions are those of the first.

    Args:
        hosts: names for people, in the order of the nodes.
        reports: one for each.
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
            text = f"another plan than on {hosts[0]} lies there: plan into a folder that all nodes share"
            checks.append(Check(name=f"{host}: {PLAN_FILE}", passed=False, text=text))
    same = all(report.versions == reports[0].versions for report in reports)
    if same:
        text = ", ".join(f"{package} {version}" for package, version in reports[0].versions.items())
        checks.append(Check(name=f"versions on {len(hosts)} nodes", passed=True, text=text))
    return checks


def judge_reports(folder: Path, nodes: int) -> list[Check]:
    """As `judge_nodes`, for what nodes have written to a folder.

    Raises:
        InputError: if there are not as many as nodes.
    """
    paths = sorted(folder.glob("*.json"))
    if len(paths) != nodes:
        raise InputError(f"reports: {folder}: {len(paths)} are not allowed: must be {nodes}, one of each node")
    reports = [read_report(path.read_text(encoding="utf-8"), str(path)) for path in paths]
    return judge_nodes([report.host for report in reports], reports)


def compile_on_node(plan_folder: Path) -> None:
    """Compile the ops of a plan on this node.

    Raises:
        MissingPackageError: without DeepSpeed or a compiler.
        RunFailedError: if they do not compile.
    """
    plan = load_plan(plan_folder)
    ops = needed_ops(plan)
    check_packages(ops)
    log = Path(tempfile.gettempdir()) / f"translution-ops-{os.getuid()}.log"
    prepare_ops(ops, launch_environment(plan.cluster), log)
