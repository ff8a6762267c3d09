"""Calibrates this machine: starts ranks that measure its rates, and makes a cluster file of the medians."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from translution.planner.common import (
    SPEC_SUFFIXES,
    InputError,
    RunFailedError,
    check_new_file,
    make_provenance,
    parse_json,
    write_text,
)
from translution.planner.hardware import ClusterSpec, MeasuredRates, load_cluster

from ..launcher.local_processes import run_processes
from ..runs.watchdog import end_with_launcher
from ..system.compiled_ops import NVME_OPS, prepare_ops
from ..system.environment import check_gpus, check_packages, free_port, launch_environment
from ..system.network import leave_process_group

_RATES: TypeAdapter[MeasuredRates] = TypeAdapter(MeasuredRates)
_LOG, _PROGRESS = "calibrate.log", "progress"
_PARTS = 6
"""Number of measurements, each reported with one line; one more with NVMe, one more on a GPU."""

OnLine = Callable[[str], None]


def calibrate_to_file(
    cluster_name: str,
    out: Path,
    nvme_path: str | None,
    command: str,
    on_progress: Callable[[str, int, int], None],
    *,
    force: bool = False,
) -> MeasuredRates:
    """Measure the rates of this machine and write them as a cluster file.

    Args:
        cluster_name: cpu:RANKS, or GPUSxNAME of this machine; the base of the cluster file.
        out: YAML file to write.
        nvme_path: folder on the NVMe drive to measure; None leaves it out.
        command: the command line, recorded in the file.
        on_progress: called when the ranks start and at every measurement: its description, its number, and the total.
        force: replace a file that exists.

    Raises:
        InputError: if the cluster or the file is not allowed.
    """
    if out.suffix not in SPEC_SUFFIXES[:2]:
        raise InputError(f"out: {str(out)!r} is not allowed: must end in .yaml")
    check_new_file(out, "out", force=force)
    if Path(cluster_name).suffix in SPEC_SUFFIXES:
        raise InputError(f"cluster: {cluster_name!r} is not allowed: must be cpu:RANKS or GPUSxNAME")
    cluster = load_cluster(cluster_name)
    total = _PARTS + (nvme_path is not None) + (cluster.device == "cuda")
    numbers = itertools.count(1)
    _check_gpus_of(cluster)
    on_progress("starting", 0, total)
    rates = calibrate(cluster, nvme_path, command, lambda line: on_progress(line, next(numbers), total))
    write_text(out, machine_file(cluster_name, rates, nvme_path))
    return rates


def calibrate(
    cluster: ClusterSpec, nvme_path: str | None, command: str, on_line: OnLine, *, quick: bool = False
) -> MeasuredRates:
    """Measure the rates of this machine with one process per rank of the cluster.

    Args:
        cluster: this machine, as a cluster of one node.
        nvme_path: folder on the NVMe drive to measure; None leaves it out.
        command: the command line, recorded in the result.
        on_line: called with a line of text as each measurement begins.
        quick: measure few and small sizes, to rehearse the command; the rates mean little.

    Returns:
        Medians of the ranks' measurements.

    Raises:
        InputError: if the cluster has more than one node or more GPUs than this machine, or the NVMe folder cannot be
            written.
        RunFailedError: if a rank failed.
    """
    if cluster.nodes > 1:
        raise InputError(f"nodes: {cluster.nodes} is not allowed: calibrate measures one machine")
    if nvme_path is not None and not os.access(nvme_path, os.W_OK):
        raise InputError(f"nvme_path: {nvme_path!r} is not allowed: must be a folder that can be written")
    ops = ["ShareMemCommBuilder"] if cluster.device == "cpu" else []
    ops += ["CPUAdamBuilder", *(NVME_OPS if nvme_path else ())]
    check_packages(ops)
    _check_gpus_of(cluster)
    with tempfile.TemporaryDirectory(prefix="translution-calibrate-") as folder:
        log = Path(folder) / _LOG
        prepare_ops(ops, launch_environment(cluster), log, on_line)
        _run(cluster, nvme_path, Path(folder), on_line, *(["--quick"] if quick else []))
        paths = sorted(Path(folder).glob("rates_*.json"))
        found = [parse_json(_RATES, path.read_bytes(), str(path)) for path in paths]
    made = make_provenance(command, ("torch", "deepspeed"))
    return _median(found).model_copy(
        update={
            "command": command,
            "time_utc": made.time_utc,
            "machine": ", ".join([made.machine, f"{made.cores} cores", *map(" ".join, made.versions.items())]),
        }
    )


def _check_gpus_of(cluster: ClusterSpec) -> None:
    """Check that this machine has the GPUs of a cluster, before minutes of compiling."""
    if cluster.device == "cuda":
        check_gpus(cluster.ranks_per_node)


def _run(cluster: ClusterSpec, nvme_path: str | None, folder: Path, on_line: OnLine, *options: str) -> None:
    port = str(free_port())
    environments = []
    for rank in range(cluster.world_size):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": cluster.world_size, "MASTER_PORT": port}
        environments.append({**launch_environment(cluster), "MASTER_ADDR": "127.0.0.1"})
        environments[-1] |= {name: str(value) for name, value in world.items()}
    command = [sys.executable, "-m", "translution.cli", "calibrate-rank", *options, str(folder), cluster.device]
    command += [nvme_path] if nvme_path else []
    code = run_processes(command, environments, folder / _LOG, _lines(folder, on_line))
    if code:
        lines = (folder / _LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RunFailedError(f"a rank failed: {lines[-1][:500] if lines else f'exit code {code}'}")


def _lines(folder: Path, on_line: OnLine) -> Callable[[], None]:
    """Return a function that passes on the lines that rank 0 has written since its last call."""
    path, shown = folder / _PROGRESS, [0]

    def poll() -> None:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines[shown[0] :]:
            on_line(f"measuring: {line}")
        shown[0] = len(lines)

    return poll


def _median(found: list[MeasuredRates]) -> MeasuredRates:
    """Merge the ranks' measurements to the median of each rate."""
    rows = [rates.model_dump() for rates in found]
    merged: dict[str, Any] = dict(rows[0])
    for name, value in rows[0].items():
        values = [row[name] for row in rows]
        if name == "matmul":
            merged[name] = [
                point | {"flops_per_s": statistics.median([other[number]["flops_per_s"] for other in values])}
                for number, point in enumerate(value)
            ]
        elif isinstance(value, dict):
            merged[name] = {key: statistics.median([other[key] for other in values]) for key in value}
        elif isinstance(value, float):
            merged[name] = statistics.median(values)
    return MeasuredRates.model_validate(merged)


def machine_file(cluster_name: str, rates: MeasuredRates, nvme_path: str | None) -> str:
    """Return the text of a cluster file: the base cluster with the measured rates and the NVMe drive's free space."""
    import yaml

    data: dict[str, Any] = {"base": cluster_name, "measured": rates.model_dump(mode="json", exclude_none=True)}
    if nvme_path is not None:
        room = os.statvfs(nvme_path)
        data["nvme_bytes"] = room.f_bavail * room.f_frsize
    return str(yaml.safe_dump(data, sort_keys=False))


def calibrate_rank(folder: Path, device: str, nvme_path: Path | None, *, quick: bool = False) -> None:
    """Measure as one rank, and write the result to the folder.

    Args:
        folder: folder shared by the ranks.
        device: "cpu" or "cuda".
        nvme_path: folder on the NVMe drive to measure; None leaves it out.
        quick: measure few and small sizes, as a rehearsal.
    """
    end_with_launcher()
    import deepspeed
    import torch

    from .microbenchmarks import measure_rates

    rank = int(os.environ["RANK"])
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo")

    def report(line: str) -> None:
        if rank == 0:
            with (folder / _PROGRESS).open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    try:
        rates = measure_rates(device, nvme_path, report, quick=quick)
        write_text(folder / f"rates_{rank}.json", rates.model_dump_json())
        torch.distributed.barrier()
    finally:
        leave_process_group()
