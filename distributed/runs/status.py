"""Status of each rank, and of the run, from the files in a run folder."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter

from translution.planner.common import InputError, Schema, parse_json, write_text
from translution.planner.plans import PLAN_FILE, RUNS, load_plan

from .folder import find_run, status_path
from .heartbeat import control_path
from .lock import is_rank_alive
from .progress import STACKS_REQUEST, progress_path, read_progress

UNDER_WAY = ("started", "training", "evaluating")
"""States of ranks that have not ended."""
ANOTHER_RANK = "a signal to another rank"
"""What stopped a rank that was not asked itself."""


class RankStatus(Schema):
    """Last status that a rank reported."""

    rank: int
    state: Literal["started", "training", "evaluating", "failed", "stopped", "finished"]
    step: int = 0
    """Steps done."""
    message: str = ""
    """The error of a failed rank; the signal or the launcher that stopped a stopped one."""
    pid: int = 0
    """Process id of the rank."""
    time_utc: str = ""
    """Time of the report, in ISO format."""


class RunStatus(Schema):
    """Status of all ranks of a run."""

    world_size: int
    """Number of ranks in the run's plan."""
    ranks: tuple[RankStatus, ...]
    """The ranks that reported a status, in the order of their numbers."""
    places: dict[int, str] = Field(default_factory=dict)
    """Where ranks were last that have not ended, by rank."""
    dead: tuple[int, ...] = ()
    """Ranks whose process has ended although their status says that they are at work."""

    @property
    def finished(self) -> bool:
        """True if every rank of the plan has finished."""
        return all((status := self.of(rank)) and status.state == "finished" for rank in range(self.world_size))

    def of(self, rank: int) -> RankStatus | None:
        """Return a rank's status, or None if it never reported one."""
        return next((status for status in self.ranks if status.rank == rank), None)


_STATUS: TypeAdapter[RankStatus] = TypeAdapter(RankStatus)


def write_status(run: Path, status: RankStatus) -> None:
    """Write a rank's status, with the current time, in place of its last one."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_text(status_path(run, status.rank), status.model_copy(update={"time_utc": now}).model_dump_json() + "\n")


def read_status(run: Path, rank: int) -> RankStatus | None:
    """Return a rank's last status, or None if it never reported one.

    Raises:
        InputError: if its file is damaged.
    """
    path = status_path(run, rank)
    return parse_json(_STATUS, path.read_bytes(), str(path)) if path.exists() else None


def _reported_ranks(run: Path) -> list[int]:
    paths = status_path(run, 0).parent.glob("rank_*.json")
    return sorted(int(path.stem.partition("_")[2]) for path in paths)


def readable_status(run: Path, rank: int) -> RankStatus | None:
    """Return a rank's last status; None also for a file that a full disk, for instance, has cut."""
    try:
        return read_status(run, rank)
    except (OSError, InputError):
        return None


def read_statuses(run: Path) -> list[RankStatus]:
    """Return the last status of every rank that reported one which can be read."""
    statuses = (readable_status(run, rank) for rank in _reported_ranks(run))
    return [status for status in statuses if status is not None]


def resume_hint(run: Path) -> str:
    """Return how to resume a run whose ranks all saved and stopped; an empty string for other runs."""
    statuses = read_statuses(run)
    if not statuses or any(status.state != "stopped" for status in statuses):
        return ""
    # A run folder elsewhere tells nothing of its plan folder, but holds the plan.
    known = run.parent.name == RUNS and (run.parent.parent / PLAN_FILE).is_file()
    folder = run.parent.parent if known else run
    command = shlex.join(["translution", "launch", str(folder), "--resume", "--run", str(run)])
    return f"saved at step {statuses[0].step}: resume it with {command}"


def read_run_status(run: Path) -> RunStatus:
    """Read the status of a run.

    Args:
        run: the run folder, or a plan folder whose newest run is used.

    Raises:
        InputError: if the folder is neither, or one of its files is damaged.
    """
    run = find_run(run)
    world_size = load_plan(run).cluster.world_size
    ranks = tuple(status for rank in _reported_ranks(run) if (status := read_status(run, rank)) is not None)
    at_work = [status.rank for status in ranks if status.state in UNDER_WAY]
    return RunStatus(
        world_size=world_size,
        ranks=ranks,
        places={rank: found.place for rank in at_work if (found := read_progress(run, rank)) is not None},
        dead=tuple(rank for rank in at_work if is_rank_alive(run, rank) is False),
    )


def clear_statuses(run: Path, ranks: Iterable[int], world_size: int) -> None:
    """Remove what ranks said about themselves before they are started again, and those an earlier launch had more."""
    started = set(ranks)
    for rank in _reported_ranks(run):
        if rank in started or rank >= world_size:
            status_path(run, rank).unlink(missing_ok=True)
            progress_path(run, rank).unlink(missing_ok=True)
    control_path(run, STACKS_REQUEST).unlink(missing_ok=True)
