"""Signals: a rank saves a checkpoint before it ends, and a launcher ends its ranks before it ends.

Ranks are asked to end by SIGTERM, or by the SIGUSR1 that Slurm sends before a job's time limit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from translution.planner.common import InterruptedRunError, RunFailedError

SECONDS_TO_STEP_END = 20.0
"""Seconds after SIGTERM in which a rank must reach the end of its step, or it exits without saving.
It may be waiting for dead ranks, and the sender of a SIGTERM does not wait long."""
EXIT_CODE = 128 + signal.SIGTERM
"""Exit code of a rank that exits without saving."""


class StopRequest:
    """Records the first request to stop; the rank looks at it between steps."""

    def __init__(self) -> None:
        self.name: str | None = None
        """Name of the signal or sender of the request; None before a request."""
        self._noticed = threading.Event()

    def notice(self) -> None:
        """Report that the rank has reached the end of its step and will save."""
        self._noticed.set()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name

    def expect(self) -> None:
        """Record SIGUSR1 from now on, while the model is still being built: the rank saves after its first step.

        SIGTERM still ends the rank at once: there is nothing to save yet.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self._handle)

    def _watch(self, wakeup: int) -> None:
        # In a collective the main thread handles no Python signals; this thread reads them from a pipe at once.
        while data := os.read(wakeup, 1):
            if data[0] == signal.SIGTERM and not self._noticed.wait(SECONDS_TO_STEP_END):
                os._exit(EXIT_CODE)
        os.close(wakeup)

    @contextlib.contextmanager
    def watching(self) -> Iterator[StopRequest]:
        """Record SIGTERM and SIGUSR1 while the block runs; does nothing outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        threading.Thread(target=self._watch, args=(read,), daemon=True).start()
        wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield self
        finally:
            self._noticed.set()  # No time limit applies after the last step.
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            os.close(write)


class IntervalTimer:
    """Reports when an interval has passed.

    Args:
        minutes: length of the interval in minutes; 0 never passes.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds, self._since = minutes * 60, time.monotonic()

    def due(self) -> bool:
        """Return True if the interval has passed since the start or the last `restart`."""
        return self._seconds > 0 and time.monotonic() - self._since >= self._seconds

    def restart(self) -> None:
        """Start the interval again."""
        self._since = time.monotonic()


class EndedError(BaseException):
    """A signal asks this process to end; a BaseException, so that no ``except Exception`` catches it."""


@contextlib.contextmanager
def ending_signals_raise() -> Iterator[None]:
    """Make SIGTERM, SIGHUP and SIGUSR1 unwind the stack as Ctrl-C does, so that the ranks are ended too.

    Raises:
        InterruptedRunError: for Ctrl-C.
        RunFailedError: for one of the signals, named in the message.
    """

    def end(number: int, _: object) -> None:
        raise EndedError(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may set signal handlers.
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    try:
        yield
    except KeyboardInterrupt as error:
        raise InterruptedRunError("; ".join(["interrupted", *map(str, error.args)])) from None
    except EndedError as error:
        raise RunFailedError("; ".join([f"ended by {signal.Signals(error.args[0]).name}", *error.args[1:]])) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
