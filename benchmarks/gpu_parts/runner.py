"""Runs parts one after the other, each as a process group of its own with a time limit.

A part that fails or outlasts its limit stops no other. Its file keeps what it has found until then, with the end of
its output. The summary is written again after each part.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import read_json, write_json

SUMMARY = "gpu_check.json"
GRACE_SECONDS = 4.0
"""Seconds between asking a part's processes to end and killing them."""
_MARK = "TRANSLUTION_GPU_CHECK_PART"
_MIN_SECONDS = 3.0
"""Parts with less time than this are not started."""
_POLL_SECONDS = 0.1
_OUTPUT_LINES, _OUTPUT_WIDTH = 30, 240


@dataclass(frozen=True)
class Part:
    """A part: a program that writes its findings to ``<name>.json`` in the folder of results."""

    name: str
    limit_seconds: float
    command: tuple[str, ...] = ()
    """The program; `Runner` appends ``--seconds N``, the time that it has."""
    work: Callable[[float], None] | None = None
    """Instead of a program: a function of the seconds that it has, called in a fork of this process."""
    background: bool = False
    """Run next to the parts after it, at a low priority."""


class _Fork:
    """A fork of this process that calls a function, with the methods of `subprocess.Popen` that are used here."""

    def __init__(self, work: Callable[[], None], environment: Mapping[str, str], log: Path) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._run(work, environment, log))

    @staticmethod
    def _run(work: Callable[[], None], environment: Mapping[str, str], log: Path) -> int:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update(environment)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        try:
            work()
        except SystemExit as ended:
            if isinstance(ended.code, str):
                print(ended.code)
            return 0 if ended.code in (None, 0) else 1
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    def poll(self) -> int | None:
        """Return the exit code, or None while the fork runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code once the fork has ended.

        Raises:
            TimeoutExpired: if it runs longer than the timeout.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("fork", timeout or 0.0)
            time.sleep(_POLL_SECONDS / 4)
        return code


def _start(part: Part, seconds: float, environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes] | _Fork:
    """Start a part as the leader of a process group, with its output in a log."""
    if part.work is not None:
        return _Fork(functools.partial(part.work, seconds), environment, log)
    command = [*(["nice", "-n", "10"] if part.background else []), *part.command, "--seconds", f"{seconds:.1f}"]
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def _end_all(process: subprocess.Popen[bytes] | _Fork, mark: str) -> None:
    """End a part's processes: ask its group, and after the grace period kill the group and what has left it.

    Args:
        process: the part's first process, the leader of its group.
        mark: value of the environment variable `_MARK` that all of its processes inherit. Compilers and ranks that
            others start are in groups of their own.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wanted = f"{_MARK}={mark}".encode()
    for variables in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in variables.read_bytes().split(b"\0"):
                os.kill(int(variables.parent.name), signal.SIGKILL)


class _Running:
    """A started part."""

    def __init__(self, part: Part, seconds: float, log: Path, environment: Mapping[str, str]) -> None:
        self.part, self.limit = part, seconds
        self._log = log
        self._began = time.monotonic()
        self.seconds = 0.0
        self.state = "running"
        self._mark = uuid.uuid4().hex
        self._process = _start(part, seconds, {**environment, _MARK: self._mark}, log)

    def poll(self) -> bool:
        """Return True once the part has ended; end it if its time is over."""
        if self.state != "running":
            return True
        code = self._process.poll()
        late = time.monotonic() - self._began >= self.limit
        if code is None and not late:
            return False
        self.end("timed out" if code is None else "ok" if code == 0 else "failed")
        return True

    def end(self, state: str) -> None:
        """End all processes of the part."""
        self.seconds = time.monotonic() - self._began
        _end_all(self._process, self._mark)
        self.state = state

    def output(self) -> list[str]:
        """Return the last lines that the part printed."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
        return [line[:_OUTPUT_WIDTH] for line in lines if line.strip()][-_OUTPUT_LINES:]


def _same(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> bool:
    return before.get(name) == now.get(name)


class Runner:
    """Runs parts and writes their results.

    Args:
        out: folder of the results, which exists.
        about: what the summary says about the machine and the command.
        total_seconds: time for all parts together.
        environment: variables added to this process's environment.
        show: called with one line for each part that ends.
    """

    def __init__(
        self,
        out: Path,
        about: Mapping[str, Any],
        total_seconds: float,
        environment: Mapping[str, str],
        show: Callable[[str], None] = print,
    ) -> None:
        self._out, self._about, self._show = out, dict(about), show
        self._environment = dict(environment)
        self._began = time.monotonic()
        self._total = total_seconds
        self._records: dict[str, dict[str, Any]] = {}
        self._background: list[_Running] = []

    @property
    def left(self) -> float:
        """Seconds until all parts must have ended."""
        return self._total - (time.monotonic() - self._began)

    def run(self, parts: Sequence[Part]) -> bool:
        """Run the parts in order; return True if all of them ended well.

        A part also has the time that those before it left over.
        """
        spare, running = 0.0, None
        self._keep_others({part.name for part in parts})
        for part in parts:  # Nothing of an earlier run is mistaken for a result of this one.
            self._path(part).unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix="translution-gpu-check-") as logs:
            try:
                for part in parts:
                    seconds = min(part.limit_seconds + spare, self.left - GRACE_SECONDS)
                    if seconds < _MIN_SECONDS:
                        self._record(part, "not run", 0.0, max(seconds, 0.0), ["no time was left"])
                        continue
                    running = _Running(part, seconds, Path(logs) / f"{part.name}.log", self._environment)
                    if part.background:
                        self._background.append(running)
                        continue
                    while not running.poll():
                        self._poll_background()
                        time.sleep(_POLL_SECONDS)
                    self._finish(running)
                    spare = max(0.0, part.limit_seconds + spare - running.seconds)
                while self._background:
                    self._poll_background()
                    time.sleep(_POLL_SECONDS)
            finally:
                for one in [*([running] if running else []), *self._background]:
                    if one.state == "running":
                        one.end("stopped")
                        self._finish(one)
        return all(self._records[part.name]["state"] == "ok" for part in parts)

    def _keep_others(self, names: set[str]) -> None:
        """Keep what an earlier run on the same card found in other parts, each with its own command and date."""
        before = read_json(self._out / SUMMARY)
        if all(_same(before, self._about, name) for name in ("device", "small")) and _same(
            before.get("card") or {}, self._about.get("card") or {}, "name"
        ):
            kept = [part for part in before.get("parts", []) if part["name"] not in names]
            self._records = {part["name"]: {"made": before.get("made"), **part} for part in kept}

    def _poll_background(self) -> None:
        for one in list(self._background):
            if self.left < GRACE_SECONDS and one.state == "running":
                one.end("timed out")
            if one.poll():
                self._background.remove(one)
                self._finish(one)

    def _finish(self, running: _Running) -> None:
        lines = running.output()
        self._record(running.part, running.state, running.seconds, running.limit, lines)

    def _path(self, part: Part) -> Path:
        return self._out / f"{part.name}.json"

    def _record(self, part: Part, state: str, seconds: float, limit: float, output: list[str]) -> None:
        for partial in self._out.glob(f".{part.name}.json.*.tmp"):  # The part was killed while it wrote.
            partial.unlink()
        found = read_json(self._path(part))
        record = {
            "name": part.name,
            "state": state,
            "seconds": round(seconds, 2),
            "limit_seconds": round(limit, 2),
            "line": found.get("line", ""),
            "output": [] if state == "ok" else output,
            "data": found.get("data", {}),
            "made": self._about.get("made"),
        }
        self._records[part.name] = record
        write_json(self._path(part), record)
        summary = {**self._about, "seconds": round(time.monotonic() - self._began, 2)}
        write_json(self._out / SUMMARY, {**summary, "parts": list(self._records.values())})
        reason = f" ({output[-1]})" if state in ("failed", "not run") and output else ""
        self._show(f"{part.name}: {seconds:.1f} s, {state}{reason}{': ' if record['line'] else ''}{record['line']}")
