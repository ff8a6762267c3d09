"""SearchPool for many readers at once: one for each choice, in worker processes, remembered, bounded.

All state belongs to the thread of the event loop; workers only get a choice and send JSON back.
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

from translution.planner.common.schema import parse_json
from translution.planner.config.model import OPERATORS
from translution.planner.config.presets import PRESET_NAMES

from .choice import Choice
from .result import Outcome, WorkerResult, search_choice

LIMIT_S = 60.0
"""Longest search; the largest clusters and models that are allowed take some seconds."""
IDLE_LIMIT_S = 5.0
"""Longest search that nobody asked for."""
MAX_QUEUED = 64
MAX_REMEMBERED = 2048
ABANDONED_S = 5.0
"""A search that has not begun, and that nobody has waited for in so long, is dropped."""
WORKER_NICENESS = 10
"""How much workers step back for the process that answers."""
POPULAR_CLUSTERS: tuple[tuple[str, int, int], ...] = (("H100", 8, 1), ("A100-80", 8, 1), ("H100", 8, 2))
"""GPU, how many in a node, and nodes, that are asked for most."""
_OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Outcome)


class QueueFullError(Exception):
    """As many searches wait as may.

    Args:
        waiting: how many.
        retry_s: after which another try is worth while.
    """

    def __init__(self, waiting: int, retry_s: int) -> None:
        super().__init__(f"{waiting} searches wait already: try again in {retry_s} s")
        self.retry_s = retry_s


@dataclass(slots=True, eq=False)
class SearchEntry:
    """One choice's search."""

    choice: Choice
    state: Literal["queued", "running", "done"] = "queued"
    wanted: bool = True
    """Whether a reader asked for it, rather than idle time."""
    waiting: int = 0
    asked_at: float = field(default_factory=time.monotonic)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    packed_outcome: bytes = b""
    packed_plan: bytes | None = None

    @property
    def outcome(self) -> Outcome:
        """How far it is."""
        if self.state != "done":
            return Outcome(state="searching")
        return parse_json(_OUTCOME, zlib.decompress(self.packed_outcome), "outcome")

    @property
    def plan(self) -> bytes | None:
        """The plan as JSON, if one was found."""
        return None if self.packed_plan is None else zlib.decompress(self.packed_plan)

    def finish(self, found: WorkerResult) -> None:
        """Keep what was found and tell who waits."""
        self.packed_outcome = zlib.compress(found.outcome)
        self.packed_plan = None if found.plan is None else zlib.compress(found.plan)
        self.state = "done"
        self.done.set()


def popular_choices() -> Iterator[Choice]:
    """What is searched while nobody asks: every preset with every operator on the clusters asked for most."""
    start = Choice()
    for gpu, gpus, nodes in POPULAR_CLUSTERS:
        for operator in OPERATORS:
            for model in PRESET_NAMES:
                yield start.but(model=model, operator=operator, gpu=gpu, gpus=gpus, nodes=nodes)


def neighbour_choices(choice: Choice) -> Iterator[Choice]:
    """What a reader may ask for next: the choice with one of its main fields otherwise."""
    # Roles, ranks and windows of one operator may not suit another.
    if {"window", "other_layers"}.isdisjoint(choice.changed):
        yield from (choice.but(operator=operator) for operator in OPERATORS if operator != choice.operator)
    yield from (choice.but(nodes=nodes) for nodes in (2 * choice.nodes, choice.nodes // 2) if 1 <= nodes <= 512)
    if {"dim", "depth", "heads", "image", "patch", "context"}.isdisjoint(choice.changed):
        kind, _, cut = choice.model.partition("/")
        family = kind.partition("-")[0]
        for model in PRESET_NAMES:
            if model != choice.model and (model.startswith(f"{kind}/") or _alike(model, family, cut)):
                yield choice.but(model=model)
    yield from (choice.but(minimize=what) for what in ("time", "nodes", "cost", "memory") if what != choice.minimize)


def _alike(model: str, family: str, cut: str) -> bool:
    return model.startswith(f"{family}-") and model.endswith(f"/{cut}")


def _begin() -> None:
    os.nice(WORKER_NICENESS)


class SearchPool:
    """Starts searches, remembers what they found, and searches what may be asked for next.

    Args:
        workers: processes that search.
        warm: use idle time.
        limit_s: longest search.
        queue: searches that may wait.
    """

    def __init__(self, workers: int, *, warm: bool = True, limit_s: float = LIMIT_S, queue: int = MAX_QUEUED) -> None:
        self.workers, self._limit_s, self._queue_size = workers, limit_s, queue
        self._known: LRUCache[Choice, SearchEntry] = LRUCache(MAX_REMEMBERED)
        self._queued: dict[Choice, SearchEntry] = {}
        self._running: dict[Choice, SearchEntry] = {}
        self._warm = warm
        self._popular: Iterator[Choice] = popular_choices() if warm else iter(())
        self._next: deque[Choice] = deque(maxlen=64)
        self._seconds = 1.0
        """Of a search, lately."""
        self._pool = ProcessPool(workers, initializer=_begin, context=multiprocessing.get_context("spawn"))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self.ending = False
        """Whether nobody should wait any longer."""

    def open(self) -> None:
        """Begin to use idle time; within the event loop."""
        self._loop = asyncio.get_running_loop()
        self._pool.schedule(os.getpid)  # Starts all workers.
        self._pump()

    def close(self) -> None:
        """End all workers; who waits is told that the search is stopped."""
        self._closed = True
        for entry in (*self._queued.values(), *self._running.values()):
            entry.finish(_stopped("the server is ending"))
        self._queued.clear()
        self._running.clear()
        self._pool.stop()  # type: ignore[no-untyped-call]  # pebble has no types there.
        self._pool.join()

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._queued and not self._running

    def ask(self, choice: Choice) -> SearchEntry:
        """The search for a choice, begun or queued if nobody asked before.

        Raises:
            QueueFullError: if too many wait.
        """
        found = self._known.get(choice) or self._running.get(choice)
        if found is None:
            found = self._queued.get(choice) or self._enqueue(choice)
            if self._warm:
                self._next.clear()
                self._next.extend(neighbour_choices(choice))
        found.wanted, found.asked_at = True, time.monotonic()
        self._pump()
        return found

    def _enqueue(self, choice: Choice) -> SearchEntry:
        self._drop_abandoned()
        if self._closed or len(self._queued) >= self._queue_size:
            waiting = len(self._queued)
            raise QueueFullError(waiting, max(1, round(waiting * self._seconds / self.workers)))
        entry = self._queued[choice] = SearchEntry(choice)
        return entry

    async def wait(self, entry: SearchEntry, seconds: float) -> bool:
        """Whether a search is done, after so long at most; while somebody waits it is not dropped."""
        entry.waiting += 1
        try:
            await asyncio.wait_for(entry.done.wait(), seconds)
        except TimeoutError:
            pass
        finally:
            entry.waiting -= 1
            entry.asked_at = time.monotonic()
        return entry.state == "done"

    def _drop_abandoned(self) -> None:
        now = time.monotonic()
        for entry in list(self._queued.values()):
            if not entry.waiting and now - entry.asked_at > ABANDONED_S:
                del self._queued[entry.choice]
                entry.finish(_stopped("nobody waited for it"))

    def _pump(self) -> None:
        """Give idle workers what to do."""
        if self._closed or self._loop is None:
            return
        self._drop_abandoned()
        waited = sorted(self._queued.values(), key=lambda entry: entry.waiting == 0)
        for entry in waited[: self.workers - len(self._running)]:
            del self._queued[entry.choice]
            self._start(entry)
        # One worker stays free for the next reader, where there is more than one.
        spare = max(1, self.workers - 1)
        while not self._queued and len(self._running) < spare and (choice := self._unasked()) is not None:
            self._start(SearchEntry(choice, wanted=False))

    def _unasked(self) -> Choice | None:
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
        limit = self._limit_s if entry.wanted else min(self._limit_s, IDLE_LIMIT_S)
        future = self._pool.schedule(search_choice, args=(entry.choice,), timeout=limit)

        def tell(done: Future[WorkerResult]) -> None:
            if not self._closed and self._loop is not None:
                self._loop.call_soon_threadsafe(self._finish, entry, done, time.monotonic() - began, limit)

        future.add_done_callback(tell)

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
            found = _stopped(f"the search took longer than {limit_s:g} s and was ended: take a smaller choice")
        except Exception as error:  # A worker that died, whatever of.
            found = _stopped(f"the search failed: {type(error).__name__}")
        entry.finish(found)
        self._known[entry.choice] = entry
        self._pump()

    def _give_up(self, entry: SearchEntry) -> None:
        """After an idle search that took too long: begin again if somebody has asked for it meanwhile."""
        if entry.wanted:
            entry.state = "queued"
            self._queued[entry.choice] = entry
        self._pump()


def _stopped(message: str) -> WorkerResult:
    return WorkerResult(Outcome(state="stopped", message=message).model_dump_json().encode(), None)
