"""Run by every rank: trains several plans one after another in the same processes.

usage: offloads.py PLAN_FOLDER...; each gets the run folder ``run``
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from translution.distributed import leave_process_group
from translution.distributed.runs.folder import make_run_folders
from translution.distributed.training.trainer import Trainer
from translution.planner.plans.plan import load_plan


def main(folders: list[Path]) -> None:
    for folder in folders:
        plan = load_plan(folder)
        make_run_folders(folder / "run", folder)
        trainer = Trainer(plan, folder / "run")
        trainer.train()
        for swap_folder in trainer.engine.swap_folders.values():
            swap_folder.remove()
        del trainer
        gc.collect()


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])

    leave_process_group()
