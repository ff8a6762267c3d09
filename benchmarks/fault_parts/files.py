"""Faults of files and drives: full, read-only, slow, deleted, damaged, exchanged."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .trial import PATIENCE_S, PROGRAM, Outcome, Trial, model

_FSYNC = """\
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int fsync(int file) {
    const char *rank = getenv("RANK");
    if (rank && !strcmp(rank, "1")) sleep(atoi(getenv("SLOW_FSYNC_SECONDS")));
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(file);
}
"""
"""A library in which rank 1 waits before each flush, as on a slow drive."""


@contextlib.contextmanager
def _mounted(folder: Path, *words: str) -> Iterator[None]:
    """Mount a file system in memory, which needs root; `words` are its options."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", *words, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def full_drive(folder: Path) -> Outcome:
    """The drive of the run folder is full when a checkpoint is saved."""
    with _mounted(folder / "run", "-o", "size=64m"):
        # The launcher wants to create the run folder itself.
        trial = Trial(folder)
        trial.run = folder / "run" / "run"
        with contextlib.closing(trial):
            trial.launch()
            trial.wait_for_step(12)
            trial.wait(lambda: trial.saved_step() >= 5)
            trial.note_port()
            began = time.monotonic()
            free = os.statvfs(folder / "run").f_bavail * os.statvfs(folder / "run").f_frsize
            (folder / "run" / "other").write_bytes(bytes(free - 2**18))
            return trial.end(began)


def read_only_folder(folder: Path) -> Outcome:
    """The folder of checkpoints becomes read-only."""
    trial = Trial(folder)
    with contextlib.closing(trial):
        trial.launch()
        trial.wait(lambda: trial.saved_step() >= 5)
        trial.wait_for_step(12)
        trial.note_port()
        checkpoints = str(trial.run / "checkpoint")
        began = time.monotonic()
        subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,ro,bind", checkpoints], check=True)
            return trial.end(began)
        finally:
            subprocess.run(["umount", "--lazy", checkpoints], check=True)


def slow_drive(folder: Path) -> Outcome:
    """Rank 1 needs longer to flush its checkpoint than collectives usually wait."""
    library = folder / "slow.so"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "slow.c").write_text(_FSYNC)
    subprocess.run(["gcc", "-shared", "-fPIC", str(folder / "slow.c"), "-o", str(library), "-ldl"], check=True)
    trial = Trial(folder, steps=4, checkpoint_steps=0)
    with contextlib.closing(trial):
        variables = {"LD_PRELOAD": str(library), "SLOW_FSYNC_SECONDS": "25", "DEEPSPEED_TIMEOUT": "1"}
        trial.launch(environment=variables)
        trial.wait(lambda: any((trial.run / "checkpoint").glob(".*.partial")))
        trial.note_processes()
        return trial.end(time.monotonic())


def swap_file_deleted(folder: Path) -> Outcome:
    """A swap file of an optimizer on NVMe is deleted."""
    return _with_swap(folder, lambda path: path.unlink())


def swap_file_changed(folder: Path) -> Outcome:
    """A swap file of an optimizer on NVMe changes on the drive; the run checks swap files."""
    return _with_swap(folder, _flip, "--check-swap")


def _with_swap(folder: Path, change: Callable[[Path], None], *words: str) -> Outcome:
    nvme = folder / "nvme"
    nvme.mkdir(parents=True)
    trial = Trial(folder, "--offload", "nvme", "--nvme-path", nvme, network=model(192))
    with contextlib.closing(trial):
        trial.launch(*words)
        trial.wait_for_step(7)
        trial.note_port()
        files = [path for path in nvme.rglob("*.swp") if "optimizer" in str(path) and "rank1" in str(path)]
        largest = max(files, key=lambda path: path.stat().st_size)
        assert trial.process is not None
        began = time.monotonic()
        # Until it is noticed: a change before the next write does no harm.
        while trial.process.poll() is None and time.monotonic() - began < PATIENCE_S:
            with contextlib.suppress(FileNotFoundError):
                change(largest)
            time.sleep(0.05)
        return trial.end(began)


def _flip(path: Path) -> None:
    """Change one byte in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        before = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([before[0] ^ 64]))


def damaged(folder: Path) -> Outcome:
    """One bit of a checkpoint changes."""

    def change(trial: Trial) -> None:
        _flip(_largest(trial))

    return _resume_after(folder, change)


def exchanged(folder: Path) -> Outcome:
    """The optimizer files of two ranks are exchanged."""

    def change(trial: Trial) -> None:
        first, second = sorted(_newest(trial).glob("*_optim_states.pt"))
        first.rename(first.with_suffix(".x"))
        second.rename(first)
        first.with_suffix(".x").rename(second)

    return _resume_after(folder, change)


def file_deleted(folder: Path) -> Outcome:
    """A file of a checkpoint is deleted."""
    return _resume_after(folder, lambda trial: _largest(trial).unlink())


def manifest_cut(folder: Path) -> Outcome:
    """The manifest of a checkpoint is empty, as after a power loss on some file systems."""
    return _resume_after(folder, lambda trial: (_newest(trial) / "manifest.json").write_text(""))


def metrics_damaged(folder: Path) -> Outcome:
    """The metrics hold half a line and zeros; this loses nothing, and the run is resumed."""

    def change(trial: Trial) -> None:
        with (trial.run / "metrics.jsonl").open("ab") as file:
            file.write(b'{"event": "st\x00\x00\x00')

    return _resume_after(folder, change)


def _newest(trial: Trial) -> Path:
    return trial.run / "checkpoint" / f"step_{trial.saved_step()}"


def _largest(trial: Trial) -> Path:
    """Return the largest file of the newest checkpoint."""
    return max(_newest(trial).rglob("*_states.pt"), key=lambda path: path.stat().st_size)


def _resume_after(folder: Path, change: Callable[[Trial], object]) -> Outcome:
    """Interrupt a run that has two checkpoints, change a file, and resume it."""
    shutil.copytree(_interrupted_run(), folder, dirs_exist_ok=True)
    return _resume(Trial(folder, planned=True), change)


@functools.cache
def _interrupted_run() -> Path:
    """Return the folder of a trial whose run has been interrupted; it exists until this process ends."""
    parent = tempfile.mkdtemp(prefix="translution-fault-")
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    folder = Path(parent) / "trial"
    _interrupt(Trial(folder, "--train", "keep_checkpoints=2", steps=16))
    return folder


def _interrupt(trial: Trial) -> None:
    with contextlib.closing(trial):
        trial.launch()
        trial.wait_for_step(12)
        trial.note_port()
        assert trial.process is not None
        trial.process.send_signal(signal.SIGINT)
        trial.end(time.monotonic())


def _resume(trial: Trial, change: Callable[[Trial], object]) -> Outcome:
    """Change something and resume the run."""
    with contextlib.closing(trial):
        change(trial)
        began = time.monotonic()
        code, message = trial.command("launch", trial.plan, "--run", trial.run, "--resume", ok=False)
        return trial.outcome(time.monotonic() - began, code, message)


def data_exchanged(folder: Path) -> Outcome:
    """The training data changes between saving and resuming, and its size does not."""
    data = folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    subprocess.run([*PROGRAM, "prepare", str(folder / "text.txt"), "--out", str(data)], check=True, capture_output=True)

    def change(_: Trial) -> None:
        path = data / "train.bin"
        path.write_bytes(path.read_bytes()[::-1])

    network = "family: gpt\ncontext: 16\nvocabulary: 256\ndim: 64\ndepth: 1\nheads: 2\n"
    trial = Trial(folder, "--train", f"data_path={data}", steps=16, network=network, data="tokens")
    _interrupt(trial)
    return _resume(trial, change)
