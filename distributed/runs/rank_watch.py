"""Watches where the ranks of a run are: notices one that stands still, and one whose process has died.

A launcher watches all ranks. Ranks without a launcher, as under Slurm, watch themselves and the next rank.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from translution.planner.common import InputError, Phase
from translution.planner.costs import count_parameters
from translution.planner.plans import Plan

from .heartbeat import SILENT_SECONDS
from .progress import ENDED, RankProgress, read_progress
from .watchdog import ProcessState, process_state

HANG_MINUTES = "TRANSLUTION_HANG_MINUTES"
"""Environment variable: minutes after which a rank that stands still hangs; 0 never ends a run for that."""
STOPPED_SECONDS = 30.0
"""Seconds after which a rank of this host that a signal has stopped hangs."""
_STEP_SECONDS, _UNKNOWN_STEP_SECONDS, _SLOW_SECONDS = 600.0, 1800.0, 1800.0
_SHORTEST_SLOW_SECONDS = 120.0
_STEP_FACTOR, _SLOW_FACTOR = 20.0, 3.0
_SAVED_BYTES, _SLOWEST_DRIVE = 16, 20e6
"""Bytes of a checkpoint per parameter, at most; and bytes per second at which even a slow drive saves it."""
_POLL_SECONDS = 1.0
_LONGEST_POLL_SECONDS = 5.0
"""Time that counts between two looks: the watching process may have been suspended itself."""
_SLOW_PHASES = (Phase.INIT, Phase.RESUME, Phase.SAVE, Phase.EVALUATION)


@dataclasses.dataclass(frozen=True, slots=True)
class HangLimits:
    """Seconds that a rank may stand still, that is, stay in one phase of one micro-batch."""

    step_s: float
    """In a training step."""
    slow_s: float
    """While it starts, saves or loads a checkpoint, evaluates, and in its first step."""

    @property
    def stopped_s(self) -> float:
        """After which a stopped process hangs."""
        return min(STOPPED_SECONDS, self.step_s)

    @property
    def silent_s(self) -> float:
        """After which a silent rank on another host hangs."""
        return min(SILENT_SECONDS, self.step_s)

    def of(self, progress: RankProgress) -> float:
        """Return the limit of what a rank is doing."""
        return self.slow_s if progress.phase in _SLOW_PHASES or progress.steps_begun <= 1 else self.step_s


def hang_limits(plan: Plan, minutes: float | None) -> HangLimits | None:
    """Return the limits for a plan's ranks; None if there are none.

    Args:
        plan: gives the predicted time of a step.
        minutes: limit of a phase in a training step; three times as much, and at least two minutes, for slow phases.
            None allows a phase 20 times the longest predicted time of a whole step and at least ten minutes, and slow
            phases at least 30 minutes and the time in which a slow drive saves a checkpoint.

    Raises:
        InputError: if `minutes` is negative.
    """
    if minutes is not None and not 0 <= minutes < float("inf"):
        raise InputError(f"hang_minutes: {minutes:g} is not allowed: must be at least 0; 0 watches nothing")
    if minutes == 0:
        return None
    if minutes is not None:
        return HangLimits(step_s=60 * minutes, slow_s=max(_SHORTEST_SLOW_SECONDS, 60 * minutes * _SLOW_FACTOR))
    step_s = _UNKNOWN_STEP_SECONDS if plan.time is None else max(_STEP_SECONDS, _STEP_FACTOR * plan.time.high_s)
    saving_s = _SAVED_BYTES * count_parameters(plan.model).total / _SLOWEST_DRIVE
    return HangLimits(step_s=step_s, slow_s=max(_SLOW_SECONDS, step_s) + saving_s)


@dataclasses.dataclass(frozen=True, slots=True)
class Death:
    """The end of a rank's process."""

    rank: int
    signal: int | None
    """The signal that killed it; None if it exited, or nobody saw how it ended."""
    last: RankProgress
    """Where it was."""


@dataclasses.dataclass(slots=True)
class _Seen:
    """What was seen of a rank, and for how many seconds it has not changed."""

    progress: RankProgress
    idle_s: float = 0.0
    silent_s: float = 0.0
    stopped_s: float = 0.0

    @property
    def has_ended(self) -> bool:
        """True if the rank has said that it ends."""
        return bool(self.progress.failure) or self.progress.phase == ENDED


class RankWatch:
    """Watches some ranks of a run.

    Args:
        run: the run folder.
        ranks: the ranks that are watched.
        world_size: number of all ranks.
        limits: how long they may stand still; None for ever.
        clock: returns seconds.
    """

    def __init__(
        self,
        run: Path,
        ranks: Iterable[int],
        world_size: int,
        limits: HangLimits | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run, self.ranks, self.world_size, self.limits = run, tuple(ranks), world_size, limits
        self.deaths: list[Death] = []
        """Deaths of ranks of this host, in the order in which they were noticed."""
        self.hung: RankProgress | None = None
        """The rank that was found to hang."""
        self._seen: dict[int, _Seen] = {}
        self._clock = clock
        self._host, self._before, self._elapsed = socket.gethostname(), clock(), 0.0

    def look(self) -> None:
        """Note which of the ranks of this host have died; to be called several times per second."""
        dead = {death.rank for death in self.deaths}
        for rank in self.ranks:
            seen = self._seen.get(rank)
            if seen is None:
                if (progress := read_progress(self.run, rank)) is None:
                    continue
                seen = self._seen[rank] = _Seen(progress)
            if rank in dead or seen.progress.host != self._host:
                continue
            state = process_state(seen.progress.pid)
            if not state.alive:
                last = read_progress(self.run, rank) or seen.progress
                self.deaths.append(Death(rank, state.signal, last))

    def find_hang(self) -> str:
        """Return which rank hangs and where, as a sentence without its end; an empty string if none does."""
        now = self._clock()
        elapsed, self._before = now - self._before, now
        self._elapsed += min(elapsed, _LONGEST_POLL_SECONDS)
        if self._elapsed < _POLL_SECONDS or self.limits is None:
            return ""
        passed, self._elapsed = self._elapsed, 0.0
        dead = {death.rank for death in self.deaths}
        for rank in self.ranks:
            if rank not in dead:
                self._observe(rank, passed)
        seen = [found for rank, found in sorted(self._seen.items()) if rank not in dead]
        # The cause first: others stand still because of it.
        for judge in (self._judge_process, self._judge_phase):
            if text := next(filter(None, map(judge, seen)), ""):
                return text
        return ""

    def _observe(self, rank: int, passed: float) -> None:
        """Note for how long a rank has not changed."""
        progress, before = read_progress(self.run, rank), self._seen.get(rank)
        if progress is None and before is None:
            return  # It is still importing; its launcher sees if it dies.
        if before is None or (progress is not None and progress.pid != before.progress.pid):
            assert progress is not None
            self._seen[rank] = _Seen(progress)
            return
        here = before.progress.host == self._host
        state = process_state(before.progress.pid) if here else ProcessState(alive=True)
        before.stopped_s = before.stopped_s + passed if state.stopped else 0.0
        moved = progress is not None and progress.moves != before.progress.moves
        heartbeats = progress is not None and progress.heartbeat != before.progress.heartbeat
        before.idle_s = 0.0 if moved else before.idle_s + passed
        before.silent_s = 0.0 if moved or heartbeats else before.silent_s + passed
        before.progress = progress or before.progress

    def _judge_process(self, seen: _Seen) -> str:
        """Return whether a process is stopped or gone; an empty string if not."""
        limits, progress = self.limits, seen.progress
        assert limits is not None
        if seen.has_ended:
            return ""
        self.hung = progress
        if seen.stopped_s >= limits.stopped_s:
            return self._name_stopped(seen)
        if progress.host != self._host and seen.silent_s >= limits.silent_s:
            return (
                f"rank {progress.rank} on {progress.host} has given no sign of life for {seen.silent_s:.0f} s, "
                f"{progress.place}"
            )
        self.hung = None
        return ""

    def _judge_phase(self, seen: _Seen) -> str:
        """Return whether a rank stands still; an empty string if not."""
        assert self.limits is not None
        if seen.has_ended or seen.idle_s < self.limits.of(seen.progress):
            return ""
        # Soon it would have been found by itself.
        stopped = next((found for found in self._seen.values() if found.stopped_s and not found.has_ended), None)
        return self._name_slowest(seen.idle_s) if stopped is None else self._name_stopped(stopped)

    def _name_stopped(self, seen: _Seen) -> str:
        self.hung = progress = seen.progress
        return f"rank {progress.rank} was stopped by a signal {seen.stopped_s:.0f} s ago, {progress.place}"

    def _name_slowest(self, idle_s: float) -> str:
        """Name the rank that is behind the others, which wait for it."""
        found = [read_progress(self.run, rank) for rank in range(self.world_size)]
        known = [progress for progress in found if progress is not None]
        slowest = min(known, key=lambda progress: progress.moves)
        self.hung = slowest
        behind = [progress for progress in known if progress.moves == slowest.moves]
        what = f"has done nothing for {idle_s:.0f} s, {slowest.place}"
        if len(behind) == len(known) > 1:
            return f"no rank goes on: each {what}"
        return f"rank {slowest.rank} on {slowest.host} {what}{'; the others wait for it' if len(known) > 1 else ''}"

    def count_moves(self) -> int:
        """Return how many phases all ranks have begun: it grows as long as one of them goes on."""
        found = [read_progress(self.run, rank) for rank in range(self.world_size)]
        return sum(progress.moves for progress in found if progress is not None)

    def limit_after_request(self, stand_still_s: float) -> float:
        """Return the seconds for which ranks may stand still that were asked to save after one of them hung.

        While one of them saves that is the limit of saving, unless one hung in it.

        Args:
            stand_still_s: the limit in other phases.
        """
        if self.limits is None or (self.hung is not None and self.hung.phase == Phase.SAVE):
            return stand_still_s
        found = [read_progress(self.run, rank) for rank in range(self.world_size)]
        saving = any(progress is not None and progress.phase == Phase.SAVE for progress in found)
        return max(stand_still_s, self.limits.slow_s) if saving else stand_still_s

    def describe(self) -> str:
        """Say where every rank is, those that are furthest behind first: what a run waits for."""
        found = [read_progress(self.run, rank) for rank in range(self.world_size)]
        known = sorted((x for x in found if x is not None), key=lambda progress: (progress.moves, progress.rank))
        return "; ".join(f"rank {progress.rank} {progress.place}" for progress in known[:8])


def limits_of_environment(plan: Plan, environment: Mapping[str, str] = os.environ) -> HangLimits | None:
    """Return the limits for ranks without a launcher.

    Raises:
        InputError: if `HANG_MINUTES` is not a number of minutes.
    """
    text = environment.get(HANG_MINUTES, "").strip()
    try:
        minutes = float(text) if text else None
    except ValueError:
        raise InputError(f"{HANG_MINUTES}: {text!r} is not allowed: must be a number of minutes") from None
    return hang_limits(plan, minutes)


def signal_name(number: int) -> str:
    """Return a signal's name, such as ``SIGKILL``."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
