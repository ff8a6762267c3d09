"""One rank that runs a plan for some steps and measures its memory, without a checkpoint.

A checkpoint of the larger plans would take longer to write than their steps. On a GPU each rank is a process of its
own, with a context of its own. On a CPU it is a fork of the part, which has imported everything.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from translution.distributed.data import DataSource, Samples
from translution.distributed.runs import (
    METRICS,
    MemoryMeasurement,
    RunMode,
    log_path,
    log_to_own_file,
    make_run_folders,
    read_memory,
)
from translution.distributed.system import free_port, launch_environment, remove_stale_locks
from translution.planner.plans import Plan, load_plan, write_plan_folder

from .machine import Context, device_used_bytes

_FIXED = "fixed_samples"
"""Name of the file in a plan's folder that asks for fixed samples."""
_LOG_LINES = 8


@dataclass(frozen=True)
class RankRun:
    """What a rank did until it ended."""

    seconds: float
    """From the start of the process to its end."""
    first_step_seconds: float | None
    """From the start of the process to the end of its first step."""
    error: str
    """The last line of its log if it failed, otherwise empty."""
    measurement: MemoryMeasurement | None
    used_before_bytes: int | None
    """Bytes in use on the card before the rank started."""
    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def fixed_samples(plan: Plan, global_batch: int) -> tuple[DataSource, DataSource]:
    """Return random inputs of one step, with random targets, for training and as held-out samples.

    Every step sees the same samples, so that a network that learns lowers its loss on them.
    """
    import torch

    from translution.planner.config import PatchSpec

    generator = torch.Generator().manual_seed(plan.training.seed)
    spec = plan.model
    if isinstance(spec, PatchSpec):
        inputs = torch.randn(global_batch, *spec.sample_shape, generator=generator)
        samples = Samples(inputs, torch.randint(spec.classes, (global_batch,), generator=generator))
    else:
        text = torch.randint(spec.vocabulary, (global_batch, spec.context + 1), generator=generator)
        samples = Samples(text[:, :-1], text[:, 1:])
    return samples, samples


def run_rank_here(folder: Path) -> None:
    """Run the plan of a folder as the single rank, in this process."""
    from translution.distributed.training import Trainer, run_rank

    class WithoutCheckpoint(Trainer):
        """A trainer that saves nothing."""

        def load_data(self, global_batch: int) -> tuple[DataSource, DataSource]:
            """Return fixed samples if the folder asks for them."""
            if (folder / _FIXED).exists():
                return fixed_samples(self.plan, global_batch)
            return super().load_data(global_batch)

        def save_checkpoint(self, measured: int | None) -> None:
            """Save nothing."""

    run = folder / "run"
    make_run_folders(run, folder)
    log_to_own_file(run, 0)
    trainer = WithoutCheckpoint(load_plan(folder), run, RunMode.MEASURE)
    run_rank(trainer, trainer.train)


def _environment(plan: Plan) -> dict[str, str]:
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return launch_environment(plan.cluster) | world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def _forked(folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    run_rank_here(folder)


def _wait(folder: Path, plan: Plan, context: Context, seconds: float | None) -> int:
    """Start the rank and wait until it ends; return its exit code, or one that is not 0 if its time is over."""
    environment = _environment(plan)
    if context.device == "cpu":
        forked = multiprocessing.get_context("fork").Process(target=_forked, args=(folder, environment))
        forked.start()
        forked.join(seconds)
        if forked.is_alive():
            forked.kill()
            forked.join()
        return forked.exitcode or 0
    command = [sys.executable, str(context.script), "--run-rank", str(folder)]
    process = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        process.kill()
        process.wait()


def run_plan(plan: Plan, context: Context, *, fixed: bool = False, seconds: float | None = None) -> RankRun:
    """Run a plan as one rank; return what it measured, also if it failed.

    Args:
        plan: the plan, for one rank of this machine.
        context: gives the device.
        fixed: train on the samples of one step, again and again.
        seconds: time limit; None sets none.
    """
    remove_stale_locks()  # A rank would wait for the lock of a compilation that was ended at its limit.
    folder = Path(tempfile.mkdtemp(prefix="translution-rank-"))
    try:
        write_plan_folder(plan, folder / "plan")
        if fixed:
            (folder / "plan" / _FIXED).touch()
        used = device_used_bytes() if context.device == "cuda" else None
        began, epoch = time.monotonic(), time.time()
        code = _wait(folder / "plan", plan, context, seconds)
        taken = time.monotonic() - began
        return _read(folder / "plan" / "run", code, taken, epoch, used)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read(run: Path, code: int, seconds: float, epoch: float, used: int | None) -> RankRun:
    """Read the rank's files; those of a rank that was ended are as far as it came."""
    steps: list[dict[str, Any]] = []
    with contextlib.suppress(OSError):
        for line in (run / METRICS).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                steps.append(json.loads(line))
    steps = [line for line in steps if line.get("event") == "step"]
    error = ""
    if code:
        log = log_path(run, 0)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        lines = [line for line in lines if line.strip()][-_LOG_LINES:]
        errors = [line for line in lines if "Error" in line] or lines
        error = f"exit code {code}: {errors[-1][:300]}" if errors else f"exit code {code}"
    return RankRun(
        seconds=seconds,
        first_step_seconds=_first_step(run, steps, epoch),
        error=error,
        measurement=read_memory(run, 0),
        used_before_bytes=used,
        step_seconds=[float(line["seconds"]) for line in steps],
        losses=[float(line["loss"]) for line in steps],
    )


def _first_step(run: Path, steps: list[dict[str, Any]], epoch: float) -> float | None:
    """Return the seconds until the first step ended: the last write of the metrics, less the later steps."""
    if not steps:
        return None
    ended = (run / METRICS).stat().st_mtime
    return max(0.0, ended - epoch - sum(float(line["seconds"]) for line in steps[1:]))
