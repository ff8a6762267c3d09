"""What is live on one tier over a training step, made small enough to draw.

A step of a large model allocates and frees a hundred thousand times. Here these events become a few
hundred points, each showing the highest moment of the events it stands for, so no peak is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from pydantic import model_validator

from ..common.schema import Schema, stored_as
from ..simulator.core.storage import Event

POINTS = 1000
"""As many as a picture has pixels, about."""


class TimelinePhase(Schema):
    """Consecutive events of one phase."""

    name: str
    first_event: int
    event_count: int
    peak_bytes: int
    """The most that was live within it, what it found when it began included."""


class TimelinePoint(Schema):
    """Consecutive events, shown by the moment at which most was live."""

    first_event: int
    """Events before these."""
    phase: str
    site: str = stored_as("moment")
    live_bytes: tuple[int, ...]
    """What was live then, in the order of the categories."""

    @property
    def total_bytes(self) -> int:
        """All that was live then."""
        return sum(self.live_bytes)


class Timeline(Schema):
    """The live bytes of one tier, by category, over a step."""

    categories: tuple[str, ...]
    """Those of which anything lives at any point, the largest at the peak first."""
    event_count: int
    phases: tuple[TimelinePhase, ...]
    points: tuple[TimelinePoint, ...]
    """In the order of the events; at least one."""
    peak_point: int
    """Which point is the peak of the step; the first, if there are several."""

    @model_validator(mode="after")
    def _check(self) -> Timeline:
        if not 0 <= self.peak_point < len(self.points):
            raise ValueError(f"peak_point: {self.peak_point} is not allowed: must be below {len(self.points)}")
        if any(len(point.live_bytes) != len(self.categories) for point in self.points):
            raise ValueError(f"points: live_bytes is not allowed: must hold {len(self.categories)} sizes")
        return self

    @property
    def peak(self) -> TimelinePoint:
        """The highest point, which is exact."""
        return self.points[self.peak_point]

    @property
    def peak_bytes(self) -> int:
        """The most that is ever live."""
        return self.peak.total_bytes


class _Account:
    """Runs through events and keeps what is live."""

    def __init__(self, events: Sequence[Event], initial: Mapping[str, int]) -> None:
        self.names = list(dict.fromkeys((*initial, *(event[2] for event in events))))
        self.live = [initial.get(name, 0) for name in self.names]
        self._index = {name: number for number, name in enumerate(self.names)}
        self._events = events

    def peak(self, start: int, end: int, *, before: bool) -> tuple[int, int, list[int]]:
        """Take the events from start to end.

        Args:
            start, end: the first event and the one after the last.
            before: whether the state before the first counts too.

        Returns:
            The most that was live, after which event, and what it was made of.

        Raises:
            ValueError: if more of a category is freed than is live.
        """
        live, index, total = self.live, self._index, sum(self.live)
        best, best_at, shown = total if before else -1, start, live.copy()
        for number, (_, _, what, delta) in enumerate(self._events[start:end], start):
            category = index[what]
            size = live[category] = live[category] + delta
            total += delta
            if size < 0:
                raise ValueError(f"event {number}: {what}: {-size} bytes more are freed than are live")
            if total > best:
                best, best_at, shown = total, number, live.copy()
        return best, best_at, shown


def _cut(start: int, end: int, length: int) -> list[tuple[int, int]]:
    """Pieces of that length, the last one shorter."""
    return [(first, min(first + length, end)) for first in range(start, end, length)]


def make_timeline(
    events: Sequence[Event], initial_bytes: Mapping[str, int] | None = None, *, points: int = POINTS
) -> Timeline:
    """The timeline of recorded events; its peak, and the peak of every phase, are exact.

    Each point belongs to one phase.

    Args:
        events: in the order in which they happened.
        initial_bytes: what was live before the first, by category.
        points: at most so many, or two per phase where that is more.

    Raises:
        ValueError: if more of a category is freed than is live.
    """
    starts = [number for number, event in enumerate(events) if not number or event[0] != events[number - 1][0]]
    length = -(-len(events) // max(1, points - len(starts), len(starts)))
    account = _Account(events, initial_bytes or {})
    before = account.live.copy()
    phases: list[TimelinePhase] = []
    found: list[tuple[int, int, list[int]]] = []
    for start, end in pairwise([*starts, len(events)]):
        entry = sum(account.live)
        peaks = []
        for first, last in _cut(start, end, length):
            peak, at, shown = account.peak(first, last, before=first == 0)
            peaks.append(peak)
            found.append((first, at, shown))
        phases.append(
            TimelinePhase(
                name=events[start][0], first_event=start, event_count=end - start, peak_bytes=max(entry, *peaks)
            )
        )
    return _timeline(events, account, tuple(phases), found or [(0, 0, before)])


def _timeline(
    events: Sequence[Event],
    account: _Account,
    phases: tuple[TimelinePhase, ...],
    found: Sequence[tuple[int, int, list[int]]],
) -> Timeline:
    """Put what was found into the order of the categories."""
    totals = [sum(shown) for _, _, shown in found]
    peak_point = totals.index(max(totals))
    at_peak, names = found[peak_point][2], account.names
    highest = [max(sizes) for sizes in zip(*(shown for _, _, shown in found), strict=True)]
    order = sorted(range(len(names)), key=lambda number: (-at_peak[number], -highest[number], names[number]))
    order = [number for number in order if highest[number]]
    labels = events or [("", "", "", 0)]
    return Timeline(
        categories=tuple(names[number] for number in order),
        event_count=len(events),
        phases=phases,
        points=tuple(
            TimelinePoint(
                first_event=first,
                phase=labels[at][0],
                site=labels[at][1],
                live_bytes=tuple(shown[number] for number in order),
            )
            for first, at, shown in found
        ),
        peak_point=peak_point,
    )
