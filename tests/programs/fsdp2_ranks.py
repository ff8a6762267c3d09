"""One rank that trains plans under FSDP2, one after the other: python fsdp2_ranks.py OUT PLAN_FOLDER...

Rank 0 writes to OUT, for each plan, the losses, the peak of each phase in bytes, how many tiles were gathered at the
same time, and the elements of its shares.
"""

from __future__ import annotations

import gc
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from translution.distributed import leave_process_group
from translution.distributed.data.base import Samples
from translution.distributed.fsdp2 import batch_loss, build_sharded, join_ranks, learning_rate, make_optimizer
from translution.distributed.fsdp2.steps import training_steps
from translution.distributed.profiling import count_every_allocation, trace_allocations
from translution.models.layers import Tile
from translution.planner.plans import Plan, load_plan


class Rank:
    """A rank of one plan; records the peak of each phase above what was allocated before the network was made."""

    def __init__(self, plan: Plan, mesh: Any) -> None:
        self.plan, self.mesh = plan, mesh
        self.peaks: dict[str, int] = {}
        self.base: int | None = None
        self.most_tiles = 0
        self.losses: list[float] = []

    def record(self, name: str, work: Any) -> None:
        before, peak = trace_allocations(work)
        self.base = before if self.base is None else self.base
        self.peaks[name] = max(self.peaks.get(name, 0), peak - self.base)

    def build(self) -> None:
        self.network = build_sharded(self.plan, self.mesh)

    def count_tiles(self, *_: object) -> None:
        """Called when a tile computes: a parameter of a gathered tile is a plain tensor with a storage."""
        found = 0
        for tile in self.tiles:
            weights = [weight for weight in tile.parameters() if not isinstance(weight, DTensor)]
            found += any(weight.untyped_storage().nbytes() for weight in weights)
        self.most_tiles = max(self.most_tiles, found)

    def forward(self, batch: Samples) -> None:
        self.loss = batch_loss(self.plan, self.network, batch)

    def backward(self) -> None:
        (self.loss / self.plan.training.gradient_accumulation_steps).backward()
        self.loss = self.loss.detach()

    def update(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.plan.training.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()

    def train(self) -> None:
        plan = self.plan
        steps = training_steps(plan, self.mesh)
        pending = next(steps)  # The data is loaded before anything is measured.
        self.record("init", self.build)
        self.tiles = [module for module in self.network.modules() if isinstance(module, Tile)]
        for tile in self.tiles:
            tile.register_forward_pre_hook(self.count_tiles)
        optimizer = make_optimizer(plan, self.network)
        while pending is not None:
            step, batches = pending
            if step == 1:
                self.peaks = {name: peak for name, peak in self.peaks.items() if name == "init"}
            total = 0.0
            for batch in batches:
                self.record("forward", partial(self.forward, batch))
                self.record("backward", self.backward)
                total += self.loss.item() / len(batches)
            del batch, self.loss
            self.record("optimizer step", partial(self.update, optimizer, learning_rate(plan, step)))
            mean = torch.tensor(total, dtype=torch.float64)
            torch.distributed.all_reduce(mean)
            self.losses.append(mean.item() / self.mesh.size())
            del batches
            pending = next(steps, None)
        shares = [weight for weight in self.network.parameters() if isinstance(weight, DTensor)]
        assert len(shares) == len(list(self.network.parameters()))
        self.share = sum(weight.to_local().numel() for weight in shares)


def main() -> None:
    count_every_allocation()
    results, mesh = [], None
    for folder in sys.argv[2:]:
        plan = load_plan(folder)
        mesh = mesh or join_ranks(plan)
        rank = Rank(plan, mesh)
        rank.train()
        results.append({"losses": rank.losses, "peaks": rank.peaks, "most_tiles": rank.most_tiles, "share": rank.share})
        del rank
        gc.collect()  # A network refers to itself.
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    leave_process_group()


if __name__ == "__main__":
    main()
