"""One rank that trains plans with relation parallelism, one after the other: python training.py OUT JOBS.

JOBS is a JSON file with a list of jobs: "plan" is the plan folder and "run" the run folder to make; "checkpoint" is the
checkpoint to resume from, and "weights" the network file to start from, or null. Rank r writes OUT/ranks_W_rank_r.json:
for each job what it sent in a step in its relation group, and its number of sub-groups under ZeRO-3.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.utils import groups

from translution.distributed import leave_process_group
from translution.distributed.data.base import Samples
from translution.distributed.profiling.recorder import RunPhase, run_phase
from translution.distributed.runs.folder import CHECKPOINT, make_run_folders, set_first_weights
from translution.distributed.runs.mode import RunMode
from translution.distributed.training.trainer import Trainer
from translution.models.layers import OwnedTables
from translution.planner.plans.plan import load_plan

COUNTED_STEP = 1
"""The step whose bytes are counted, from 0."""
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


class SentInGroup:
    """Counts the bytes that this rank hands to the collectives of one group, and the seeds for all ranks."""

    def __init__(self) -> None:
        self.group: Any = None
        self.exchanged = self.reduced = 0
        self._counts: dict[str, Callable[..., None]] = {
            GATHER: self._gather,
            "all_to_all_single": self._exchange,
            "all_reduce": self._reduce,
        }
        self._all_gather = getattr(dist, GATHER)
        for name, count in self._counts.items():
            setattr(dist, name, self._counted(getattr(dist, name), count))

    def _counted(self, collective: Callable[..., Any], count: Callable[..., None]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if self.group is not None and options.get("group") is self.group:
                count(*arguments)
            elif self.group is not None and collective is self._all_gather and options.get("group") is dist.group.WORLD:
                self.exchanged += (dist.get_world_size() - 1) * arguments[1].nbytes
            return collective(*arguments, **options)

        return run

    def _gather(self, out: Any, own: Any) -> None:
        self.exchanged += (dist.get_world_size(self.group) - 1) * own.nbytes

    def _exchange(self, out: Any, sent: Any, *sizes: Any) -> None:
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        kept = sizes[1][rank] if len(sizes) == 2 else len(sent) // ranks
        self.exchanged += sent.nbytes - kept * (sent.nbytes // len(sent))

    def _reduce(self, tensor: Any) -> None:
        self.reduced += tensor.nbytes


class CountingTrainer(Trainer):
    """Counts the bytes of the passes of one step, without DeepSpeed's scalars for the norm."""

    counter: SentInGroup

    def forward_backward(self, batches: list[Samples], phase: RunPhase = run_phase) -> float:
        if self.step != COUNTED_STEP or self.engine.mesh is None:
            return super().forward_backward(batches, phase)
        self.counter.group = self.engine.mesh.group
        try:
            return super().forward_backward(batches, phase)
        finally:
            self.counter.group = None


def run_job(job: dict[str, Any], counter: SentInGroup) -> dict[str, int]:
    """Train one plan."""
    # As in a new process: DeepSpeed keeps both, and names swap files by the identities of parameters.
    groups.mpu, Init.param_id = None, 0
    counter.exchanged = counter.reduced = 0
    plan, run = load_plan(Path(job["plan"])), Path(job["run"])
    weights = None if job["weights"] is None else Path(job["weights"])
    source = None if job["checkpoint"] is None else Path(job["checkpoint"])
    if not dist.is_initialized() or dist.get_rank() == 0:
        make_run_folders(run, Path(job["plan"]))
        set_first_weights(run, weights)
        if source is not None:
            shutil.copytree(source, run / CHECKPOINT / source.name)
    if dist.is_initialized():
        dist.barrier()
    trainer = CountingTrainer(plan, run, RunMode.TRAIN if source is None else RunMode.CONTINUE)
    trainer.counter = counter
    trainer.train()
    for folder in trainer.engine.swap_folders.values():
        folder.remove()
    sub_groups = getattr(trainer.engine.deepspeed_engine.optimizer, "fp16_groups", [])
    groups_of_dropout = [x.group.dropout_ranks for x in trainer.engine.module.modules() if isinstance(x, OwnedTables)]
    return {
        "exchanged": counter.exchanged,
        "reduced": counter.reduced,
        "sub_groups": len(sub_groups),
        "layers_that_drop_as_one_rank": sum(ranks is dist.group.WORLD for ranks in groups_of_dropout),
    }


def main() -> None:
    out, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    counter, results = SentInGroup(), []
    for job in jobs:
        results.append(run_job(job, counter))
        gc.collect()  # An engine refers to itself.
    name = f"ranks_{dist.get_world_size()}_rank_{dist.get_rank()}.json"
    (out / name).write_text(json.dumps(results))
    leave_process_group()


if __name__ == "__main__":
    main()
