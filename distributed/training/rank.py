"""The process of one rank: it joins a run, does what the run's mode asks for, reports failures and cleans up.

`train` is what every rank of a run executes, with one process or many. The launcher's environment variables (RANK,
LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) give the rank's place.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from translution.planner.plans import load_plan

from ..checkpoint.manifest import checkpoint_tags
from ..checkpoint.resume import check_resumable
from ..profiling.allocation_tracer import count_every_allocation
from ..runs.folder import CHECKPOINT, log_to_own_file, make_run_folders
from ..runs.heartbeat import follow_heartbeat, require_heartbeat
from ..runs.lock import lock_rank
from ..runs.mode import RunMode
from ..runs.watchdog import end_with_launcher
from ..system import filesystem, process_memory
from ..system.environment import own_path
from ..system.packages import check_training_packages
from .trainer import Trainer


def train(plan_folder: Path, run: Path, mode: RunMode = RunMode.TRAIN) -> None:
    """Run one rank of a plan; called on every rank.

    Args:
        plan_folder: holds plan.json.
        run: the run folder, made by the launcher.
        mode: what the ranks do; under TRAIN, a run folder that already has a checkpoint is resumed.

    Raises:
        TranslutionError: if the plan is invalid, its data does not fit the model, a package is missing, or this node
            does not see the launcher's run folder.
    """
    plan = load_plan(plan_folder)
    require_heartbeat(run)
    # A shell on another host, or Slurm's, does not have this environment's PATH.
    os.environ["PATH"] = own_path()
    check_training_packages(plan.training)
    # Without a launcher, for instance under torchrun, nobody has made the run folder.
    make_run_folders(run, plan_folder)
    rank = int(os.environ.get("RANK", "0"))
    lock_rank(run, rank)
    log_to_own_file(run, rank)
    if mode is RunMode.TRAIN and checkpoint_tags(run / CHECKPOINT):
        # For instance a Slurm job that was submitted again.
        check_resumable(plan, run)
        mode = RunMode.CONTINUE
    trainer = Trainer(plan, run, mode)
    run_rank(trainer, trainer.measure_resume if mode.only_resumes else trainer.train)


def run_rank(trainer: Trainer, work: Callable[[], None]) -> None:
    """Do a rank's work; report a failure in its status; remove its swap files and shared buffers afterwards."""
    # DeepSpeed 0.19.8 calls functions that torch 2.13 has renamed, and torch warns at every call.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)
    process_memory.return_freed_blocks()
    trainer.stop.expect()
    end_with_launcher()
    rank, plan = trainer.engine.rank, trainer.plan
    follow_heartbeat(trainer.run, rank, trainer.stop)
    if plan.cluster.device == "cpu":
        count_every_allocation()
    try:
        work()
        torch.distributed.barrier()
    except BaseException as error:
        trainer.report_status("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        raise
    finally:
        for folder in trainer.engine.swap_folders.values():
            folder.remove()
        filesystem.remove_shared_buffers(os.environ.get("MASTER_PORT", ""), rank)
        # Otherwise a gloo process may abort at exit after success.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
