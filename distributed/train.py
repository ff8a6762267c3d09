"""What every rank runs: build the model under ZeRO, train, measure one step, evaluate, save.

The same code serves one process and many; the launcher's environment (RANK, LOCAL_RANK,
WORLD_SIZE, MASTER_ADDR, MASTER_PORT) says which rank this is.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from translution.planner.errors import InputError
from translution.planner.files import write_text
from translution.planner.plan import load_plan
from translution.planner.provenance import provenance
from translution.planner.simulation import BACKWARD, FORWARD, RESUME, SAVE, STEP

from . import checkpoint, host, measure, reshard
from .data import Samples, load_samples, micro_batches
from .manifest import newest, tags
from .processes import end_with_launcher
from .rank import MODEL_DTYPES, EngineRank
from .recorder import RunPhase, run_phase
from .resume import check_resumable, layout_changes
from .run_files import (
    CHECKPOINT,
    CONTINUE,
    PROCESS,
    RESUMING,
    MemoryMeasurement,
    make_run_folders,
    memory_path,
    read_memory,
    trim_metrics,
)
from .stopping import Clock

MEASURED_STEP = 3
"""The optimizer step that is measured: Adam's moments exist by then, buffers have their size."""


def learning_rate_factor(step: int, warmup_steps: int, steps: int) -> float:
    """Linear warm-up, then a cosine to nought: the factor of the learning rate at a step from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


class Rank(EngineRank):
    """One rank that trains.

    Args:
        plan, run, watch: as in `EngineRank`.
    """

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
        tag = None if self.watch == "allocations" else f"{self.watch}_{self.step}"
        folder = self.run / CHECKPOINT
        self.recorder.record(SAVE, lambda: checkpoint.save(self.engine, folder, self.step, self.plan, tag=tag))
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

    def load(self) -> int:
        """Read the run's newest checkpoint into the engine; the steps that it had done.

        Raises:
            InputError: if there is none, or it is damaged or another model's.
        """
        assert self.recorder is not None
        folder = self.run / CHECKPOINT
        saved = newest(folder)
        if saved is None:
            raise InputError(f"{folder}: holds no whole checkpoint")
        if layout_changes(self.plan, saved.plan()):
            dtype = MODEL_DTYPES[self.plan.training.states_dtype]
            self.recorder.record(RESUME, lambda: reshard.load(self.engine, saved, dtype))
        else:
            self.recorder.record(RESUME, lambda: checkpoint.load(self.engine, folder, saved.tag))
        return saved.manifest.step

    def resume(self) -> None:
        """Build the engine, read the run's checkpoint, and add that to what the run measured."""
        self.start()
        self.load()
        self.add_measurement()
        self.say("finished")

    def train(self, *, evaluation: bool = True, read: bool = False, go_on: bool = False) -> None:
        """The whole run: all steps, checkpoints, and the evaluation unless it is not wanted.

        Args:
            evaluation: whether to evaluate.
            read: read the run's checkpoint first, to measure that, and begin at the first step all the same.
            go_on: read the run's checkpoint first and go on from its step.
        """
        training = self.plan.training
        training_samples, held_out = load_samples(
            self.plan.model, training.data, training.seed, step=training.global_batch(self.ranks)
        )
        self.samples = [training_samples.inputs, training_samples.targets, held_out.inputs, held_out.targets]
        self.start()
        loaded = self.load() if read or go_on else 0
        first = loaded if go_on else 0
        batches: Iterator[list[Samples]] = micro_batches(
            training_samples,
            micro_batch=training.micro_batch,
            accumulation=training.accumulation,
            rank=self.rank,
            ranks=self.ranks,
            seed=training.seed,
            first_step=first,
        )
        if go_on and self.logs:
            trim_metrics(self.run)
        made = provenance(shlex.join(["translution", *sys.argv[1:]]), ("torch", "deepspeed"))
        self.log(
            event="resume" if go_on else "start",
            step=first,
            steps=training.steps,
            ranks=self.ranks,
            global_batch=training.global_batch(self.ranks),
            made=made.model_dump(),
        )
        # In the first step Adam has no moments yet: a run of one step measures nothing.
        measured = None if go_on else min(MEASURED_STEP, training.steps) - 1 or None
        with self.stop.watching():
            stopped = self.train_steps(batches, first, measured)
        if stopped:
            self.say("stopped", stopped)
            return
        self.step = training.steps
        self.save(measured)
        if evaluation:
            loss, accuracy = self.evaluate(held_out)
            self.log(event="evaluation", step=self.step, loss=loss, accuracy=accuracy, samples=len(held_out))
        self.say("finished")

    def train_steps(self, batches: Iterator[list[Samples]], first: int, measured: int | None) -> str:
        """All steps from one on, with checkpoints between them.

        Returns:
            The name of the signal that ended them after a checkpoint; nothing if none did.
        """
        training, clock = self.plan.training, Clock(self.plan.training.checkpoint_minutes)
        for self.step in range(first, training.steps):
            began = time.perf_counter()
            # What is dropped depends on nothing that went before, so that a resumed run drops the same.
            torch.manual_seed((training.seed * self.ranks + self.rank + 1) * 1_000_003 + self.step)
            own = self.recorded_step(next(batches), measured)
            # All ranks save after the same step: rank 0's clock counts, and a signal to any of them.
            wanted = float(self.stop.name is not None), float(self.rank == 0 and clock.due())
            loss, stop, due = self.mean_over_ranks(own, *wanted)
            self.log_step(loss, time.perf_counter() - began)
            if self.step % 20 == 0:
                self.say("training")
            done = self.step + 1
            if stop:
                self.stop.notice()
            if done < training.steps and (stop or due or ((every := training.checkpoint_steps) and done % every == 0)):
                self.step = done
                self.save(None)
                clock.restart()
                if stop:
                    return self.stop.name or "a signal to another rank"
        return ""

    def log_step(self, loss: float, seconds: float) -> None:
        """Write a step's metrics."""
        norm = self.engine.get_global_grad_norm()
        self.log(
            event="step",
            step=self.step + 1,
            loss=loss,
            grad_norm=float(norm) if norm is not None and math.isfinite(norm) else None,
            learning_rate=self.engine.optimizer.param_groups[0]["lr"],
            seconds=seconds,
            samples_per_s=self.plan.training.global_batch(self.ranks) / seconds,
        )


def train(plan_folder: Path, run: Path, mode: str = "train") -> None:
    """Run one rank of a plan; called on every rank.

    Args:
        plan_folder: holds plan.json.
        run: the run folder, made by the launcher.
        mode: one of `run_files.MODES`; a run folder with a checkpoint is gone on with.

    Raises:
        TranslutionError: for a bad plan or data that does not suit it.
    """
    plan = load_plan(plan_folder)
    # Nodes that were started by hand have no launcher that made the run folder.
    make_run_folders(run, plan_folder)
    if mode == "train" and tags(run / CHECKPOINT):
        # A Slurm job that is submitted again, or torchrun with the run folder of a run that ended.
        check_resumable(plan, run)
        mode = CONTINUE
    rank = Rank(plan, run, "process" if mode == PROCESS else "allocations")
    evaluation = mode in ("train", CONTINUE)
    training = partial(rank.train, evaluation=evaluation, read=mode == PROCESS, go_on=mode == CONTINUE)
    run_rank(rank, rank.resume if mode == RESUMING else training)


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
        host.remove_shared_buffers(os.environ.get("MASTER_PORT", ""), rank.rank)
        # Without it a gloo process may abort at exit after success.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
