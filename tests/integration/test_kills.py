"""Killing a rank at any time ends the launch soon, and the resumed run has the same result."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.chance import repeats, seed
from helpers.runs import run_plan, shared_buffers, write_plan
from helpers.waiting import PATIENCE_S, wait_until

from translution.cli.main import run as run_cli
from translution.distributed.checkpoint.manifest import checkpoint_tags
from translution.distributed.runs.folder import CHECKPOINT, METRICS
from translution.distributed.runs.status import RankStatus, read_statuses
from translution.distributed.runs.watchdog import process_is_alive
from translution.planner.common.machine import usable_cores

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.skipif(usable_cores() < 2, reason="needs two cores"),
]

STEPS = repeats(16)
KILLS = repeats(2)
"""The fault table kills ranks that start and that train; `make fuzz` kills forty times, at all `CONDITIONS`."""
MODEL = {"family": "vit", "image": 8, "patch": 4, "channels": 1, "classes": 10, "dim": 16, "depth": 1, "heads": 2}
OPTIONS = {"steps": STEPS, "micro_batch": 64, "evaluation_samples": 64, "model": MODEL, "learning_rate": 3e-3}

Condition = Callable[[Path, int], bool]
"""True if a run has reached a point of its lifecycle, given the number of metrics lines before the launch."""


def lines(run: Path) -> list[dict[str, object]]:
    text = (run / METRICS).read_text() if (run / METRICS).exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def starting(run: Path, _: int) -> bool:
    return len(living(run)) == 2


def building(run: Path, before: int) -> bool:
    """True while ranks build the model and the engine or load the checkpoint."""
    return starting(run, before) and all(status.state == "started" for status in read_statuses(run))


def stepping(run: Path, before: int) -> bool:
    return sum(line["event"] == "step" for line in lines(run)[before:]) >= 3


def saving(run: Path, before: int) -> bool:
    return stepping(run, before) and any((run / CHECKPOINT).glob(".step_*.partial"))


CONDITIONS: tuple[Condition, ...] = (building, saving, starting, stepping)


def living(run: Path) -> list[RankStatus]:
    return [status for status in read_statuses(run) if process_is_alive(status.pid)] if run.is_dir() else []


def kill_at(folder: Path, run: Path, condition: Condition, delay_s: float, victim: int) -> tuple[str, float, list[int]]:
    """Launch or resume and kill a rank; return the launch's errors, its seconds to end, and the ranks' process IDs.

    None of the run's buffers in /dev/shm may be left.
    """
    words = ["--resume"] if checkpoint_tags(run / CHECKPOINT) else []
    if not words and run.is_dir():
        run.rename(run.with_name(f"{run.name}-{time.monotonic_ns()}"))
    before = len(lines(run))
    command = [sys.executable, "-m", "translution.cli", "launch", str(folder), "--run", str(run), *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: condition(run, before), process=process, every_s=0.005)
        time.sleep(delay_s)
        pids = [status.pid for status in read_statuses(run)]
        buffers = shared_buffers(pids[victim])
        os.kill(pids[victim], signal.SIGKILL)
        killed = time.monotonic()
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert not any(Path("/dev/shm").glob(buffers))
        return errors, time.monotonic() - killed, pids
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("relation_ranks", [1, 2])
def test_a_run_whose_ranks_are_killed_at_any_time_has_the_result_of_an_uninterrupted_one(
    tmp_path: Path, forked_launch: None, relation_ranks: int
) -> None:
    options = OPTIONS | {"relation_parallel": relation_ranks}
    folder = write_plan(tmp_path / "plan", 2, checkpoint_steps=1, **options)
    other = write_plan(tmp_path / "uninterrupted", 2, **options)
    run = folder / "runs" / "killed"
    chosen = seed(20261127)
    chance = random.Random(chosen)
    for number in range(KILLS):
        condition = CONDITIONS[number % len(CONDITIONS)]
        delay_s, victim = chance.uniform(0, 1.0 if condition is starting else 0.1), chance.randrange(2)
        context = f"seed {chosen}, kill {number} of rank {victim} {delay_s:.3f} s after {condition.__name__}"
        try:
            errors, seconds, pids = kill_at(folder, run, condition, delay_s, victim)
        except (ProcessLookupError, FileNotFoundError):
            continue  # The rank had already ended.
        assert seconds < 60, context
        assert errors.startswith("translution: error: "), (context, errors)
        assert errors.count("\n") == 1, (context, errors)
        assert not any(map(process_is_alive, pids)), context
    # The second kill came after three steps, so there is a checkpoint.
    assert run_cli(["launch", str(folder), "--run", str(run), "--resume"]) == 0
    uninterrupted = run_plan(other, 2)

    def losses(folder: Path) -> dict[object, object]:
        return {(line["event"], line["step"]): line["loss"] for line in lines(folder) if "loss" in line}

    assert losses(run) == losses(uninterrupted), f"seed {chosen}"
    assert len(losses(run)) == STEPS + 1
