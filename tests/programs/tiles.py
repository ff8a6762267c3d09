"""Run by every rank: steps under ZeRO-3, counting the tiles that are gathered at the same time.

DeepSpeed records the order of modules in the first pass, and prefetches and reuses parameters from the second on. In
Triton's interpreter, where a step takes seconds, that pass is the last of two; otherwise there are three.

usage: tiles.py PLAN_FOLDER RUN_FOLDER OUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from translution.distributed import leave_process_group
from translution.distributed.data.batching import micro_batches
from translution.distributed.data.loaders import load_samples
from translution.distributed.training.trainer import Trainer
from translution.models.layers.tables import Tile
from translution.models.ops import grouped
from translution.models.ops.fused import tile as fused
from translution.planner.plans.plan import load_plan

STEPS = 2 if "TRITON_INTERPRET" in os.environ else 3


def main(plan_folder: Path, run: Path, out: Path) -> None:
    plan = load_plan(plan_folder)
    trainer = Trainer(plan, run)
    trainer.start()
    engine = trainer.engine
    import deepspeed

    tiles = [module for module in engine.module.modules() if isinstance(module, Tile)]
    gathered: dict[str, list[int]] = {"forward": [], "backward": []}

    kernels: list[str] = []
    launch = fused.launch_kernel

    def launched(kernel: str, *arguments: Any, **more: Any) -> None:
        kernels.append(kernel)
        launch(kernel, *arguments, **more)

    fused.launch_kernel = launched

    def count(direction: str) -> None:
        # ZeRO-3 leaves a released parameter with no elements.
        gathered[direction].append(sum(any(p.numel() for p in tile.parameters()) for tile in tiles))

    def watch(function: type[Any]) -> None:
        for direction in ("forward", "backward"):
            original = getattr(function, direction)

            def counted(*arguments: Any, _original: Any = original, _direction: str = direction) -> Any:
                count(_direction)
                return _original(*arguments)

            setattr(function, direction, staticmethod(counted))

    watch(grouped.LogitTileFunction)
    watch(grouped.ValueTileFunction)
    watch(grouped.SoftmaxFunction)
    samples, _ = load_samples(plan.model, plan.training)
    training = plan.training
    stream = micro_batches(
        samples,
        micro_batch=training.micro_batch,
        gradient_accumulation_steps=1,
        rank=engine.rank,
        world_size=engine.world_size,
        seed=training.seed,
    )
    (batch,) = next(stream)
    engine.backward(engine.loss(batch))
    grads = {
        name: deepspeed.utils.safe_get_full_grad(parameter) for name, parameter in engine.module.named_parameters()
    }
    for _ in range(STEPS - 1):
        engine.micro_step()
        engine.backward(engine.loss(next(stream)[0]))
    if engine.rank == 0:
        torch.save(grads, out.with_suffix(".pt"))
        out.write_text(json.dumps({"tiles": len(tiles), "kernels": sorted(set(kernels)), **gathered}))
    torch.distributed.barrier()
    leave_process_group()


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
