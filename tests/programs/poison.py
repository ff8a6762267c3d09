"""Run by every rank: two steps; in the second, one image of the last rank is not finite.

Every rank writes the error that it raised.

usage: poison.py PLAN_FOLDER RUN_FOLDER OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from translution.distributed import leave_process_group
from translution.distributed.data.batching import micro_batches
from translution.distributed.data.loaders import load_samples
from translution.distributed.training.trainer import Trainer
from translution.planner.plans.plan import load_plan


def main(plan_folder: Path, run: Path, out: Path) -> None:
    plan = load_plan(plan_folder)
    training = plan.training
    trainer = Trainer(plan, run)
    trainer.start()
    engine = trainer.engine
    samples, _ = load_samples(plan.model, training)
    stream = micro_batches(
        samples,
        micro_batch=training.micro_batch,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        rank=engine.rank,
        world_size=engine.world_size,
        seed=training.seed,
    )
    trainer.checked_step(next(stream), None)
    trainer.step, batches = 1, next(stream)
    if engine.rank == engine.world_size - 1:
        batches[-1].inputs[3] = torch.nan
    try:
        trainer.checked_step(batches, None)
    except FloatingPointError as error:
        out.with_suffix(f".{engine.rank}").write_text(str(error))
    torch.distributed.barrier()
    leave_process_group()


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
