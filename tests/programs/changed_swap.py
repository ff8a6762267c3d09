"""Run by every rank: trains with checked swap files, of which one changes on the drive at a chosen time.

usage: changed_swap.py PLAN_FOLDER CASE...; each case gets the run folder CASE. Its result, the error's text or "", is
written to CASE/result. Without a change, the second call resumes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper

from translution.distributed.checkpoint.manifest import checkpoint_tags
from translution.distributed.runs.folder import CHECKPOINT, make_run_folders
from translution.distributed.runs.mode import CHECK_SWAP, RunMode
from translution.distributed.system.nvme_swap import kind_of_swap_file
from translution.distributed.training.rank import run_rank
from translution.distributed.training.trainer import Trainer
from translution.planner.plans.plan import load_plan

STEP = 1
"""The step, from 0, in which a file changes: by then every kind of file has been written."""
CASES = {
    # When it changes, what it holds, and how it changes.
    "parameters": ("checked_step", "parameters", "zeros"),
    "gradients": ("flush", "gradients", "bit"),
    "exp_avg": ("flush", "exp_avg", "bit"),
    "short": ("flush", "exp_avg_sq", "short"),
    "checkpoint": ("save_checkpoint", "exp_avg", "bit"),
}


def change(folder: Path, kind: str, how: str) -> None:
    path = sorted(path for path in folder.rglob("*.swp") if kind_of_swap_file(path) == kind)[0]
    content = bytearray(path.read_bytes())
    if how == "short":
        del content[-4096:]
    elif how == "bit":
        content[100_000] ^= 1
    else:
        content[4096:8192] = bytes(4096)
    path.write_bytes(content)


def changing(trainer: Trainer, original: Callable[..., Any], kind: str, how: str) -> Callable[..., Any]:
    """Return a function that changes a file in its first call in the chosen step or later, on the last rank."""
    engine, changed = trainer.engine, list[None]()

    def run(*arguments: Any) -> Any:
        before = arguments and isinstance(arguments[0], OptimizerSwapper)
        result = original(*arguments) if before else None
        if trainer.step >= STEP and not changed and engine.rank == engine.world_size - 1:
            changed.append(None)
            (folder,) = engine.swap_folders.values()
            change(folder.path, kind, how)
        return result if before else original(*arguments)

    return run


def train(folder: Path, case: str) -> Trainer:
    plan = load_plan(folder)
    run = folder / case
    make_run_folders(run, folder)
    flush = OptimizerSwapper._flush_gradient_swapper
    text = ""
    if case == "nothing" and checkpoint_tags(run / CHECKPOINT):
        trainer = Trainer(plan, run, RunMode.MEASURE_RESUME)
        work = trainer.measure_resume
    else:
        trainer = Trainer(plan, run)
        work = trainer.train
    if case in CASES:
        when, kind, how = CASES[case]
        if when == "flush":
            changed = changing(trainer, flush, kind, how)
            OptimizerSwapper._flush_gradient_swapper = lambda *arguments: changed(*arguments)
        else:
            setattr(trainer, when, changing(trainer, getattr(trainer, when), kind, how))
    try:
        if trainer.engine.world_size > 1:
            run_rank(trainer, work)
        else:
            work()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if trainer.engine.world_size > 1:
            raise
    finally:
        OptimizerSwapper._flush_gradient_swapper = flush
        for swap_folder in trainer.engine.swap_folders.values():
            swap_folder.remove()
    (run / "result").write_text(text)
    return trainer


if __name__ == "__main__":
    os.environ[CHECK_SWAP] = "1"
    # An engine that has failed may have reads under way, and cannot be deleted.
    trainers = [train(Path(sys.argv[1]), case) for case in sys.argv[2:]]
    os._exit(0)
