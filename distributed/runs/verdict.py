"""Why a run has ended: its cause is named, not the ranks that only noticed it.

First comes a rank's own error, then a process that died, then a rank that hung, and last those that lost their
connection to others.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

from translution.planner.common import RunFailedError

from .folder import LOG, log_path
from .memory_kills import count_memory_kills
from .progress import RankProgress, read_progress
from .rank_watch import Death, signal_name
from .status import ANOTHER_RANK, UNDER_WAY, RankStatus, readable_status, resume_hint

_HOST_RETURN_CODE = re.compile(rb"^(?:(\S+): )?.*exits with return code = (-?\d+)", re.MULTILINE)
"""What DeepSpeed's launcher logs when one of its ranks has failed; pdsh puts the host before it."""

_CONNECTION = (
    "gloo/transport", "connection closed by peer", "connection reset by peer", "broken pipe", "nccl", "socket timeout",
    "timed out waiting", "wait timeout", "store->get", "tcpstore", "connection refused", "connection was closed",
    "application timeout",
)  # fmt: skip
"""What messages of a broken collective contain, in lower case."""


def tells_lost_connection(message: str) -> bool:
    """Return True if an error's message is that of a collective which other ranks have left."""
    text = message.lower()
    return any(part in text for part in _CONNECTION)


def raise_unless_finished(
    run: Path,
    ranks: int | Iterable[int],
    exit_code: int,
    *,
    deaths: Sequence[Death] = (),
    log_offset: int = 0,
    memory_kills: int | None = None,
) -> None:
    """Raise an error unless every rank of a run has finished.

    Args:
        run: the run folder.
        ranks: number of ranks, or the ranks to check.
        exit_code: exit code of the launcher, for the message.
        deaths: processes that were seen to die, the first one first.
        log_offset: size of the launcher's log when the ranks were started.
        memory_kills: what `count_memory_kills` returned then.

    Raises:
        RunFailedError: names the rank that is the cause and where it was, with its message; otherwise all ranks
            that did not finish, with the launcher's exit code.
    """
    numbers = list(range(ranks) if isinstance(ranks, int) else ranks)
    statuses = {rank: readable_status(run, rank) for rank in numbers}
    places = {rank: read_progress(run, rank) for rank in numbers}
    if all(status is not None and status.state == "finished" for status in statuses.values()):
        return
    failures = [_Failure(run, rank, statuses[rank], places[rank]) for rank in numbers]
    own = [failure for failure in failures if failure.cause == "own"]
    if own:
        raise RunFailedError(min(own, key=lambda failure: failure.time_utc).text)
    reported = {failure.rank for failure in failures if failure.cause or _has_ended(statuses[failure.rank])}
    logged = _logged_ends(run, log_offset)
    if text := _killed(run, deaths, reported, logged, memory_kills) or _killed_on_host(run, logged, places, reported):
        raise RunFailedError(text)
    for cause in ("other", "connection"):
        for failure in failures:
            if failure.cause == cause:
                raise RunFailedError(failure.text)
    stopped = [status.message for status in statuses.values() if status is not None and status.state == "stopped"]
    if stopped:
        # Other ranks know only that one of them was asked.
        known = [message for message in stopped if message != ANOTHER_RANK]
        raise RunFailedError(f"stopped by {(known or stopped)[0]}; {resume_hint(run)}")
    unfinished = [_last_seen(rank, status, places[rank]) for rank, status in statuses.items()]
    raise RunFailedError(
        f"{'; '.join(filter(None, unfinished))}; launcher exit code {exit_code} "
        f"(logs: {run / LOG} and {log_path(run, 0).parent})"
    )


class _Failure:
    """What a rank said about its own failure, in its status or, where that could not be written, in its progress."""

    def __init__(self, run: Path, rank: int, status: RankStatus | None, place: RankProgress | None) -> None:
        self.rank = rank
        failed = status is not None and status.state == "failed"
        self.time_utc = status.time_utc if status is not None and failed else ""
        message = status.message if status is not None and failed else (place.failure if place else "")
        self.cause = self._cause(message, place) if failed or message else ""
        where = place.place if place and place.step else f"at step {status.step if status else 0}"
        subject = f"rank {rank} lost its connection" if self.cause == "connection" else f"rank {rank} failed"
        self.text = f"{subject} {where}: {message} (log: {log_path(run, rank)})"
        if self.cause == "other":
            self.text = f"{message} (stacks: {log_path(run, 0).parent})"

    @staticmethod
    def _cause(message: str, place: RankProgress | None) -> str:
        if place is not None and place.cause:
            return place.cause
        return "connection" if tells_lost_connection(message) else "own"


def _has_ended(status: RankStatus | None) -> bool:
    return status is not None and status.state in ("finished", "stopped")


def _killed(
    run: Path, deaths: Sequence[Death], reported: set[int], logged: Sequence[tuple[str, int]], memory_kills: int | None
) -> str:
    """Return which process died first without a word, unless its launcher ended it because of another one."""
    # After a rank that has reported its end, DeepSpeed's launcher sends SIGTERM to the others.
    after_report = bool(deaths) and deaths[0].rank in reported
    ended = (None, signal.SIGTERM) if after_report else ()
    death = next((death for death in deaths if death.rank not in reported and death.signal not in ended), None)
    if death is None:
        return ""
    killed_by = death.signal or next((-code for _, code in logged if code < 0), None)
    name = None if killed_by is None else signal_name(killed_by)
    how = "ended without a word" if name is None else f"was killed by {name}"
    return f"rank {death.rank} {how} {death.last.place}{_reason(name, memory_kills)} (log: {log_path(run, death.rank)})"


def _reason(name: str | None, memory_kills: int | None) -> str:
    """Return what is known or likely about a signal."""
    if name == "SIGKILL":
        now = count_memory_kills()
        if now is not None and memory_kills is not None and now > memory_kills:
            return ", probably by the kernel, which has killed a process for want of memory"
    if name == "SIGBUS":
        return ", as processes are when /dev/shm or a mapped file's drive is full"
    return ""


def _logged_ends(run: Path, offset: int) -> list[tuple[str, int]]:
    """Return the hosts and exit codes of failed ranks, as DeepSpeed's launchers have logged them."""
    try:
        with (run / LOG).open("rb") as log:
            log.seek(offset)
            text = log.read()
    except OSError:
        return []
    return [(host.decode(errors="replace"), int(code)) for host, code in _HOST_RETURN_CODE.findall(text)]


def _killed_on_host(
    run: Path, logged: Sequence[tuple[str, int]], places: dict[int, RankProgress | None], reported: set[int]
) -> str:
    """Return which rank of another host died by a signal."""
    silent = [place for rank, place in places.items() if place is not None and rank not in reported]
    host, code = next(((host, code) for host, code in logged if code < 0), ("", 0))
    if not silent or not code:
        return ""
    first = min(silent, key=lambda place: place.moves)
    where = f" on {host}" if host else ""
    which = f"rank {first.rank}" if len(silent) == 1 else "one of ranks " + ", ".join(str(x.rank) for x in silent)
    return f"{which}{where} was killed by {signal_name(-code)} {first.place} (log: {log_path(run, first.rank)})"


def _last_seen(rank: int, status: RankStatus | None, place: RankProgress | None) -> str:
    if status is None:
        return f"rank {rank} never started"
    if status.state == "finished":
        return ""
    where = place.place if place and place.step and status.state in UNDER_WAY else f"at step {status.step}"
    return f"rank {rank} was last seen {status.state} {where}"
