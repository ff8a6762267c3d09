"""What every rank runs: build the model under ZeRO, train, measure one step, evaluate, save.

The same code serves one process and many; the launcher's environment (RANK, LOCAL_RANK,
WORLD_SIZE, MASTER_ADDR, MASTER_PORT) says which rank this is.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from translution.models import build
from translution.planner.errors import InputError
from translution.planner.files import write_text
from translution.planner.plan import Plan, load_plan
from translution.planner.provenance import provenance
from translution.planner.simulation import BACKWARD, FORWARD, INIT, RESUME, SAVE, STEP

from . import host, measure
from .data import Samples, load_samples, micro_batches
from .launch import end_with_launcher
from .recorder import Between, Recorder, RunPhase, Watch, run_phase
from .run_files import (
    CHECKPOINT,
    METRICS,
    PROCESS,
    RESUMING,
    MemoryMeasurement,
    RankStatus,
    make_run_folders,
    memory_path,
    read_memory,
    write_status,
)

MEASURED_STEP = 3
"""The optimizer step that is measured: Adam's moments exist by then, buffers have their size."""
_MODEL_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def learning_rate_factor(step: int, warmup_steps: int, steps: int) -> float:
    """Linear warm-up, then a cosine to nought: the factor of the learning rate at a step from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


class Rank:
    """One rank of a run.

    Args:
        plan: what to train and how.
        run: the run folder, shared by all ranks.
        watch: what its recorder measures.
    """

    def __init__(self, plan: Plan, run: Path, watch: Watch = "allocations") -> None:
        self.plan, self.run, self.watch = plan, run, watch
        self.rank, self.ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.step = 0
        self.samples: list[Tensor] = []
        self.model: torch.nn.Module | None = None
        """Between its construction and the engine's."""
        self.engine: Any = None
        self.recorder: Recorder | None = None
        self.between: Between | None = None

    def say(self, state: str, message: str = "") -> None:
        """Write this rank's status."""
        status = {"rank": self.rank, "state": state, "step": self.step, "message": message, "pid": os.getpid()}
        write_status(self.run, RankStatus.model_validate(status))

    @property
    def logs(self) -> bool:
        """Whether this rank writes the metrics: only rank 0 does, and no second process that measures the run."""
        return self.rank == 0 and self.watch == "allocations"

    def log(self, **values: object) -> None:
        """Append a line to the metrics file, if it is this rank that does."""
        if self.logs:
            with (self.run / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    def start(self) -> None:
        """Join the process group and build the engine.

        Raises:
            InputError: if the world is not the plan's.
        """
        self.say("started")
        if self.ranks != self.plan.cluster.ranks:
            raise InputError(f"WORLD_SIZE: {self.ranks} is not allowed: must be {self.plan.cluster.ranks}, as planned")
        self.join()
        self.recorder = Recorder(self.plan, self.rank, self.watch)
        self.recorder.record(INIT, self.construct)
        self.recorder.record(INIT, self.engage)

    def join(self) -> None:
        """Join the process group."""
        cuda = self.plan.cluster.device == "cuda"
        import deepspeed

        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo")

    def config(self) -> dict[str, Any]:
        """What DeepSpeed is told."""
        return self.plan.deepspeed_config()

    def network(self) -> torch.nn.Module:
        """The network, not yet under the engine."""
        return build(self.plan.model, tile_relations=self.plan.tile_relations)

    def construct(self) -> None:
        """Make the model, partitioned as it is made under ZeRO-3."""
        import deepspeed

        torch.manual_seed(self.plan.training.seed)
        with deepspeed.zero.Init(config_dict_or_path=self.config(), enabled=self.plan.zero.stage == 3):
            self.model = self.network()

    def engage(self) -> None:
        """Put the model under DeepSpeed's engine."""
        import deepspeed

        # Every rank has samples of its own, so it drops other values.
        torch.manual_seed(self.plan.training.seed + 1 + self.rank)
        model, self.model = self.model, None
        assert model is not None
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=self.config())

    def outputs(self, batch: Samples) -> Tensor:
        """The network's logits for a micro-batch."""
        inputs = batch.inputs.to(self.engine.device)
        if inputs.is_floating_point():
            inputs = inputs.to(_MODEL_DTYPES[self.plan.training.precision])
        logits: Tensor = self.engine(inputs)
        return logits

    def loss(self, batch: Samples) -> Tensor:
        """Mean cross-entropy of a micro-batch."""
        logits = self.outputs(batch).flatten(0, -2).float()
        return torch.nn.functional.cross_entropy(logits, batch.targets.to(self.engine.device).flatten())

    def pass_forward_and_backward(self, batches: list[Samples], phase: RunPhase = run_phase) -> float:
        """All micro-batches of a step; the mean loss over them.

        Args:
            batches: the micro-batches.
            phase: called with the name and the work of each forward and backward.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        total = 0.0
        loss = torch.zeros(())

        def forward(batch: Samples) -> None:
            nonlocal loss
            loss = self.loss(batch)

        for number, batch in enumerate(batches):
            if number:
                self.engine.step()  # Between micro-batches it only counts.
            phase(FORWARD, partial(forward, batch))
            phase(BACKWARD, lambda: self.engine.backward(loss))
            total += loss.item() / len(batches)
        if not math.isfinite(total):
            raise FloatingPointError(f"loss is {total}")
        return total

    def optimizer_step(self) -> None:
        """Clip and apply the gradients at the schedule's learning rate."""
        training = self.plan.training
        factor = learning_rate_factor(self.step, training.warmup_steps, training.steps)
        # With part of the states offloaded DeepSpeed has a second optimizer for what stays.
        optimizers = [self.engine.optimizer, getattr(self.engine.optimizer, "backup_optimizer", None)]
        for group in (group for optimizer in optimizers if optimizer for group in optimizer.param_groups):
            group["lr"] = training.learning_rate * factor
        self.engine.step()

    def train_step(self, batches: list[Samples], phase: RunPhase = run_phase) -> float:
        """One optimizer step; the mean loss over this rank's micro-batches."""
        loss = self.pass_forward_and_backward(batches, phase)
        phase(STEP, self.optimizer_step)
        return loss

    def recorded_step(self, batches: list[Samples], measured: int | None) -> float:
        """A step like any other, but the measured one and the one before are watched."""
        recorder = self.recorder
        assert recorder is not None
        if recorder.watch == "process":
            return self.train_step(batches, recorder.record if self.step else run_phase)
        if measured is None or self.step not in (measured - 1, measured):
            return self.train_step(batches)
        if self.step == measured - 1:
            recorder.count_kept(self.engine.module)
            return self.train_step(batches, recorder.counted)
        self.between = recorder.between_steps(self.engine, self.samples, batches)
        loss = self.train_step(batches, recorder.record)
        self.write_measurement(measured)
        return loss

    def write_measurement(self, step: int) -> None:
        """Write what has been measured so far."""
        assert self.recorder is not None and self.between is not None
        self._write(self.recorder.measurement(step, self.between))

    def add_measurement(self) -> None:
        """Add what this process has measured to what an earlier one wrote."""
        assert self.recorder is not None
        before = read_memory(self.run, self.rank)
        if before is not None:
            self._write(self.recorder.add_to(before))

    def _write(self, measurement: MemoryMeasurement) -> None:
        write_text(memory_path(self.run, self.rank), measurement.model_dump_json(indent=2) + "\n")

    def save(self, measured: int | None) -> None:
        """Save the checkpoint and note the memory it takes."""
        assert self.recorder is not None
        # A second process that measures the same run saves beside the first one's checkpoint.
        kind = "step" if self.watch == "allocations" else self.watch

        def work() -> None:
            self.engine.save_checkpoint(str(self.run / CHECKPOINT), tag=f"{kind}_{self.step}")

        self.recorder.record(SAVE, work)
        if self.watch == "process":
            self.add_measurement()
        elif measured is not None:
            self.write_measurement(measured)

    def mean_over_ranks(self, *values: float) -> list[float]:
        """Each value's mean over all ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.engine.device)
        torch.distributed.all_reduce(tensor)
        return [float(value) / self.ranks for value in tensor]

    @torch.no_grad()
    def evaluate(self, held_out: Samples) -> tuple[float, float]:
        """Mean loss and accuracy over the held-out samples, each sample counted once.

        Every rank runs the same number of batches, as ZeRO-3's gathers require; a rank that has no
        sample left for one computes on a repeated sample and does not count it.
        """
        self.engine.eval()
        micro, totals = self.plan.training.micro_batch, torch.zeros(3, dtype=torch.float64, device=self.engine.device)
        for start in range(0, len(held_out), micro * self.ranks):
            index = torch.arange(start + self.rank * micro, start + (self.rank + 1) * micro)
            valid = index < len(held_out)
            batch = held_out.select(index.clamp(max=len(held_out) - 1))
            logits = self.outputs(batch).float()[valid]
            targets = batch.targets.to(self.engine.device)[valid]
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
            right = (logits.argmax(-1) == targets).sum()
            totals += torch.stack([losses.double(), right.double(), torch.full_like(right, targets.numel()).double()])
        self.engine.train()
        torch.distributed.all_reduce(totals)
        return float(totals[0] / totals[2]), float(totals[1] / totals[2])

    def load(self) -> None:
        """Read the run's checkpoint into the engine."""
        assert self.recorder is not None

        def work() -> None:
            self.engine.load_checkpoint(str(self.run / CHECKPOINT))

        self.recorder.record(RESUME, work)

    def resume(self) -> None:
        """Build the engine, read the run's checkpoint, and add that to what the run measured."""
        self.start()
        self.load()
        self.add_measurement()
        self.say("finished")

    def train(self, *, evaluation: bool = True, resume: bool = False) -> None:
        """The whole run: all steps, the checkpoint, and the evaluation unless it is not wanted.

        Args:
            evaluation: whether to evaluate.
            resume: read the run's checkpoint first, to measure that.
        """
        training = self.plan.training
        training_samples, held_out = load_samples(
            self.plan.model, training.data, training.seed, step=training.global_batch(self.ranks)
        )
        self.samples = [training_samples.inputs, training_samples.targets, held_out.inputs, held_out.targets]
        batches: Iterator[list[Samples]] = micro_batches(
            training_samples,
            micro_batch=training.micro_batch,
            accumulation=training.accumulation,
            rank=self.rank,
            ranks=self.ranks,
            seed=training.seed,
        )
        self.start()
        if resume:
            self.load()
        made = provenance(shlex.join(["translution", *sys.argv[1:]]), ("torch", "deepspeed"))
        self.log(
            event="start",
            steps=training.steps,
            ranks=self.ranks,
            global_batch=training.global_batch(self.ranks),
            made=made.model_dump(),
        )
        # In the first step Adam has no moments yet: a run of one step measures nothing.
        measured = min(MEASURED_STEP, training.steps) - 1 or None
        for self.step in range(training.steps):
            began = time.perf_counter()
            (loss,) = self.mean_over_ranks(self.recorded_step(next(batches), measured))
            seconds = time.perf_counter() - began
            norm = self.engine.get_global_grad_norm()
            self.log(
                event="step",
                step=self.step + 1,
                loss=loss,
                grad_norm=float(norm) if norm is not None and math.isfinite(norm) else None,
                learning_rate=self.engine.optimizer.param_groups[0]["lr"],
                seconds=seconds,
                samples_per_s=training.global_batch(self.ranks) / seconds,
            )
            if self.step % 20 == 0:
                self.say("training")
        self.step = training.steps
        self.save(measured)
        if evaluation:
            loss, accuracy = self.evaluate(held_out)
            self.log(event="evaluation", step=self.step, loss=loss, accuracy=accuracy, samples=len(held_out))
        self.say("finished")


def train(plan_folder: Path, run: Path, mode: str = "train") -> None:
    """Run one rank of a plan; called on every rank.

    Args:
        plan_folder: holds plan.json.
        run: the run folder, made by the launcher.
        mode: one of `run_files.MODES`.

    Raises:
        TranslutionError: for a bad plan or data that does not suit it.
    """
    plan = load_plan(plan_folder)
    # Nodes that were started by hand have no launcher that made the run folder.
    make_run_folders(run, plan_folder)
    rank = Rank(plan, run, "process" if mode == PROCESS else "allocations")
    evaluation, resume = mode == "train", mode == PROCESS
    run_rank(rank, rank.resume if mode == RESUMING else partial(rank.train, evaluation=evaluation, resume=resume))


def run_rank(rank: Rank, work: Callable[[], None]) -> None:
    """Do a rank's work, leave its last word in its status, and clear up."""
    # DeepSpeed 0.19.8 calls what torch 2.13 has renamed, and torch says so at every call.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)
    end_with_launcher()
    plan = rank.plan
    if plan.cluster.device == "cpu":
        measure.count_every_allocation()
    try:
        work()
        torch.distributed.barrier()
    except BaseException as error:
        rank.say("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        raise
    finally:
        for path in {plan.zero.offload_optimizer.nvme_path, plan.zero.offload_param.nvme_path}:
            host.remove_swap_files(path, rank.rank)
        # Without it a gloo process may abort at exit after success.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
