"""The rank that a rehearsal runs: DeepSpeed's real engine in a world whose other ranks do not exist.

Torch's fake process group moves nothing between ranks: a gather puts copies of the rank's own share
where the others' would stand. Allocations are those of a real rank; values mean nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from translution.models import build
from translution.models.ops import GroupedProducts, batched
from translution.planner.common.errors import RunFailedError
from translution.planner.common.phases import Phase
from translution.planner.plans.plan import Plan, load_plan

from ..data.base import Samples
from ..data.batching import micro_batches
from ..data.synthetic import make_synthetic
from ..profiling.recorder import Recorder, RunPhase, run_phase
from ..training.trainer import Rank, run_rank
from .extrapolate import CONSTRUCTION, ENGINE
from .fake_compute import IdleArithmetic, replaced

STEPS = 2
"""Optimizer steps: the first makes the moments, and DeepSpeed's trace of modules; the second is measured."""


class RehearsalRank(Rank):
    """One rank of a plan, alone; RANK and WORLD_SIZE say which.

    Args:
        plan: what to rehearse; on a CPU whatever its device, with the operator that it has there.
        run: the run folder.
        compute: compute the matrix products too.
    """

    def __init__(self, plan: Plan, run: Path, *, compute: bool = False) -> None:
        on_cpu = plan.cluster.model_copy(update={"device": "cpu"})
        super().__init__(plan.model_copy(update={"cluster": on_cpu}), run)
        self.for_gpu, self.compute = plan.cluster.device == "cuda", compute
        self.seconds: dict[str, float] = {}

    @property
    def logs(self) -> bool:
        """This rank writes the metrics file, whatever its number."""
        return True

    def join(self) -> None:
        """Join a process group that has no other members."""
        import deepspeed
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch.distributed.init_process_group("fake", store=FakeStore(), rank=self.rank, world_size=self.ranks)
        # Its op for ranks that share memory has no use here, and takes a minute to compile.
        with replaced(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None):
            deepspeed.init_distributed(dist_backend="gloo")

    def config(self) -> dict[str, Any]:
        """What DeepSpeed is told; fp16 begins with a loss scale of 1, at which no gradient overflows."""
        config = super().config()
        if "fp16" in config:
            config["fp16"]["initial_scale_power"] = 0
        return config

    def network(self) -> torch.nn.Module:
        """The network, with the operator that it has on the plan's device."""
        implementation = "batched" if self.for_gpu else "grouped"
        return build(self.plan.model, tile_relations=self.plan.tile_relations, implementation=implementation)

    @contextlib.contextmanager
    def as_planned(self) -> Iterator[None]:
        """Products as a GPU makes them where the plan has GPUs, idle unless they are to be computed.

        And nothing is awaited of rank 0: it would tell the others its counts, to compare theirs with.
        """
        with contextlib.ExitStack() as stack:
            utils = importlib.import_module("deepspeed.runtime.zero.utils")
            stack.enter_context(replaced(utils, "get_lst_from_rank0", lambda own: own))
            stack.enter_context(replaced(utils, "assert_lst_len_same_as_other_ranks", lambda _: None))
            if self.for_gpu and hasattr(torch.nn.functional, "grouped_mm"):
                stack.enter_context(replaced(batched, "choose_products", lambda *_: GroupedProducts()))
            if not self.compute:
                stack.enter_context(IdleArithmetic())
            yield

    def timed(self, phase: RunPhase, name: str, work: Callable[[], None]) -> None:
        """Say that a phase begins, do its work, and note the seconds."""
        if name == Phase.STEP and self.step == 0 and self.recorder:
            # The first one makes the optimizer's moments.
            name, phase = Phase.FIRST_STEP, self.recorder.record
        self.say("training")
        text = f"init: {name}" if self.engine is None else f"step {self.step + 1} of {STEPS}: {name}"
        self.log(event="phase", text=text)
        began = time.perf_counter()
        phase(name, work)
        self.seconds[name] = time.perf_counter() - began

    def start(self) -> None:
        """Join the process group and build the engine, in two parts, of which each grows evenly with the layers."""
        self.join()
        self.recorder = Recorder(self.plan, self.rank)
        self.timed(self.recorder.record, CONSTRUCTION, self.construct)
        self.timed(self.recorder.record, ENGINE, self.engage)

    def train_step(self, batches: list[Samples], phase: RunPhase = run_phase) -> float:
        """One optimizer step, phase by phase."""
        return super().train_step(batches, partial(self.timed, phase))

    def rehearse(self) -> None:
        """The whole rehearsal.

        Raises:
            RunFailedError: if DeepSpeed skipped a step, so that states may be missing.
        """
        training = self.plan.training
        began = time.perf_counter()
        samples, rest = make_synthetic(self.plan.model, training.seed, global_batch=training.global_batch(1))
        self.samples = [*samples.resident, *rest.resident]
        batches = micro_batches(
            samples,
            micro_batch=training.micro_batch,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            rank=0,
            world_size=1,
            seed=training.seed,
        )
        with self.as_planned():
            self.start()
            for self.step in range(STEPS):
                self.recorded_step(next(batches), measured=STEPS - 1)
        if self.engine.skipped_steps:
            raise RunFailedError(f"DeepSpeed skipped {self.engine.skipped_steps} steps: a gradient was not finite")
        self.log(event="rehearsed", seconds=self.seconds | {"all": time.perf_counter() - began})
        self.say("finished")


def rehearse_rank(run: Path, *, compute: bool) -> None:
    """Run the rank that the environment names.

    Args:
        run: the run folder, which holds the plan.
        compute: compute the matrix products too.
    """
    rank = RehearsalRank(load_plan(run), run, compute=compute)
    run_rank(rank, rank.rehearse)
