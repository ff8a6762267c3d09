"""Waits for events, with one limit for all of them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

PATIENCE_S = 600.0
"""Longest wait for an event. It is reached only by a program that hangs, however busy the machine is."""
Found = TypeVar("Found")


def wait_until(
    look: Callable[[], Found], *, process: subprocess.Popen[Any] | None = None, every_s: float = 0.05
) -> Found:
    """Call `look` until it returns something true, and return that.

    Args:
        look: the question.
        process: a process that must be alive meanwhile.
        every_s: seconds between two calls.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not (found := look()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{found!r} after {PATIENCE_S:.0f} s"
        time.sleep(every_s)
    return found
