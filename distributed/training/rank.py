"""The process of one rank: it joins a run, does what the run's mode asks for, reports failures and cleans up.

`train` is what every rank of a run executes, with one process or many. The launcher's environment variables (RANK,
LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) give the rank's place.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from translution.planner.common import TranslutionError
from translution.planner.plans import load_plan

from ..checkpoint.manifest import checkpoint_tags
from ..checkpoint.resume import check_resumable
from ..profiling.allocation_tracer import count_every_allocation
from ..runs.folder import CHECKPOINT, log_to_own_file, make_run_folders
from ..runs.heartbeat import FOLLOW_HEARTBEAT, follow_heartbeat, require_heartbeat
from ..runs.lock import lock_rank
from ..runs.mode import RunMode
from ..runs.rank_watch import RankWatch, limits_of_environment
from ..runs.watchdog import LAUNCHER_PID, end_with_launcher
from ..system import filesystem, process_memory
from ..system.environment import own_path
from ..system.network import leave_process_group
from ..system.packages import check_training_packages
from .deepspeed_fixes import freeze_imports
from .failure import describe_failure
from .trainer import Trainer

_LOOK_SECONDS = 1.0


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
    plan.require_deepspeed()
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
    freeze_imports()
    trainer.stop.expect()
    end_with_launcher()
    rank, plan = trainer.engine.rank, trainer.plan
    follow_heartbeat(trainer.run, rank, trainer.stop)
    trainer.engine.progress.open(trainer.run, rank)
    watch_without_launcher(trainer)
    if plan.cluster.device == "cpu":
        count_every_allocation()
    try:
        work()
        torch.distributed.barrier()
        trainer.engine.progress.end()
    except BaseException as error:
        report_failure(trainer, error)
        raise
    finally:
        for folder in trainer.engine.swap_folders.values():
            folder.remove()
        filesystem.remove_shared_buffers(os.environ.get("MASTER_PORT", ""), rank)
        leave_process_group()


def report_failure(trainer: Trainer, error: BaseException) -> None:
    """Write why a rank fails: into its progress, which needs no room on a drive, and into its status."""
    plan = trainer.plan
    drives = (plan.zero.offload_optimizer.nvme_path, plan.zero.offload_param.nvme_path)
    folders = [trainer.run, trainer.run / CHECKPOINT, *(folder.path for folder in trainer.engine.swap_folders.values())]
    text, cause = describe_failure(error, [*folders, *(Path(str(path)) for path in drives if path is not None)])
    trainer.engine.progress.fail(text, cause)
    try:
        trainer.report_status("failed", text)
    except TranslutionError as problem:
        print(f"the status could not be written: {problem}", file=sys.stderr)


def watch_without_launcher(trainer: Trainer) -> None:
    """End this rank when it hangs, or when the next one does, if no launcher watches; then all ranks end.

    Slurm and torchrun end the others.
    """
    if LAUNCHER_PID in os.environ or FOLLOW_HEARTBEAT in os.environ:
        return
    engine, limits = trainer.engine, limits_of_environment(trainer.plan)
    if limits is None:
        return
    ranks = {engine.rank, (engine.rank + 1) % engine.world_size}
    watch = RankWatch(trainer.run, ranks, engine.world_size, limits)

    def look() -> None:
        while not (text := watch.find_hang()):
            time.sleep(_LOOK_SECONDS)
        engine.progress.fail(text, "other")
        try:
            trainer.report_status("failed", text)
        finally:
            faulthandler.dump_traceback(all_threads=True)
            os._exit(1)

    threading.Thread(target=look, daemon=True).start()
