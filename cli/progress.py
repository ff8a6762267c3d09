"""Progress on stderr: a bar on a terminal, otherwise a line every few seconds, with what is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from translution.planner.common import format_duration

from .output import console

if TYPE_CHECKING:
    from rich.progress import Progress

_QUIET_S = 2.0
"""Seconds without a line at the beginning, where the output is not a terminal."""
_LINE_S = 10.0
"""Seconds between two lines where the output is not a terminal."""


class WorkProgress:
    """Shows how far a slow call is, from when the block is entered.

    Args:
        title: what is being done, such as "comparing".
        unit: what is counted, such as "trials"; empty shows a percentage only.
        clock: seconds; tests replace it.
    """

    def __init__(self, title: str, unit: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._title, self._unit, self._clock = title, unit, clock
        self._began = self._printed = clock()
        self._bar: Progress | None = None
        self._done = 0

    def __enter__(self) -> WorkProgress:
        if sys.stderr.isatty():
            # A tenth of a second of imports, which a command whose output is no terminal does not need.
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", markup=False),
            )
            self._bar = Progress(*columns, console=console(stderr=True), transient=True)
            self._bar.add_task(self._title, total=None, left="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int, total: int) -> None:
        """Show that some more parts, such as bytes, are done.

        Args:
            count: parts that were done since the last call.
            total: all parts.
        """
        self._done += count
        self.show(min(self._done, total), total)

    def show(self, done: int, total: int, text: str = "") -> None:
        """Show that a number of equal parts is done.

        Args:
            done: finished parts.
            total: all parts.
            text: what is being done now.
        """
        now = self._clock()
        elapsed = now - self._began
        left = f"about {_rounded(elapsed * (total - done) / done)} left" if done else ""
        if self._bar is not None:
            title = f"{self._title}: {text}" if text else self._title
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=done, total=max(1, total), description=title, left=left)
        elif elapsed >= _QUIET_S and now - self._printed >= min(_LINE_S, elapsed) and done < total:
            self._printed = now
            count = f"{done:,} of {total:,} {self._unit}" if self._unit else f"{done / total:.0%}"
            parts = [f"{self._title}: {count}", text, f"{_rounded(elapsed)} so far", left]
            print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)


def _rounded(seconds: float) -> str:
    return format_duration(round(seconds) if seconds < 120 else round(seconds / 60) * 60)
