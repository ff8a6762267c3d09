"""Progress of slow calls: a callback with what is done and what there is to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

OnProgress: TypeAlias = Callable[[int, int], None]
"""Called with the number of finished parts and the number of all parts, which take about equally long."""


def ignore_progress(_: int, __: int) -> None:
    """Do nothing: the default of every `OnProgress`."""
