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

import datetime
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter

from translution.planner.errors import InputError, RunFailedError
from translution.planner.files import write_text
from translution.planner.schema import Schema, parse_json

METRICS, LOG, CHECKPOINT, PLAN, RUNS = "metrics.jsonl", "launcher.log", "checkpoint", "plan.json", "runs"

MEASURE, RESUMING, PROCESS, CONTINUE = "measure", "resume", "process", "continue"
MODES = ("train", MEASURE, RESUMING, PROCESS, CONTINUE)
"""What ranks do: train and evaluate; train, watching allocations; only resume, watching them; resume and
train, watching the process; go on with a run and evaluate."""


class RankStatus(Schema):
    """What a rank last said of itself."""

    rank: int
    state: Literal["started", "training", "failed", "stopped", "finished"]
    step: int = 0
    message: str = ""
    pid: int = 0
    time_utc: str = ""


class MemoryMeasurement(Schema):
    """Bytes measured by one rank in one training step."""

    rank: int
    device: Literal["cpu", "cuda"]
    step: int
    entries_bytes: dict[str, int]
    """Live tensors between two steps, told apart."""
    resident_bytes: int
    """All live tensors between two steps."""
    phase_peak_bytes: dict[str, int]
    """Highest sum of live memory within each phase of the step."""
    peak_bytes: int
    """The highest of them."""
    process_peak_bytes: int
    """Highest resident set of the process so far, libraries included."""
    host_entries_bytes: dict[str, int] = Field(default_factory=dict)
    """Live tensors in host memory between two steps, where the device has memory of its own."""
    swap_buffers_bytes: dict[str, int] = Field(default_factory=dict)
    """Locked buffers for NVMe, which are in no other figure but the process's and ``locked_bytes``."""
    locked_bytes: int = 0
    """Memory of the process that is locked (mlock), between two steps."""
    pinned_bytes: int = 0
    """Memory of the process that a driver has pinned, between two steps."""
    disk_bytes: dict[str, int] = Field(default_factory=dict)
    """Files of this rank on NVMe between two steps, by what they hold."""
    kept_bytes: int | None = None
    """What one micro-batch's forward keeps for backward, parameters left out."""
    process_start_bytes: int = 0
    """Resident set before the model was made: libraries, data and the process group."""
    process_phase_peak_bytes: dict[str, int] = Field(default_factory=dict)
    """Highest resident set within each phase, libraries included."""


_STATUS: TypeAdapter[RankStatus] = TypeAdapter(RankStatus)
_MEMORY: TypeAdapter[MemoryMeasurement] = TypeAdapter(MemoryMeasurement)


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


def write_status(run: Path, status: RankStatus) -> None:
    """Replace a rank's status."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    write_text(status_path(run, status.rank), status.model_copy(update={"time_utc": now}).model_dump_json() + "\n")


def read_status(run: Path, rank: int) -> RankStatus | None:
    """A rank's last status, or None if it never wrote one."""
    path = status_path(run, rank)
    return parse_json(_STATUS, path.read_bytes(), str(path)) if path.exists() else None


def read_memory(run: Path, rank: int) -> MemoryMeasurement | None:
    """A rank's measurement, or None if it never wrote one."""
    path = memory_path(run, rank)
    return parse_json(_MEMORY, path.read_bytes(), str(path)) if path.exists() else None


def read_statuses(run: Path) -> list[RankStatus]:
    """What every rank last said."""
    paths = sorted(status_path(run, 0).parent.glob("rank_*.json"))
    return [parse_json(_STATUS, path.read_bytes(), str(path)) for path in paths]


def stopped_text(run: Path) -> str:
    """How to go on with a run that saved when it was asked to end; nothing for another run."""
    statuses = read_statuses(run)
    if not statuses or any(status.state != "stopped" for status in statuses):
        return ""
    return f"saved at step {statuses[0].step}: translution launch PLAN_FOLDER --resume --run {run} goes on"


def clear_statuses(run: Path, ranks: Iterable[int]) -> None:
    """Forget what ranks last said, before they are started anew."""
    for rank in ranks:
        status_path(run, rank).unlink(missing_ok=True)


def forget_measurements(run: Path) -> None:
    """Remove what ranks measured before the run took on another layout."""
    for path in memory_path(run, 0).parent.glob("rank_*.json"):
        path.unlink()


def trim_metrics(run: Path) -> None:
    """Cut off the line that a killed run has left torn."""
    path = run / METRICS
    if not path.exists():
        return
    with path.open("r+b") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)


def judge(run: Path, ranks: int | Iterable[int], exit_code: int) -> None:
    """Decide whether a run ended well.

    Args:
        run: the run folder.
        ranks: how many ranks it had, or which.
        exit_code: of the launcher.

    Raises:
        RunFailedError: naming the first rank that did not finish and what it said, or the exit code.
    """
    silent: list[str] = []
    for rank in range(ranks) if isinstance(ranks, int) else ranks:
        status = read_status(run, rank)
        if status is not None and status.state == "failed":
            raise RunFailedError(
                f"rank {rank} failed at step {status.step}: {status.message} (log: {log_path(run, rank)})"
            )
        if status is not None and status.state == "stopped":
            raise RunFailedError(f"stopped by {status.message}; {stopped_text(run)}")
        if status is None or status.state != "finished":
            last = "never started" if status is None else f"was last seen {status.state} at step {status.step}"
            silent.append(f"rank {rank} {last}")
    if silent:
        raise RunFailedError(
            f"{'; '.join(silent)}; launcher exit code {exit_code} (logs: {run / LOG} and {log_path(run, 0).parent})"
        )


def require_run(run: Path) -> Path:
    """The folder, if it is a run folder.

    Raises:
        InputError: if it has no plan.json and status folder.
    """
    if not (run / PLAN).is_file() or not status_path(run, 0).parent.is_dir():
        raise InputError(f"{run}: is not a run folder: must hold plan.json and status/")
    return run
