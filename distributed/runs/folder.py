"""The run folder: its files, and how it is created.

A launcher's exit code can be 0 although a rank was killed, so these files decide whether a run succeeded: it did if,
and only if, every rank has written the status ``finished``.

    plan.json               the plan, copied when the run started
    first_weights.json      the network file that the run starts from, if there is one
    metrics.jsonl           one JSON object per step and evaluation, written by rank 0
    status/rank_N.json      last status of rank N (status.py)
    memory/rank_N.json      memory that rank N measured (measurement.py)
    checkpoint/             the newest checkpoints (checkpoint/manifest.py)
    logs/rank_N.log         output of rank N
    launcher.log            output of the launcher, and of ranks before they open their own log
    control/                heartbeat of a launcher with ranks on other hosts (heartbeat.py)
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pydantic import TypeAdapter

from translution.planner.common import InputError, Schema, parse_json, require_line, write_text
from translution.planner.plans import PLAN_FILE, RUNS

METRICS, LOG, CHECKPOINT = "metrics.jsonl", "launcher.log", "checkpoint"
_FIRST_WEIGHTS = "first_weights.json"


class _FirstWeights(Schema):
    path: Path
    """The network file."""


_WEIGHTS: TypeAdapter[_FirstWeights] = TypeAdapter(_FirstWeights)


def status_path(run: Path, rank: int) -> Path:
    """Path of a rank's status file."""
    return run / "status" / f"rank_{rank}.json"


def memory_path(run: Path, rank: int) -> Path:
    """Path of a rank's memory measurement."""
    return run / "memory" / f"rank_{rank}.json"


def log_path(run: Path, rank: int) -> Path:
    """Path of a rank's log."""
    return run / "logs" / f"rank_{rank}.log"


def log_to_own_file(run: Path, rank: int) -> None:
    """Redirect this process's stdout and stderr to its rank's log, appending to an existing one."""
    path = log_path(run, rank)
    print(f"rank {rank} prints to {path}", flush=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


def make_run_folders(run: Path, plan_folder: Path) -> None:
    """Create the folders that the ranks write to, and copy the plan; existing files stay."""
    for path in (status_path(run, 0), memory_path(run, 0), log_path(run, 0)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not (run / PLAN_FILE).exists():
        temporary = run / f".{PLAN_FILE}.{os.getpid()}.tmp"
        shutil.copy(plan_folder / PLAN_FILE, temporary)
        temporary.replace(run / PLAN_FILE)


def next_run_folder(plan_folder: Path) -> Path:
    """Return the first ``runs/NNN`` of a plan folder that does not exist."""
    number = 1
    while (plan_folder / RUNS / f"{number:03d}").exists():
        number += 1
    return plan_folder / RUNS / f"{number:03d}"


def new_run_folder(plan_folder: Path, run: Path | None, *, shared: bool = False) -> Path:
    """Create a run folder.

    Args:
        plan_folder: folder whose plan is copied.
        run: folder to create; None creates the plan folder's next ``runs/NNN``.
        shared: accept an existing folder, because every node creates the same one.

    Raises:
        InputError: if `run` exists and is not shared or holds control characters, or the folder cannot be written.
    """
    require_line(run or plan_folder, "run folder")
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


def set_first_weights(run: Path, path: Path | None) -> None:
    """Make the ranks of a new run start from a network file, if there is one."""
    if path is not None:
        write_text(run / _FIRST_WEIGHTS, _FirstWeights(path=path.resolve()).model_dump_json())


def first_weights(run: Path) -> Path | None:
    """Return the network file from which a run starts; None if its weights are drawn.

    Raises:
        InputError: if the file that names it is damaged.
    """
    path = run / _FIRST_WEIGHTS
    return parse_json(_WEIGHTS, path.read_bytes(), str(path)).path if path.is_file() else None


def trim_metrics(run: Path) -> None:
    """Remove an incomplete last line, which a killed run may leave."""
    path = run / METRICS
    if not path.exists():
        return
    with path.open("r+b") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)


def find_run(folder: Path) -> Path:
    """Return the folder itself if it is a run folder, or the newest run of a plan folder.

    Raises:
        InputError: if it is neither, or the plan has no run yet.
    """
    if status_path(folder, 0).parent.is_dir():
        return require_run(folder)
    runs = sorted((path for path in (folder / RUNS).glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError(f"{folder}: is not a run folder, nor a plan folder with runs")
    return require_run(runs[-1])


def require_run(run: Path) -> Path:
    """Return the folder if it is a run folder.

    Raises:
        InputError: if it does not hold plan.json and a status folder.
    """
    if not (run / PLAN_FILE).is_file() or not status_path(run, 0).parent.is_dir():
        raise InputError(f"{run}: is not a run folder: must hold plan.json and status/")
    return run
