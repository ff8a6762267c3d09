"""A run of two CPU ranks that is disturbed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE_S = 300.0
"""Longest wait for anything: it is reached only by a program that hangs."""
LIMIT_S = 60.0
"""Seconds within which a fault must end the run, if it must end it."""


def model(width: int) -> str:
    """Return the YAML of a small network."""
    return f"family: vit\nimage: 16\npatch: 4\nchannels: 1\nclasses: 10\ndim: {width}\ndepth: 2\nheads: 2\n"


PROGRAM = (sys.executable, "-m", "translution.cli")
"""The command line of the toolkit."""


@dataclass(frozen=True)
class Outcome:
    """How a disturbed run ended."""

    seconds: float
    """From the fault to the end of the launcher."""
    exit_code: int
    message: str
    """Its last line on stderr."""
    lost_steps: int
    """Steps done that no checkpoint holds."""
    left: tuple[str, ...]
    """Processes and files that are left."""


class Trial:
    """A plan with runs.

    Args:
        folder: an empty folder; the plan and its runs lie in it.
        steps: steps of the plan.
        checkpoint_steps: steps between two checkpoints.
        options: more words for `translution plan`.
        network: the model's YAML; by default a small one.
        data: the data it is trained on.
        planned: the folder has the plan already.
    """

    def __init__(
        self,
        folder: Path,
        *options: object,
        steps: int = 4000,
        checkpoint_steps: int = 5,
        network: str = "",
        data: str = "synthetic",
        planned: bool = False,
    ) -> None:
        self.folder, self.plan, self.run = folder, folder / "plan", folder / "run"
        self.process: subprocess.Popen[str] | None = None
        self._pids: list[int] = []
        if planned:
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.yaml").write_text(network or model(64))
        words = ["plan", folder / "model.yaml", "--cluster", "cpu:2", "--stage", "3", "--micro-batch", "4"]
        words += ["--steps", steps, "--train", f"checkpoint_steps={checkpoint_steps}", "--data", data]
        words += [] if "--offload" in options else ["--offload", "none"]
        self.command(*words, *options, "--out", self.plan)

    def command(self, *words: object, ok: bool = True) -> tuple[int, str]:
        """Run a command of the toolkit; return its exit code and its last line on stderr."""
        done = subprocess.run([*PROGRAM, *map(str, words)], capture_output=True, text=True)
        if ok and done.returncode:
            raise RuntimeError(f"{words}: {done.stderr}")
        return done.returncode, last_line(done.stderr)

    def launch(self, *words: object, environment: Mapping[str, str] | None = None, prefix: Sequence[str] = ()) -> None:
        """Start the run, or resume it; `prefix` is a command that runs the launcher."""
        command = [*prefix, *PROGRAM, "launch", str(self.plan), "--run", str(self.run), *map(str, words)]
        with (self.folder / "out.log").open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
            )

    def progress(self, rank: int) -> dict[str, Any]:
        """Return what a rank says about itself; empty before it does."""
        try:
            found: dict[str, Any] = json.loads((self.run / "control" / f"rank_{rank}.progress").read_bytes())
        except (OSError, ValueError):
            return {}
        return found

    def pid(self, rank: int) -> int:
        """Return the process id of a rank that has started."""
        return int(self.progress(rank)["pid"])

    def wait(self, look: Callable[[], object], every_s: float = 0.02) -> None:
        """Wait until something is true, as long as the run goes on."""
        assert self.process is not None
        deadline = time.monotonic() + PATIENCE_S
        while not look():
            if self.process.poll() is not None:
                raise RuntimeError(f"the run ended early: {self.process.communicate()[1]}")
            if time.monotonic() > deadline:
                raise RuntimeError("the run does not go on")
            time.sleep(every_s)

    def wait_for_step(self, step: int) -> None:
        """Wait until both ranks have begun a step."""
        self.wait(lambda: all(self.progress(rank).get("step", 0) >= step for rank in range(2)))
        self.note_processes()

    def wait_for_saving(self) -> None:
        """Wait until a checkpoint is being written after another one is complete."""
        self.wait(lambda: self.saved_step() and any((self.run / "checkpoint").glob(".*.partial")), every_s=0.002)
        self.note_processes()

    def note_processes(self) -> None:
        """Remember the processes of the ranks, none of which may be left."""
        self._pids = [self.pid(rank) for rank in range(2)]

    def saved_step(self) -> int:
        """Return the step of the newest complete checkpoint."""
        manifests = (self.run / "checkpoint").glob("step_*/manifest.json")
        return max((int(path.parent.name.partition("_")[2]) for path in manifests), default=0)

    def end(self, since: float) -> Outcome:
        """Wait for the end of the launcher.

        Args:
            since: `time.monotonic()` at the fault.
        """
        assert self.process is not None
        _, errors = self.process.communicate(timeout=PATIENCE_S)
        seconds = time.monotonic() - since
        return self.outcome(seconds, self.process.returncode, last_line(errors))

    def outcome(self, seconds: float, exit_code: int, message: str) -> Outcome:
        """Return how the run ended, with what is lost and left."""
        done = max((line["step"] for line in self._metrics() if line["event"] == "step"), default=0)
        return Outcome(seconds, exit_code, self._short(message), done - self.saved_step(), tuple(self.left()))

    def _metrics(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def _short(self, message: str) -> str:
        """Return a message without the folders of this trial and what differs between two trials."""
        text = message.removeprefix("translution: error: ").replace(f"{self.folder}/", "")
        return re.sub(r"\b\d+\.\d+\.\d+\.\d+\]?:\d+", "ADDRESS", text)

    def left(self) -> list[str]:
        """Return the processes, buffers and files that the run has left."""
        found = [f"process of rank {rank}" for rank, pid in enumerate(self._pids) if is_running(pid)]
        found += [path.name for path in self.buffers()]
        nvme = self.folder / "nvme"
        found += ["swap files"] if any(path.is_file() for path in nvme.rglob("*.swp")) else []
        return found + [path.name for path in (self.run / "checkpoint").glob(".*.partial")]

    def buffers(self) -> list[Path]:
        """Return the run's buffers in shared memory."""
        try:
            variables = (self.folder / "port").read_text()
        except OSError:
            return []
        return list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{variables}_*"))

    def note_port(self) -> None:
        """Remember the port of the ranks, by which their buffers are named."""
        variables = Path(f"/proc/{self.pid(0)}/environ").read_bytes().split(b"\0")
        port = next(value for name, _, value in (x.partition(b"=") for x in variables) if name == b"MASTER_PORT")
        (self.folder / "port").write_text(port.decode())

    def close(self) -> None:
        """End what is left of the run."""
        for pid in self._pids:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process is not None and self.process.stderr is not None:
            self.process.stderr.close()
        for path in self.buffers():
            path.unlink(missing_ok=True)


def last_line(text: str) -> str:
    """Return the last line of a text, or nothing."""
    return (text.strip().splitlines() or [""])[-1]


def is_running(pid: int) -> bool:
    """Return True if a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
