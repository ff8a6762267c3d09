"""The parameters by which the page zooms a timeline, and what its buttons show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import altair as alt

from translution.planner.memory import Timeline

ROOM = 1.12
"""Height of a plot over that of its content: room for labels."""


@dataclass(frozen=True, slots=True)
class Zoom:
    """Names of a chart's parameters, which are the ends of its axes."""

    number: int
    """Number of the chart, which makes the names unique if charts are combined."""

    @property
    def start(self) -> str:
        """Left end of the horizontal axis, 0 to 1."""
        return f"start_{self.number}"

    @property
    def end(self) -> str:
        """Right end of the horizontal axis, 0 to 1."""
        return f"end_{self.number}"

    @property
    def bottom(self) -> str:
        """Lower end of the vertical axis, in its unit."""
        return f"bottom_{self.number}"

    @property
    def top(self) -> str:
        """Upper end of the vertical axis, in its unit."""
        return f"top_{self.number}"

    def params(self, top: float) -> list[alt.Parameter]:
        """Return the parameters with their first values, which show everything up to ``top``."""
        values = {self.start: 0.0, self.end: 1.0, self.bottom: 0.0, self.top: top}
        return [alt.param(name=name, value=value) for name, value in values.items()]

    def scale_x(self) -> alt.Scale:
        """Return the scale of the horizontal axis."""
        return alt.Scale(domainMin=alt.ExprRef(self.start), domainMax=alt.ExprRef(self.end), nice=False, zero=False)

    def scale_y(self) -> alt.Scale:
        """Return the scale of the vertical axis."""
        return alt.Scale(domainMin=alt.ExprRef(self.bottom), domainMax=alt.ExprRef(self.top), nice=False, zero=False)


def zoom_choices(timeline: Timeline, position: Callable[[int], float], top: float, unit: int) -> dict[str, Any]:
    """Return what the page's buttons show: the parts of the horizontal axis, and the ranges of the vertical one."""
    begins = [position(phase.first_event) for phase in timeline.phases]
    ends = [*begins[1:], 1.0]
    parts = [
        {"name": phase.name, "from": begin, "to": end}
        for phase, begin, end in zip(timeline.phases, begins, ends, strict=True)
        if len(timeline.phases) > 1
    ]
    lowest, peak = min(point.total_bytes for point in timeline.points) / unit, timeline.peak_bytes / unit
    ranges = [{"name": "everything", "from": 0.0, "to": top}]
    if top > 1.2 * ROOM * peak:
        ranges.append({"name": "up to the peak", "from": 0.0, "to": ROOM * peak})
    ranges.append({"name": "what changes", "from": lowest, "to": peak + (ROOM - 1) * 2 * (peak - lowest)})
    return {"parts": parts, "ranges": ranges}
