"""Searches for many concurrent users: one per choice, in worker processes, cached and bounded.

All state belongs to the thread of the event loop; workers receive a choice and return JSON.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from cachetools import LRUCache
from pebble import ProcessPool
from pydantic import TypeAdapter

from translution.planner.common import parse_json
from translution.planner.config import OPERATORS, PRESET_NAMES

from .choice import FIXED_FIELDS, Choice
from .pasted import MAX_NODES
from .result import Outcome, WorkerResult, search_choice

LIMIT_S = 60.0
"""Time limit of a search in seconds; the largest allowed clusters and models take a few seconds."""
IDLE_LIMIT_S = 5.0
"""Time limit of a search that no user requested."""
MAX_QUEUED = 64
MAX_CACHED = 2048
ABANDONED_S = 5.0
"""Seconds after which a queued search that no request waits for is dropped."""
WORKER_NICENESS = 10
"""Niceness of the workers, so that the server process takes precedence."""
POPULAR_CLUSTERS: tuple[tuple[str, int, int], ...] = (("H100", 8, 1), ("A100-80", 8, 1), ("H100", 8, 2))
"""GPU, GPUs per node and nodes of the most requested clusters."""
_OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Outcome)


class QueueFullError(Exception):
    """Raised if the queue of searches is full.

    Args:
        waiting: number of searches in the queue.
        retry_s: seconds after which to try again.
    """

    def __init__(self, waiting: int, retry_s: int) -> None:
        super().__init__(f"{waiting} searches are waiting: try again in {retry_s} s")
        self.retry_s = retry_s


@dataclass(slots=True, eq=False)
class SearchEntry:
    """The search of one choice."""

    choice: Choice
    state: Literal["queued", "running", "done"] = "queued"
    requested: bool = True
    """True if a user requested the search; False if it was started in idle time."""
    waiting: int = 0
    """Number of requests that wait for the search."""
    requested_at: float = field(default_factory=time.monotonic)
    """Time of the last request."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    packed_outcome: bytes = b""
    packed_plan: bytes | None = None

    @property
    def outcome(self) -> Outcome:
        """Outcome of the search; its state is "searching" until the search is done."""
        if self.state != "done":
            return Outcome(state="searching")
        return parse_json(_OUTCOME, zlib.decompress(self.packed_outcome), "outcome")

    @property
    def plan(self) -> bytes | None:
        """The plan as JSON; None if none was found."""
        return None if self.packed_plan is None else zlib.decompress(self.packed_plan)

    def finish(self, found: WorkerResult) -> None:
        """Store the result and wake the waiting requests."""
        self.packed_outcome = zlib.compress(found.outcome)
        self.packed_plan = None if found.plan is None else zlib.compress(found.plan)
        self.state = "done"
        self.done.set()


def popular_choices() -> Iterator[Choice]:
    """Yield the choices to search in idle time: every preset with every operator on the most requested clusters."""
    start = Choice()
    for gpu, gpus, nodes in POPULAR_CLUSTERS:
        for operator in OPERATORS:
            for model in PRESET_NAMES:
                yield start.replacing(model=model, operator=operator, gpu=gpu, gpus=gpus, nodes=nodes)


def neighbour_choices(choice: Choice) -> Iterator[Choice]:
    """Yield choices that a user may request next: with one of the main fields changed, or nothing fixed."""
    if not {*FIXED_FIELDS}.isdisjoint(choice.changed):
        yield choice.replacing(**dict.fromkeys(FIXED_FIELDS))
    if choice.model_yaml is not None or choice.cluster_yaml is not None:
        # Other presets or sizes contradict the text, or do not change it.
        return
    # A window or other layers may not be valid with another operator.
    if {"window", "other_layers"}.isdisjoint(choice.changed):
        yield from (choice.replacing(operator=operator) for operator in OPERATORS if operator != choice.operator)
    yield from (
        choice.replacing(nodes=nodes) for nodes in (2 * choice.nodes, choice.nodes // 2) if 1 <= nodes <= MAX_NODES
    )
    if {"dim", "depth", "heads", "image", "patch", "context"}.isdisjoint(choice.changed):
        kind, _, cut = choice.model.partition("/")
        family = kind.partition("-")[0]
        for model in PRESET_NAMES:
            if model != choice.model and (model.startswith(f"{kind}/") or _same_cut(model, family, cut)):
                yield choice.replacing(model=model)
    yield from (
        choice.replacing(minimize=what) for what in ("time", "nodes", "cost", "memory") if what != choice.minimize
    )


def _same_cut(model: str, family: str, cut: str) -> bool:
    return model.startswith(f"{family}-") and model.endswith(f"/{cut}")


def _lower_priority() -> None:
    os.nice(WORKER_NICENESS)


class SearchPool:
    """Runs searches, caches their results, and searches likely next choices in idle time.

    Args:
        workers: number of worker processes.
        warm: search in idle time.
        limit_s: time limit of a search in seconds.
        queue: maximum number of queued searches.
    """

    def __init__(self, workers: int, *, warm: bool = True, limit_s: float = LIMIT_S, queue: int = MAX_QUEUED) -> None:
        self.workers, self._limit_s, self._queue_size = workers, limit_s, queue
        self._known: LRUCache[Choice, SearchEntry] = LRUCache(MAX_CACHED)
        self._queued: dict[Choice, SearchEntry] = {}
        self._running: dict[Choice, SearchEntry] = {}
        self._warm = warm
        self._popular: Iterator[Choice] = popular_choices() if warm else iter(())
        self._next: deque[Choice] = deque(maxlen=64)
        self._seconds = 1.0
        """Moving average of the time of a search."""
        self._pool = ProcessPool(workers, initializer=_lower_priority, context=multiprocessing.get_context("spawn"))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self.ending = False
        """True if the server is stopping and requests should no longer wait."""

    def open(self) -> None:
        """Start the workers and the idle searches; must be called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._pool.schedule(os.getpid)  # Starts all workers.
        self._pump()

    def close(self) -> None:
        """Stop all workers and finish all searches as stopped."""
        self._closed = True
        for entry in (*self._queued.values(), *self._running.values()):
            entry.finish(_stopped("the server is stopping"))
        self._queued.clear()
        self._running.clear()
        self._pool.stop()  # type: ignore[no-untyped-call]  # pebble has no types there.
        self._pool.join()

    def ask(self, choice: Choice) -> SearchEntry:
        """Return the search of a choice; start or queue it if it is new.

        Raises:
            QueueFullError: if the queue is full.
        """
        found = self._known.get(choice) or self._running.get(choice)
        if found is None:
            found = self._queued.get(choice) or self._enqueue(choice)
            if self._warm:
                self._next.clear()
                self._next.extend(neighbour_choices(choice))
        found.requested, found.requested_at = True, time.monotonic()
        self._pump()
        return found

    def known(self, choice: Choice) -> SearchEntry | None:
        """Return the finished search of a choice; None if there is none. Never starts one."""
        return self._known.get(choice)

    @property
    def state(self) -> dict[str, str | int]:
        """Whether searches are accepted ("ok", "busy" or "stopping"), and how many run and wait."""
        if self._closed or self.ending or not self._pool.active:
            status = "stopping"
        else:
            status = "busy" if len(self._queued) >= self._queue_size else "ok"
        return {"status": status, "workers": self.workers, "running": len(self._running), "waiting": len(self._queued)}

    def _enqueue(self, choice: Choice) -> SearchEntry:
        self._drop_abandoned()
        if self._closed or len(self._queued) >= self._queue_size:
            waiting = len(self._queued)
            raise QueueFullError(waiting, max(1, round(waiting * self._seconds / self.workers)))
        entry = self._queued[choice] = SearchEntry(choice)
        return entry

    async def wait(self, entry: SearchEntry, seconds: float) -> bool:
        """Wait up to `seconds` and return True if the search is done; waiting prevents that it is dropped."""
        entry.waiting += 1
        try:
            await asyncio.wait_for(entry.done.wait(), seconds)
        except TimeoutError:
            pass
        finally:
            entry.waiting -= 1
            entry.requested_at = time.monotonic()
        return entry.state == "done"

    def _drop_abandoned(self) -> None:
        now = time.monotonic()
        for entry in list(self._queued.values()):
            if not entry.waiting and now - entry.requested_at > ABANDONED_S:
                del self._queued[entry.choice]
                entry.finish(_stopped("no request waited for it"))

    def _pump(self) -> None:
        """Start queued searches, and idle ones, on free workers."""
        if self._closed or self._loop is None:
            return
        self._drop_abandoned()
        waited = sorted(self._queued.values(), key=lambda entry: entry.waiting == 0)
        for entry in waited[: self.workers - len(self._running)]:
            del self._queued[entry.choice]
            self._start(entry)
        # Idle searches leave one of several workers free for the next request.
        spare = max(1, self.workers - 1)
        while not self._queued and len(self._running) < spare and (choice := self._next_idle_choice()) is not None:
            self._start(SearchEntry(choice, requested=False))

    def _next_idle_choice(self) -> Choice | None:
        candidates: Iterable[Choice] = (self._next.popleft() for _ in range(len(self._next)))
        for source in (candidates, self._popular):
            for choice in source:
                if choice not in self._known and choice not in self._running:
                    return choice
        return None

    def _start(self, entry: SearchEntry) -> None:
        entry.state = "running"
        self._running[entry.choice] = entry
        began = time.monotonic()
        limit = self._limit_s if entry.requested else min(self._limit_s, IDLE_LIMIT_S)
        future = self._pool.schedule(search_choice, args=(entry.choice,), timeout=limit)

        def notify(done: Future[WorkerResult]) -> None:
            if not self._closed and self._loop is not None:
                self._loop.call_soon_threadsafe(self._finish, entry, done, time.monotonic() - began, limit)

        future.add_done_callback(notify)

    def _finish(self, entry: SearchEntry, future: Future[WorkerResult], seconds: float, limit_s: float) -> None:
        if self._closed:
            return
        del self._running[entry.choice]
        try:
            found = future.result()
            self._seconds += (seconds - self._seconds) / 8
        except TimeoutError:
            if limit_s < self._limit_s:
                self._give_up(entry)
                return
            found = _stopped(f"the search was stopped after {limit_s:g} s: make a smaller choice")
        except Exception as error:  # Any failure of a worker must reach the waiting requests.
            found = _stopped(f"the search failed: {type(error).__name__}")
        entry.finish(found)
        self._known[entry.choice] = entry
        self._pump()

    def _give_up(self, entry: SearchEntry) -> None:
        """Queue an idle search that reached its time limit again if a user has requested it in the meantime."""
        if entry.requested:
            entry.state = "queued"
            self._queued[entry.choice] = entry
        self._pump()


def _stopped(message: str) -> WorkerResult:
    return WorkerResult(Outcome(state="stopped", message=message).model_dump_json().encode(), None)
