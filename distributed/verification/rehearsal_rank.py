"""The single rank of a rehearsal: DeepSpeed's real engine in a fake process group.

The allocations are those of a rank in the planned world; the values are meaningless.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from translution.models import build, ops
from translution.planner.common import Phase, RunFailedError
from translution.planner.plans import Plan, load_plan

from ..data.base import Samples
from ..data.batching import micro_batches
from ..data.synthetic import make_synthetic
from ..profiling.recorder import RunPhase, run_phase
from ..training.engine import Engine
from ..training.rank import run_rank
from ..training.relation_groups import RelationMesh
from ..training.run_log import RunLog
from ..training.trainer import Trainer
from .extrapolate import INIT_ENGINE, INIT_MODEL
from .fake_compute import FakeCompute
from .fake_process_group import join_fake_process_group, replaced, without_rank_comparison, zero_exchanges

REHEARSAL_STEPS = 2
"""Optimizer steps: in the first, Adam's moments and DeepSpeed's trace of modules are made; the second is measured."""


class RehearsalEngine(Engine):
    """An engine on the CPU in a fake process group.

    Args:
        plan: the plan, with a CPU cluster.
        for_gpu: whether the planned cluster has GPUs; its operator is the one that runs on GPUs then.
    """

    def __init__(self, plan: Plan, *, for_gpu: bool) -> None:
        super().__init__(plan)
        self.for_gpu = for_gpu

    def join_process_group(self) -> None:
        """Join a process group that has no other members."""
        join_fake_process_group(self.rank, self.world_size)
        if self.plan.parallel.relation > 1:
            self.mesh = RelationMesh(self.plan.parallel.relation)

    def deepspeed_config(self) -> dict[str, Any]:
        """Return DeepSpeed's configuration; fp16 starts with a loss scale of 1, so that no gradient overflows."""
        config = super().deepspeed_config()
        if "fp16" in config:
            config["fp16"]["initial_scale_power"] = 0
        return config

    def build_network(self) -> torch.nn.Module:
        """Build the network with the operator of the planned device."""
        return build(
            self.plan.model,
            tile_relations=self.plan.tile_relations,
            implementation="batched" if self.for_gpu else "grouped",
            relation_group=None if self.mesh is None else self.mesh.group,
        )


class RehearsalTrainer(Trainer):
    """One rank of a plan without the others; RANK and WORLD_SIZE give its place.

    Args:
        plan: the plan to rehearse, for CPUs or GPUs.
        run: the run folder.
        compute: whether to compute matrix products instead of only allocating their results.
    """

    def __init__(self, plan: Plan, run: Path, *, compute: bool = False) -> None:
        self.for_gpu, self.compute = plan.cluster.device == "cuda", compute
        changes: dict[str, object] = {"cluster": plan.cluster.model_copy(update={"device": "cpu"})}
        if plan.training.adam == "fused":
            # Torch's fused AdamW runs on a CPU, too, and holds as little as DeepSpeed's.
            changes["training"] = plan.training.model_copy(update={"adam": "torch"})
        plan = plan.model_copy(update=changes)
        super().__init__(plan, run, engine=RehearsalEngine(plan, for_gpu=self.for_gpu))
        # The rank writes the metrics file whatever its number is.
        self.log = RunLog(plan, run, self.engine.rank, writes_metrics=True)
        self.seconds: dict[str, float] = {}
        """Seconds of the newest call of each phase."""

    @contextlib.contextmanager
    def as_planned(self) -> Iterator[None]:
        """Within the block, allocate matrix products as on the planned device, and compare nothing with other ranks."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(without_rank_comparison())
            stack.enter_context(zero_exchanges())
            if self.for_gpu and hasattr(torch.nn.functional, "grouped_mm"):
                stack.enter_context(replaced(ops.batched, "choose_products", lambda *_: ops.GroupedProducts()))
            if not self.compute:
                stack.enter_context(FakeCompute(like_gpu=self.for_gpu))
            yield

    def timed(self, phase: RunPhase, name: str, work: Callable[[], None]) -> None:
        """Write that a phase begins, do its work, and note its seconds."""
        if name == Phase.STEP and self.step == 0:
            # The first step also allocates the optimizer's moments.
            name, phase = Phase.FIRST_STEP, self.recorder.record
        self.report_status("training")
        building = self.engine.deepspeed_engine is None
        text = f"init: {name}" if building else f"step {self.step + 1} of {REHEARSAL_STEPS}: {name}"
        self.log.write(event="phase", text=text)
        began = time.perf_counter()
        phase(name, work)
        self.seconds[name] = time.perf_counter() - began

    def start(self) -> None:
        """Join the process group and build model and engine as two phases; each grows linearly with the layers."""
        self.engine.claim_swap_folders(self.run)
        self.engine.join_process_group()
        self.recorder = self.make_recorder()
        self.timed(self.recorder.record, INIT_MODEL, self.engine.build_model)
        self.timed(self.recorder.record, INIT_ENGINE, self.engine.initialize_engine)

    def train_step(self, batches: list[Samples], phase: RunPhase = run_phase) -> float:
        """Do one optimizer step, phase by phase."""
        return super().train_step(batches, partial(self.timed, phase))

    def rehearse(self) -> None:
        """Build the engine, do the steps and write what was measured.

        Raises:
            RunFailedError: if DeepSpeed skipped a step, so that optimizer states may be missing.
        """
        training = self.plan.training
        began = time.perf_counter()
        samples, rest = make_synthetic(self.plan.model, training.seed, global_batch=training.global_batch(1))
        self.data_tensors = [*samples.resident, *rest.resident]
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
            for self.step in range(REHEARSAL_STEPS):
                self.recorded_step(next(batches), measured=REHEARSAL_STEPS - 1)
        skipped = self.engine.deepspeed_engine.skipped_steps
        if skipped:
            raise RunFailedError(f"DeepSpeed skipped {skipped} steps: a gradient was not finite")
        self.log.write(event="rehearsed", seconds=self.seconds | {"all": time.perf_counter() - began})
        self.report_status("finished")


def rehearse_rank(run: Path, *, compute: bool) -> None:
    """Run the rank that the environment variables name.

    Args:
        run: the run folder, which holds the plan.
        compute: whether to compute matrix products instead of only allocating their results.
    """
    trainer = RehearsalTrainer(load_plan(run), run, compute=compute)
    run_rank(trainer, trainer.rehearse)
