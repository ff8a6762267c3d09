"""The status file of each rank in a run folder."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from translution.planner.common.errors import RunFailedError
from translution.planner.common.files import write_text
from translution.planner.common.schema import Schema, parse_json

from .folder import LOG, log_path, status_path


class RankStatus(Schema):
    """What a rank last said of itself."""

    rank: int
    state: Literal["started", "training", "failed", "stopped", "finished"]
    step: int = 0
    message: str = ""
    pid: int = 0
    time_utc: str = ""


_STATUS: TypeAdapter[RankStatus] = TypeAdapter(RankStatus)


def write_status(run: Path, status: RankStatus) -> None:
    """Replace a rank's status."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_text(status_path(run, status.rank), status.model_copy(update={"time_utc": now}).model_dump_json() + "\n")


def read_status(run: Path, rank: int) -> RankStatus | None:
    """A rank's last status, or None if it never wrote one."""
    path = status_path(run, rank)
    return parse_json(_STATUS, path.read_bytes(), str(path)) if path.exists() else None


def read_statuses(run: Path) -> list[RankStatus]:
    """What every rank last said."""
    paths = sorted(status_path(run, 0).parent.glob("rank_*.json"))
    return [parse_json(_STATUS, path.read_bytes(), str(path)) for path in paths]


def resume_hint(run: Path) -> str:
    """How to go on with a run that saved when it was asked to end; nothing for another run."""
    statuses = read_statuses(run)
    if not statuses or any(status.state != "stopped" for status in statuses):
        return ""
    return f"saved at step {statuses[0].step}: translution launch PLAN_FOLDER --resume --run {run} goes on"


def clear_statuses(run: Path, ranks: Iterable[int]) -> None:
    """Forget what ranks last said, before they are started anew."""
    for rank in ranks:
        status_path(run, rank).unlink(missing_ok=True)


def raise_unless_finished(run: Path, ranks: int | Iterable[int], exit_code: int) -> None:
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
            raise RunFailedError(f"stopped by {status.message}; {resume_hint(run)}")
        if status is None or status.state != "finished":
            last = "never started" if status is None else f"was last seen {status.state} at step {status.step}"
            silent.append(f"rank {rank} {last}")
    if silent:
        raise RunFailedError(
            f"{'; '.join(silent)}; launcher exit code {exit_code} (logs: {run / LOG} and {log_path(run, 0).parent})"
        )
