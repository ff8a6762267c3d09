"""A rank that is asked to end saves first: SIGTERM, or the SIGUSR1 that Slurm sends before a job's limit."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from translution.planner.common.errors import InterruptedRunError, RunFailedError

SECONDS_TO_STEP_END = 20.0
"""After SIGTERM, whose sender will not wait for long, a rank that reaches no step's end by then gives up.
It may wait for ranks that are gone."""
EXIT_CODE = 128 + signal.SIGTERM


class StopRequest:
    """Notes a signal; read between steps."""

    def __init__(self) -> None:
        self.name: str | None = None
        """Of the signal, once one has come."""
        self._noticed = threading.Event()

    def notice(self) -> None:
        """The rank has come to a step's end and will save."""
        self._noticed.set()

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name

    def expect(self) -> None:
        """Note SIGUSR1 from now on, while the rank is still being built: it saves after its first step.

        SIGTERM still ends it at once: there is nothing to save yet.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self._handle)

    def _watch(self, wakeup: int) -> None:
        # The main thread may sit in a collective, where Python handles no signal; this thread is told at once.
        while data := os.read(wakeup, 1):
            if data[0] == signal.SIGTERM and not self._noticed.wait(SECONDS_TO_STEP_END):
                os._exit(EXIT_CODE)
        os.close(wakeup)

    @contextlib.contextmanager
    def watching(self) -> Iterator[StopRequest]:
        """Take the signals over while the block runs; only in the main thread, elsewhere nothing is done."""
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
            self._noticed.set()  # What comes after the steps is not cut short.
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            os.close(write)


class IntervalTimer:
    """Tells when so many minutes have gone by."""

    def __init__(self, minutes: float) -> None:
        self._seconds, self._since = minutes * 60, time.monotonic()

    def due(self) -> bool:
        """Whether they have, since the start or the last `restart`."""
        return self._seconds > 0 and time.monotonic() - self._since >= self._seconds

    def restart(self) -> None:
        """Begin anew."""
        self._since = time.monotonic()


class EndedError(BaseException):
    """A signal asks this process to end; no ``except Exception`` may keep it."""


@contextlib.contextmanager
def ending_signals_raise() -> Iterator[None]:
    """SIGTERM, SIGHUP and SIGUSR1 unwind the stack as Ctrl-C does, so that the ranks are ended too."""

    def end(number: int, _: object) -> None:
        raise EndedError(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may set handlers; there the caller has to.
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
