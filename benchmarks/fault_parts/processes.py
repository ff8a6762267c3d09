"""Faults of processes: killed, stopped, asked to end, out of memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .trial import PROGRAM, Outcome, Trial, is_running, last_line, model

_STARTING_S = 61.0
"""Seconds after which buffers that nobody uses are not those of a run that starts."""
_ALLOWED_BYTES = 1000 * 2**20
"""Less than two ranks of this model need."""


def killed_while_starting(folder: Path) -> Outcome:
    """A rank is killed before its first step."""
    trial = Trial(folder)
    with contextlib.closing(trial):
        trial.launch()
        trial.wait(lambda: all(trial.progress(rank) for rank in range(2)))
        trial.note_processes()
        return _kill(trial, 1)


@contextlib.contextmanager
def _training(folder: Path, *words: object) -> Iterator[Trial]:
    """Launch a run, and end what is left of it after the block; the ranks are in the middle of training."""
    trial = Trial(folder)
    with contextlib.closing(trial):
        trial.launch(*words)
        trial.wait_for_step(12)
        trial.note_port()
        yield trial


def killed_while_training(folder: Path) -> Outcome:
    """Rank 1 is killed in the middle of a step."""
    with _training(folder) as trial:
        return _kill(trial, 1)


def killed_first_rank(folder: Path) -> Outcome:
    """Rank 0, which writes the metrics, is killed in the middle of a step."""
    with _training(folder) as trial:
        return _kill(trial, 0)


def killed_while_saving(folder: Path) -> Outcome:
    """A rank is killed while a checkpoint is written."""
    trial = Trial(folder, checkpoint_steps=2)
    with contextlib.closing(trial):
        trial.launch()
        trial.wait_for_saving()
        return _kill(trial, 1)


def _kill(trial: Trial, rank: int) -> Outcome:
    began = time.monotonic()
    os.kill(trial.pid(rank), signal.SIGKILL)
    return trial.end(began)


def killed_launcher(folder: Path) -> Outcome:
    """The launcher is killed: nobody is left to say anything, so `translution status` does."""
    with _training(folder) as trial:
        assert trial.process is not None
        began = time.monotonic()
        trial.process.kill()
        trial.process.wait()
        while any(is_running(trial.pid(rank)) for rank in range(2)):
            time.sleep(0.1)
        seconds = time.monotonic() - began
        return trial.outcome(seconds, *_status(trial))


def killed_together(folder: Path) -> Outcome:
    """The launcher and its ranks are killed at once; the next launch clears what they left in shared memory."""
    with _training(folder) as trial:
        assert trial.process is not None
        launcher = os.getpgid(trial.pid(0))
        began = time.monotonic()
        trial.process.kill()
        os.killpg(launcher, signal.SIGKILL)
        trial.process.wait()
        while any(is_running(trial.pid(rank)) for rank in range(2)):
            time.sleep(0.1)
        seconds = time.monotonic() - began
        code, said = _status(trial)
        time.sleep(_STARTING_S)
        trial.command("preflight", trial.plan)
        return trial.outcome(seconds, code, said)


def _status(trial: Trial) -> tuple[int, str]:
    """Return the exit code and the last line of the run's status."""
    done = subprocess.run([*PROGRAM, "status", str(trial.run)], capture_output=True, text=True)
    return done.returncode, last_line(done.stdout)


def stopped(folder: Path) -> Outcome:
    """A signal stops rank 1."""
    with _training(folder, "--hang-minutes", 0.25) as trial:
        began = time.monotonic()
        os.kill(trial.pid(1), signal.SIGSTOP)
        return trial.end(began)


def stopped_for_ever(folder: Path) -> Outcome:
    """Rank 1 is stopped, as by a debugger, and does not go on when it is told to."""
    with _training(folder, "--hang-minutes", 0.25) as trial:
        began = time.monotonic()
        with _debugger(trial.pid(1)):
            return trial.end(began)


@contextlib.contextmanager
def _debugger(pid: int) -> Iterator[None]:
    """Stop a process as a debugger does; a signal to go on has no effect."""
    program = (
        "import ctypes, os, sys, time\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "pid = int(sys.argv[1])\n"
        "assert libc.ptrace(16, pid, None, None) == 0, os.strerror(ctypes.get_errno())\n"  # PTRACE_ATTACH
        "os.waitpid(pid, 0x40000000)\n"  # __WALL
        "print('stopped', flush=True)\n"
        "time.sleep(600)\n"
    )
    debugger = subprocess.Popen([sys.executable, "-c", program, str(pid)], stdout=subprocess.PIPE)
    assert debugger.stdout is not None
    try:
        assert debugger.stdout.readline() == b"stopped\n"
        yield
    finally:
        debugger.kill()
        debugger.wait()
        debugger.stdout.close()


def interrupted(folder: Path) -> Outcome:
    """The user presses Ctrl-C."""
    return _signalled(folder, signal.SIGINT, None)


def rank_asked_to_end(folder: Path) -> Outcome:
    """One rank receives SIGTERM, as from the owner of its machine."""
    return _signalled(folder, signal.SIGTERM, 1)


def _signalled(folder: Path, number: int, rank: int | None) -> Outcome:
    with _training(folder) as trial:
        assert trial.process is not None
        began = time.monotonic()
        os.kill(trial.process.pid if rank is None else trial.pid(rank), number)
        return trial.end(began)


def out_of_memory(folder: Path) -> Outcome:
    """The kernel kills a rank because its control group has no memory left."""
    trial = Trial(folder, network=model(512))
    with contextlib.closing(trial), _memory_group(_ALLOWED_BYTES) as prefix:
        began = time.monotonic()
        trial.launch("--force", prefix=prefix)
        return trial.end(began)


@contextlib.contextmanager
def _memory_group(limit_bytes: int) -> Iterator[list[str]]:
    """Make a control group with little memory, which needs root; yield a command that runs others in it."""
    root = Path("/sys/fs/cgroup")
    first = (root / "memory").is_dir()  # The first version of control groups.
    group = (root / "memory" if first else root) / f"translution-fault-{os.getpid()}"
    if not first:
        (root / "cgroup.subtree_control").write_text("+memory")
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit_bytes))
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        group.rmdir()


def launched_twice(folder: Path) -> Outcome:
    """A run that still trains is resumed."""
    with _training(folder) as trial:
        began = time.monotonic()
        code, message = trial.command("launch", trial.plan, "--run", trial.run, "--resume", ok=False)
        seconds = time.monotonic() - began
        assert trial.process is not None
        trial.process.send_signal(signal.SIGINT)
        trial.end(began)
        return trial.outcome(seconds, code, message)
