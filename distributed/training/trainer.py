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

from translution.planner.common.errors import InputError
from translution.planner.common.files import write_text
from translution.planner.common.provenance import provenance
from translution.planner.plans.plan import Plan, load_plan
from translution.planner.simulator.lifecycle import BACKWARD, FORWARD, RESUME, SAVE, STEP

from ..checkpoint import reshard
from ..checkpoint import save_load as checkpoint
from ..checkpoint.manifest import newest, tags
from ..checkpoint.resume import check_resumable, layout_changes
from ..data.augment import Augmenter
from ..data.base import Samples, DataSource
from ..data.batching import micro_batches
from ..data.loaders import load_samples
from ..profiling import allocation_tracer as measure
from ..profiling.recorder import RunPhase, Watch, run_phase
from ..runs.folder import (
    CHECKPOINT,
    log_to_own_file,
    make_run_folders,
    memory_path,
    trim_metrics,
)
from ..runs.heartbeat import follow_beat, require_beat
from ..runs.measurement import MemoryMeasurement, read_memory
from ..runs.mode import RunMode
from ..runs.watchdog import end_with_launcher
from ..system import filesystem, nvme_swap
from ..system.environment import own_path
from ..system.packages import check_training_packages
from ..system.signals import IntervalTimer
from .engine import MODEL_DTYPES, EngineRank
from .lr_schedule import learning_rate_factor
from .monitor import RunMonitor
from .nonfinite import SkippedSteps, find_in_backward, find_in_forward, is_finite_norm

MEASURED_STEP = 3
"""The optimizer step that is measured: Adam's moments exist by then, buffers have their size."""


def is_due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps is done after this one; 0 never does it."""
    return every > 0 and step % every == 0


class Rank(EngineRank):
    """One rank that trains.

    Args:
        plan, run, watch: as in `EngineRank`.
    """

    def __init__(self, plan: Plan, run: Path, watch: Watch = "allocations") -> None:
        super().__init__(plan, run, watch)
        self.monitor = RunMonitor("none", run)
        self.skipped = SkippedSteps(scaled=plan.training.precision == "fp16")

    def pass_forward_and_backward(self, batches: list[Samples], phase: RunPhase = run_phase) -> float:
        """All micro-batches of a step; the mean loss over them.

        Args:
            batches: the micro-batches.
            phase: called with the name and the work of each forward and backward.
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
        """One optimizer step; the mean loss over all ranks' micro-batches.

        Raises:
            FloatingPointError: on every rank, if a loss of any is not finite; naming the first layer that is not.
        """
        (loss,) = self.mean_over_ranks(self.pass_forward_and_backward(batches, phase))
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {self.step + 1}: loss is {loss}: {find_in_forward(self, batches)}")
        phase(STEP, self.optimizer_step)
        return loss

    def check_gradients(self, batches: list[Samples]) -> None:
        """Stop when DeepSpeed has skipped the step for its gradients, unless that is the loss scale's search.

        Raises:
            FloatingPointError: on every rank; naming the parameter where the gradients are first not finite.
        """
        optimizer, norm = self.engine.optimizer, self.engine.get_global_grad_norm()
        finite = is_finite_norm(norm) and not getattr(optimizer, "overflow", False)
        scale = float(getattr(optimizer, "loss_scale", None) or 1.0)
        if self.skipped.lost(finite=finite, scale=scale):
            where = find_in_backward(self, batches, self.pass_forward_and_backward)
            raise FloatingPointError(f"step {self.step + 1}: {self.skipped.text(scale)}{where}")

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
        self.log(event="memory", step=self.step + 1, peak_bytes=self.write_measurement(measured).peak_bytes)
        return loss

    def write_measurement(self, step: int) -> MemoryMeasurement:
        """Write what has been measured so far."""
        assert self.recorder is not None and self.between is not None
        measurement = self.recorder.measurement(step, self.between)
        self._write(measurement)
        return measurement

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
            evaluation: whether to evaluate, and to tell the monitor; not where only memory is of interest.
            read: read the run's checkpoint first, to measure that, and begin at the first step all the same.
            go_on: read the run's checkpoint first and go on from its step.
        """
        training = self.plan.training
        training_samples, held_out = load_samples(self.plan.model, training, training.global_batch(self.ranks))
        self.samples = [*training_samples.resident, *held_out.resident]
        # Before the engine: kornia cannot be imported any more once DeepSpeed has made a model under ZeRO-3.
        self.augment = Augmenter(self.plan.model, training, self.rank, self.ranks)
        self.start()
        loaded = self.load() if read or go_on else 0
        first = loaded if go_on else 0
        batches: Iterator[list[Samples]] = micro_batches(
            training_samples,
            micro_batch=training.micro_batch,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
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
        self.monitor = RunMonitor(training.monitor if self.logs and evaluation else "none", self.run)
        with self.stop.watching():
            stopped = self.train_steps(batches, first, measured, held_out if evaluation else None)
        if stopped:
            self.say("stopped", stopped)
            return
        self.step = training.steps
        self.save(measured)
        if evaluation:
            self.log_evaluation(held_out, self.step)
        self.say("finished")

    def train_steps(
        self, batches: Iterator[list[Samples]], first: int, measured: int | None, held_out: DataSource | None
    ) -> str:
        """All steps from one on, with evaluations and checkpoints between them.

        Args:
            batches: the micro-batches of each step.
            first: the step to begin with, from 0.
            measured: the step whose memory is measured.
            held_out: what to evaluate on, if at all.

        Returns:
            The name of the signal that ended them after a checkpoint; nothing if none did.
        """
        training, clock = self.plan.training, IntervalTimer(self.plan.training.checkpoint_minutes)
        for self.step in range(first, training.steps):
            began = time.perf_counter()
            loss = self.checked_step(self.augment(next(batches), self.step), measured)
            # All ranks save after the same step: rank 0's clock counts, and a signal to any of them.
            wanted = float(self.stop.name is not None), float(self.rank == 0 and clock.due())
            stop, due = self.mean_over_ranks(*wanted)
            self.log_step(loss, time.perf_counter() - began)
            if self.step % 20 == 0:
                self.say("training")
            done = self.step + 1
            if stop:
                self.stop.notice()
            elif held_out is not None and done < training.steps and is_due(done, training.evaluation_steps):
                self.log_evaluation(held_out, done)
            if done < training.steps and (stop or due or is_due(done, training.checkpoint_steps)):
                self.step = done
                self.save(None)
                clock.restart()
                if stop:
                    return self.stop.name or "a signal to another rank"
        return ""

    def checked_step(self, batches: list[Samples], measured: int | None) -> float:
        """A step of a run, which is stopped if it can learn no more."""
        self.seed_step()
        loss = self.recorded_step(batches, measured)
        self.check_gradients(batches)
        return loss

    def log_evaluation(self, held_out: DataSource, step: int) -> None:
        """Evaluate after so many steps, and write the result."""
        loss, accuracy, samples = self.evaluate(held_out)
        self.log(event="evaluation", step=step, loss=loss, accuracy=accuracy, samples=samples)
        self.monitor.write("Evaluation", step, {"loss": loss, "accuracy": accuracy})

    def log_step(self, loss: float, seconds: float) -> None:
        """Write a step's metrics."""
        norm = self.engine.get_global_grad_norm()
        values = {
            "loss": loss,
            "grad_norm": float(norm) if norm is not None and math.isfinite(norm) else None,
            "learning_rate": self.engine.optimizer.param_groups[0]["lr"],
            "samples_per_s": self.plan.training.global_batch(self.ranks) / seconds,
        }
        self.log(event="step", step=self.step + 1, seconds=seconds, **values)
        self.monitor.write("Train", self.step + 1, values)


def train(plan_folder: Path, run: Path, mode: RunMode = RunMode.TRAIN) -> None:
    """Run one rank of a plan; called on every rank.

    Args:
        plan_folder: holds plan.json.
        run: the run folder, made by the launcher.
        mode: what the rank does; under TRAIN, a run folder that already has a checkpoint is resumed.

    Raises:
        TranslutionError: for a bad plan, data that does not suit it, a package that it needs and is absent, or a run
            folder that its launcher does not share.
    """
    plan = load_plan(plan_folder)
    require_beat(run)
    # A shell of another host, or of Slurm, knows nothing of this environment.
    os.environ["PATH"] = own_path()
    check_training_packages(plan.training)
    # Nodes that were started by hand have no launcher that made the run folder.
    make_run_folders(run, plan_folder)
    log_to_own_file(run, int(os.environ.get("RANK", "0")))
    if mode is RunMode.TRAIN and tags(run / CHECKPOINT):
        # A Slurm job that is submitted again, or torchrun with the run folder of a run that ended.
        check_resumable(plan, run)
        mode = RunMode.CONTINUE
    rank = Rank(plan, run, "process" if mode is RunMode.MEASURE_PROCESS else "allocations")
    evaluation = mode in (RunMode.TRAIN, RunMode.CONTINUE)
    training = partial(
        rank.train, evaluation=evaluation, read=mode is RunMode.MEASURE_PROCESS, go_on=mode is RunMode.CONTINUE
    )
    run_rank(rank, rank.resume if mode is RunMode.MEASURE_RESUME else training)


def run_rank(rank: Rank, work: Callable[[], None]) -> None:
    """Do a rank's work, leave its last word in its status, and clear up."""
    # DeepSpeed 0.19.8 calls what torch 2.13 has renamed, and torch says so at every call.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)
    rank.stop.expect()
    end_with_launcher()
    follow_beat(rank.run, rank.rank, rank.stop)
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
            nvme_swap.remove_swap_files(path, rank.rank)
        filesystem.remove_shared_buffers(os.environ.get("MASTER_PORT", ""), rank.rank)
        # Without it a gloo process may abort at exit after success.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
