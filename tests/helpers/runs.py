"""Plans and ranks for tests: ranks are processes started without a launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import forked
from helpers.waiting import wait_until

from translution.distributed.launcher.local_processes import MetricsReader, OnMetrics
from translution.distributed.runs.folder import METRICS
from translution.distributed.runs.mode import RunMode
from translution.distributed.runs.verdict import raise_unless_finished
from translution.distributed.system.environment import free_port, launch_environment
from translution.distributed.system.filesystem import remove_shared_buffers
from translution.planner.common.machine import usable_cores
from translution.planner.config.model import parse_model_spec
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import local_cpu_cluster
from translution.planner.plans.build import make_plan
from translution.planner.plans.folder import write_plan_folder
from translution.planner.plans.plan import load_plan

TINY = {"family": "vit", "image": 16, "patch": 4, "channels": 1, "classes": 10, "dim": 16, "depth": 2, "heads": 2}


def has_libaio() -> bool:
    """Return whether DeepSpeed's op for NVMe can be compiled."""
    return Path("/usr/include/libaio.h").exists()


def write_plan(
    folder: Path,
    ranks: int,
    *,
    stage: Any = 3,
    tile: int | None = None,
    model: dict[str, Any] = TINY,
    offload: str = "none",
    nvme_path: Path | None = None,
    ratio: float = 1.0,
    force: bool = False,
    nodes: int = 1,
    zero_overrides: Mapping[str, object] | None = None,
    relation_parallel: int = 1,
    **training: Any,
) -> Path:
    """Plan a model for CPU ranks of this machine, or of several nodes, and write the plan folder."""
    if nvme_path is not None and not has_libaio():
        pytest.skip("needs libaio-dev")
    values = {"micro_batch": 8, "steps": 4, "warmup_steps": 1, "evaluation_samples": 64} | training
    plan = make_plan(
        parse_model_spec(model),
        local_cpu_cluster(ranks).model_copy(update={"nodes": nodes}),
        TrainingSpec(**values),
        stage=stage,
        tile_relations=tile,
        offload=offload,
        nvme_path=None if nvme_path is None else str(nvme_path),
        offload_ratio=ratio,
        zero_overrides=zero_overrides,
        relation_parallel=relation_parallel,
    )
    write_plan_folder(plan, folder, force=force)
    return folder


def run_ranks_of(command: Sequence[object], ranks: int, log: Path) -> None:
    """Run a command once per rank and check that all succeed; no process outlives the call."""
    port = str(free_port())
    processes: list[forked.ForkServerProcess | subprocess.Popen[bytes]] = []
    log.touch()
    try:
        for rank in range(ranks):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            environment = {name: str(value) for name, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"}
            environment = os.environ | launch_environment(local_cpu_cluster(min(ranks, usable_cores()))) | environment
            processes.append(start([*map(str, command)], environment, log))
        codes = wait_until(lambda: ended(processes), every_s=0.02)
    finally:
        for process in processes:
            process.kill()
            process.join() if isinstance(process, forked.ForkServerProcess) else process.wait()
        remove_shared_buffers(port)
    logs = [log, *log.parent.rglob("rank_*.log")]
    assert codes == [0] * ranks, [path.read_text()[-5000:] for path in logs]


def forked_ranks(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, on_metrics: OnMetrics, **_: object
) -> int:
    """`run_ranks` without DeepSpeed's launcher: forks of a process that has imported everything; all succeed."""
    reader = MetricsReader(folder / METRICS, on_metrics)
    words = command[command.index("translution.cli") + 1 :]
    ranks = load_plan(folder).cluster.world_size
    run_ranks_of(["-m", "translution.cli", *words], ranks, folder / "launcher.log")
    reader.poll()
    return 0


def ended(processes: Sequence[forked.ForkServerProcess | subprocess.Popen[bytes]]) -> list[int | None]:
    """Return the exit codes of all processes once all have ended or one has failed, before that an empty list."""
    codes = [exit_code(process) for process in processes]
    return codes if None not in codes or any(codes) else []


def shared_buffers(pid: int) -> str:
    """Return the pattern of the names of the buffers in /dev/shm of the run that a living rank belongs to."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    port = dict(variable.split(b"=", 1) for variable in variables if b"=" in variable)[b"MASTER_PORT"].decode()
    return f"deepspeed_allreduce_buffer_*_{port}_*"


def start(
    arguments: list[str], environment: dict[str, str], log: Path
) -> forked.ForkServerProcess | subprocess.Popen[bytes]:
    # The C library reads MALLOC_ variables when a process starts, so it cannot be forked.
    if not any(name.startswith("MALLOC_") for name in environment):
        return forked.start(arguments, environment, log)
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, *arguments], env=environment, stdout=file, stderr=file)


def exit_code(process: forked.ForkServerProcess | subprocess.Popen[bytes]) -> int | None:
    return process.exitcode if isinstance(process, forked.ForkServerProcess) else process.poll()


def run_plan(folder: Path, ranks: int, mode: RunMode = RunMode.TRAIN) -> Path:
    """Run a plan without a launcher and return its run folder."""
    run = folder / "runs" / "by-hand"
    run_ranks_of(["-m", "translution.cli", "train", folder, run, "--mode", mode], ranks, folder / "log")
    raise_unless_finished(run, ranks, exit_code=0)
    return run


def without_version_notes(text: str) -> str:
    """Drop the notes on packages whose version is not that of a plan, such as the oldest allowed ones."""
    return "".join(line for line in text.splitlines(keepends=True) if "; the plan was made for " not in line)
