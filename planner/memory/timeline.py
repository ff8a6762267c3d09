"""Live bytes of one tier over a training step, downsampled for a picture.

A step of a large model has a hundred thousand allocations and frees. They are reduced to a few hundred points; each
point shows the peak of its events, so that no peak is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from pydantic import model_validator

from ..common.schema import Schema, stored_as
from ..simulator.core import Event

POINTS = 1000
"""Default number of points: about the number of pixels of a picture."""


class TimelinePhase(Schema):
    """Consecutive events of one phase."""

    name: str
    first_event: int
    event_count: int
    peak_bytes: int
    """Peak live bytes within the phase, including what was live when it began."""


class TimelinePoint(Schema):
    """Consecutive events, represented by the state with the most live bytes."""

    first_event: int
    """Number of the first event."""
    phase: str
    site: str = stored_as("moment")
    live_bytes: tuple[int, ...]
    """Live bytes by category, in the order of `Timeline.categories`."""

    @property
    def total_bytes(self) -> int:
        """Live bytes of all categories."""
        return sum(self.live_bytes)


class Timeline(Schema):
    """Live bytes of one tier over a step, by category."""

    categories: tuple[str, ...]
    """Categories that are ever live, sorted by their size at the peak."""
    event_count: int
    phases: tuple[TimelinePhase, ...]
    points: tuple[TimelinePoint, ...]
    """Points in the order of the events; at least one."""
    peak_point: int
    """Index of the step's peak; the first one if there are several."""

    @model_validator(mode="after")
    def _check(self) -> Timeline:
        if not 0 <= self.peak_point < len(self.points):
            raise ValueError(f"peak_point: {self.peak_point} is not allowed: must be below {len(self.points)}")
        if any(len(point.live_bytes) != len(self.categories) for point in self.points):
            raise ValueError(f"points: live_bytes is not allowed: must hold {len(self.categories)} sizes")
        return self

    @property
    def peak(self) -> TimelinePoint:
        """The point with the most live bytes, which is exact."""
        return self.points[self.peak_point]

    @property
    def peak_bytes(self) -> int:
        """Peak live bytes."""
        return self.peak.total_bytes


class _Account:
    """Live bytes by category while events are read."""

    def __init__(self, events: Sequence[Event], initial: Mapping[str, int]) -> None:
        self.names = list(dict.fromkeys((*initial, *(event[2] for event in events))))
        self.live = [initial.get(name, 0) for name in self.names]
        self._index = {name: number for number, name in enumerate(self.names)}
        self._events = events

    def peak(self, start: int, end: int, *, before: bool) -> tuple[int, int, list[int]]:
        """Read the events from start to end.

        Args:
            start, end: number of the first event, and of the event after the last.
            before: also count the state before the first event.

        Returns:
            Peak live bytes, the number of the event that reached them, and live bytes by category.

        Raises:
            ValueError: if an event frees more of a category than is live.
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
    """Ranges of ``length`` events; the last one may be shorter."""
    return [(first, min(first + length, end)) for first in range(start, end, length)]


def make_timeline(
    events: Sequence[Event], initial_bytes: Mapping[str, int] | None = None, *, points: int = POINTS
) -> Timeline:
    """Build the timeline of recorded events. Its peak and the peak of every phase are exact.

    Each point belongs to one phase.

    Args:
        events: events in order.
        initial_bytes: live bytes before the first event, by category.
        points: maximum number of points; at least two per phase are made.

    Raises:
        ValueError: if an event frees more of a category than is live.
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
    """Sort the categories and build the timeline."""
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
