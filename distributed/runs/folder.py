"""The files of a run folder, and the status that every rank writes.

A launcher's exit code can be 0 although a rank was killed, so a run is judged by these files: it
succeeded if, and only if, every rank has written ``finished``.

    plan.json               the plan, copied when the run began
    metrics.jsonl           one JSON object per step and evaluation, by rank 0
    status/rank_N.json      what rank N last said of itself
    memory/rank_N.json      what rank N measured
    checkpoint/             the newest states (checkpoint.py)
    logs/rank_N.log         what rank N printed
    launcher.log            what the launcher printed, and ranks before they had their own log
    control/                what joins ranks on other hosts to their launcher (control.py)
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from translution.planner.common.errors import InputError

METRICS, LOG, CHECKPOINT, PLAN, RUNS = "metrics.jsonl", "launcher.log", "checkpoint", "plan.json", "runs"


def status_path(run: Path, rank: int) -> Path:
    """Where a rank's status lies."""
    return run / "status" / f"rank_{rank}.json"


def memory_path(run: Path, rank: int) -> Path:
    """Where a rank's measurement lies."""
    return run / "memory" / f"rank_{rank}.json"


def log_path(run: Path, rank: int) -> Path:
    """Where what a rank prints lies."""
    return run / "logs" / f"rank_{rank}.log"


def log_to_own_file(run: Path, rank: int) -> None:
    """Let this process print to its rank's log from here on, after what an earlier launch has printed there."""
    path = log_path(run, rank)
    print(f"rank {rank} prints to {path}", flush=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


def make_run_folders(run: Path, plan_folder: Path) -> None:
    """Make the folders that the ranks write to, and copy the plan; what is there already stays."""
    for path in (status_path(run, 0), memory_path(run, 0), log_path(run, 0)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not (run / PLAN).exists():
        temporary = run / f".{PLAN}.{os.getpid()}.tmp"
        shutil.copy(plan_folder / PLAN, temporary)
        temporary.replace(run / PLAN)


def trim_metrics(run: Path) -> None:
    """Cut off the line that a killed run has left torn."""
    path = run / METRICS
    if not path.exists():
        return
    with path.open("r+b") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)


def require_run(run: Path) -> Path:
    """The folder, if it is a run folder.

    Raises:
        InputError: if it has no plan.json and status folder.
    """
    if not (run / PLAN).is_file() or not status_path(run, 0).parent.is_dir():
        raise InputError(f"{run}: is not a run folder: must hold plan.json and status/")
    return run
