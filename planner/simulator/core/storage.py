"""Simulated storages and the memory that holds them: live bytes, peaks of phases, events."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

Event: TypeAlias = tuple[str, str, str, int]
"""Phase, site in the schedule, category of the storage, and bytes: positive if allocated, negative if freed."""


@dataclass(frozen=True, slots=True)
class Peak:
    """The highest number of live bytes within a phase."""

    total_bytes: int
    live_bytes: dict[str, int]
    """Live bytes at the peak by category."""
    site: str
    """Where in the schedule the peak occurred."""


class MemoryTracker:
    """The live bytes of one memory by category, and the peak of every phase.

    Args:
        record: store every event, for a timeline.
        ignored: categories that are not counted.
    """

    def __init__(self, *, record: bool = False, ignored: frozenset[str] = frozenset()) -> None:
        self._ignored = ignored
        self.live: dict[str, int] = {}
        self.total = 0
        self.site = ""
        self.events: list[Event] | None = [] if record else None
        self.peaks: dict[str, Peak] = {}
        self._phase = ""
        self._peak = -1
        self._peak_site = ""

    def allocate(self, what: str, size: int) -> None:
        """Add live bytes of a category."""
        if what in self._ignored:
            return
        live = self.live
        live[what] = live.get(what, 0) + size
        self.total += size
        if self.events is not None:
            self.events.append((self._phase, self.site, what, size))
        if self.total > self._peak:
            self._peak, self._peak_site = self.total, self.site

    def free(self, what: str, size: int) -> None:
        """Subtract live bytes of a category."""
        if what in self._ignored:
            return
        if self.total == self._peak:
            self._note()
        self.live[what] -= size
        self.total -= size
        if self.events is not None:
            self.events.append((self._phase, self.site, what, -size))

    def _note(self) -> None:
        """Store the composition of the phase's peak; called when bytes are about to be freed after a new peak."""
        noted = self.peaks.get(self._phase)
        if noted is None or noted.total_bytes < self._peak:
            self.peaks[self._phase] = Peak(self._peak, dict(self.live), self._peak_site)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the events of the block to a phase; a phase that occurs again keeps its higher peak."""
        if self.total == self._peak:
            self._note()
        before = self._phase, self._peak, self._peak_site
        earlier = self.peaks.get(name)
        self._phase, self._peak = name, -1 if earlier is None else earlier.total_bytes
        if self.total > self._peak:
            self._peak, self._peak_site = self.total, self.site
            self._note()
        try:
            yield
        finally:
            if self.total == self._peak:
                self._note()
            self._phase, self._peak, self._peak_site = before


class Storage:
    """Bytes that are allocated until the last reference to this object is deleted."""

    __slots__ = ("_memory", "size", "what")

    def __init__(self, memory: MemoryTracker, what: str, size: int) -> None:
        self._memory, self.what, self.size = memory, what, size
        memory.allocate(what, size)

    def is_in(self, memory: MemoryTracker) -> bool:
        """Return True if this storage is allocated in ``memory``."""
        return self._memory is memory

    def __del__(self) -> None:
        self._memory.free(self.what, self.size)
