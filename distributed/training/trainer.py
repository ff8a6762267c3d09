"""Training on one rank: the steps, their measurement, checkpoints, evaluations, metrics and status."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from translution.planner.common import InputError, Phase, write_text
from translution.planner.plans import Plan

from ..checkpoint.integrity import is_verified, verify_checkpoint
from ..checkpoint.manifest import CheckpointRef, EvaluationResult, is_best, newest_checkpoint, write_evaluation
from ..checkpoint.reshard import load_first_weights, load_resharded
from ..checkpoint.resume import layout_changes
from ..checkpoint.save_load import load_checkpoint, prune, replay_bias_correction, save_checkpoint
from ..checkpoint.unpickle import require_harmless
from ..data.augment import Augmenter
from ..data.base import DataSource, Samples
from ..data.batching import micro_batches
from ..data.loaders import load_samples
from ..profiling.recorder import MemoryKind, Recorder, RunPhase, StateSnapshot, run_phase
from ..runs.folder import CHECKPOINT, first_weights, memory_path
from ..runs.measurement import MemoryMeasurement, read_memory
from ..runs.mode import RunMode
from ..runs.status import ANOTHER_RANK
from ..system.signals import IntervalTimer, StopRequest
from .deepspeed_fixes import settled_collectives
from .engine import MODEL_DTYPES, Engine
from .evaluation import Evaluator
from .lr_schedule import learning_rate_factor
from .nonfinite import SkippedSteps, find_nonfinite_gradient, find_nonfinite_layer, is_finite_norm
from .run_log import RunLog

MEASURED_STEP = 3
"""The optimizer step that is measured, counted from 1: by then Adam's moments exist and buffers have their size."""


def is_due(step: int, interval: int) -> bool:
    """True if an action that is due every `interval` steps is due after this step; an interval of 0 means never."""
    return interval > 0 and step % interval == 0


class Trainer:
    """Trains a plan on one rank.

    Args:
        plan: the model and how it is trained.
        run: the run folder, shared by all ranks.
        mode: what the ranks do.
        engine: the rank's engine; by default one for the plan.
    """

    recorder: Recorder
    """Measures this rank's memory; made by `start`."""

    def __init__(self, plan: Plan, run: Path, mode: RunMode = RunMode.TRAIN, engine: Engine | None = None) -> None:
        self.plan, self.run, self.mode = plan, run, mode
        self.engine = engine or Engine(plan)
        self.memory_kind: MemoryKind = "process" if mode.records_process else "allocations"
        self.step = 0
        """Number of the step, from 0; after the last one, the number of steps."""
        self.data_tensors: list[Tensor] = []
        """Tensors of the data set, which do not belong to the training state."""
        self.data_fingerprint: str | None = None
        """Tells whether the data is that with which a checkpoint was trained."""
        self.snapshot: StateSnapshot | None = None
        self.stop = StopRequest()
        # A second launch that measures the run's processes leaves the metrics of the first launch alone.
        writes_metrics = self.engine.rank == 0 and mode is not RunMode.MEASURE_PROCESS
        self.log = RunLog(plan, run, self.engine.rank, writes_metrics=writes_metrics)
        self.evaluator = Evaluator(plan, self.engine, self.log, self.stop)
        self.skipped = SkippedSteps(scaled=plan.training.precision == "fp16")

    def report_status(self, state: str, message: str = "") -> None:
        """Write this rank's status file."""
        self.log.report_status(state, self.step, message)

    def make_recorder(self) -> Recorder:
        """Return a recorder of this rank's memory, which starts to count at the memory in use now."""
        folders = [folder.path for folder in self.engine.swap_folders.values()]
        return Recorder(
            self.plan,
            self.engine.rank,
            self.memory_kind,
            while_tracing=settled_collectives,
            swap_folder=folders[0] if folders else None,
        )

    def load_data(self, global_batch: int) -> tuple[DataSource, DataSource]:
        """Return the training and the held-out samples.

        Args:
            global_batch: samples per step.

        Raises:
            InputError: as `load_samples` does.
        """
        return load_samples(self.plan.model, self.plan.training, global_batch)

    def start(self) -> None:
        """Join the process group and build the engine.

        Raises:
            InputError: if the number of ranks differs from the plan's.
        """
        self.report_status("started")
        self.engine.check_world_size()
        self.engine.claim_swap_folders(self.run)
        self.engine.join_process_group()
        self.recorder = self.make_recorder()
        self.recorder.record(Phase.INIT, self.engine.build_model)
        self.recorder.record(Phase.INIT, self.engine.initialize_engine)

    def forward_backward(self, batches: list[Samples], phase: RunPhase = run_phase) -> float:
        """Run all micro-batches of a step forward and backward; return their mean loss.

        Args:
            batches: the micro-batches.
            phase: called with the name and the work of each forward and backward pass.
        """
        total = 0.0
        loss = torch.zeros(())

        def forward(batch: Samples) -> None:
            nonlocal loss
            loss = self.engine.loss(batch)

        for number, batch in enumerate(batches):
            if number:
                self.engine.micro_step()
            phase(Phase.FORWARD, partial(forward, batch))
            phase(Phase.BACKWARD, lambda: self.engine.backward(loss))
            total += loss.item() / len(batches)
        return total

    def optimizer_step(self) -> None:
        """Clip and apply the gradients at the schedule's learning rate."""
        training = self.plan.training
        epoch_steps = training.epoch_steps if training.lr_schedule == "cosine-epoch" else None
        factor = learning_rate_factor(self.step, training.warmup_steps, training.steps, epoch_steps or 1)
        self.engine.set_learning_rate(training.learning_rate * factor)
        self.engine.micro_step()

    def train_step(self, batches: list[Samples], phase: RunPhase = run_phase) -> float:
        """Do one optimizer step; return the mean loss over the micro-batches of all ranks.

        Raises:
            FloatingPointError: on every rank, if the loss of any rank is not finite; names the first layer whose
                values are not.
        """
        (loss,) = self.engine.mean_over_ranks(self.forward_backward(batches, phase))
        if not math.isfinite(loss):
            where = find_nonfinite_layer(self.engine, batches, self.step)
            raise FloatingPointError(f"step {self.step + 1}: loss is {loss}: {where}")
        phase(Phase.STEP, self.optimizer_step)
        return loss

    def check_gradients(self, batches: list[Samples]) -> None:
        """Stop the run if DeepSpeed skipped the step because of its gradients, unless fp16 is adjusting its loss scale.

        Raises:
            FloatingPointError: on every rank; names the first parameter in backward whose gradient is not finite.
        """
        finite = is_finite_norm(self.engine.gradient_norm()) and not self.engine.overflowed
        scale = self.engine.loss_scale
        if self.skipped.is_diverged(finite=finite, scale=scale):
            where = find_nonfinite_gradient(self.engine, batches, self.step, self.forward_backward)
            raise FloatingPointError(f"step {self.step + 1}: {self.skipped.describe(scale)}{where}")

    def recorded_step(self, batches: list[Samples], measured: int | None) -> float:
        """Do one step and record memory.

        A process is recorded in every phase. Allocations are recorded in the measured step, saved activations in the
        one before, and of the first step only the update, which creates the optimizer states.
        """
        recorder = self.recorder
        if self.step == 0 and (recorder.memory_kind == "process" or measured is not None):
            if measured == 1:
                recorder.expect_saved_tensors(self.engine.module)
            return self.train_step(batches, self._record_first_step)
        if recorder.memory_kind == "process":
            if self.step == measured:
                self.snapshot = recorder.take_snapshot(self.engine.deepspeed_engine, self.data_tensors, batches)
            return self.train_step(batches, recorder.record)
        if measured is None or self.step not in (measured - 1, measured):
            return self.train_step(batches)
        if self.step == measured - 1:
            recorder.expect_saved_tensors(self.engine.module)
            return self.train_step(batches, recorder.count_saved_tensors)
        self.snapshot = recorder.take_snapshot(self.engine.deepspeed_engine, self.data_tensors, batches)
        loss = self.train_step(batches, recorder.record)
        self.log.write(event="memory", step=self.step + 1, peak_bytes=self.write_measurement(measured).peak_bytes)
        return loss

    def _record_first_step(self, name: str, work: Callable[[], None]) -> None:
        if name == Phase.STEP:
            self.recorder.record(Phase.FIRST_STEP, work)
        else:
            self.recorder.count_saved_tensors(name, work)

    def write_measurement(self, step: int) -> MemoryMeasurement:
        """Write everything measured so far."""
        assert self.snapshot is not None
        measurement = self.recorder.measurement(step, self.snapshot)
        self._write(measurement)
        return measurement

    def add_measurement(self) -> None:
        """Add this process's measurement to that of an earlier process of the run, if there is one."""
        before = read_memory(self.run, self.engine.rank)
        if before is None and self.snapshot is not None:
            before = self.recorder.measurement(self.step, self.snapshot)
        if before is not None:
            self._write(self.recorder.add_to(before))

    def _write(self, measurement: MemoryMeasurement) -> None:
        write_text(memory_path(self.run, self.engine.rank), measurement.model_dump_json(indent=2) + "\n")

    def save_checkpoint(self, measured: int | None, evaluation: EvaluationResult | None = None) -> None:
        """Save a checkpoint, with the result of the evaluation before it if there was one, and record its memory."""
        # A second launch that measures the run's processes saves next to the first launch's checkpoint.
        tag = f"process_{self.step}" if self.mode is RunMode.MEASURE_PROCESS else None
        self.engine.progress.move(Phase.SAVE)
        folder, engine = self.run / CHECKPOINT, self.engine.deepspeed_engine
        self.engine.compare_swap_files()
        self.recorder.record(
            Phase.SAVE,
            lambda: save_checkpoint(
                engine, folder, self.step, self.plan, tag=tag, evaluation=evaluation, data=self.data_fingerprint
            ),
        )
        if self.memory_kind == "process":
            self.add_measurement()
        elif measured is not None:
            self.write_measurement(measured)

    def load_checkpoint(self) -> int:
        """Load the run's newest checkpoint into the engine; return its number of steps.

        Raises:
            InputError: if there is none, or it is damaged or belongs to another model.
        """
        folder, engine = self.run / CHECKPOINT, self.engine.deepspeed_engine
        ref = newest_checkpoint(folder)
        if ref is None:
            raise InputError(f"{folder}: holds no complete checkpoint")
        self._check_data(ref)
        self.engine.progress.move(Phase.RESUME)
        # The ranks agree: some may see the shared folder as it was some time ago.
        if self.engine.mean_over_ranks(float(is_verified(self.run, ref))) != [1.0]:
            verify_checkpoint(ref, part=self.engine.rank, parts=self.engine.world_size)
            require_harmless(ref.path, part=self.engine.rank, parts=self.engine.world_size)
            torch.distributed.barrier()  # No rank begins to load what another one finds damaged.
        self.engine.forget_swap_files()
        if layout_changes(self.plan, ref.plan()):
            dtype = MODEL_DTYPES[self.plan.training.states_dtype]
            self.recorder.record(Phase.RESUME, lambda: load_resharded(engine, ref, dtype))
            replay_bias_correction(engine)
        else:
            self.recorder.record(Phase.RESUME, lambda: load_checkpoint(engine, folder, ref.tag))
        return ref.manifest.step

    def _check_data(self, ref: CheckpointRef) -> None:
        """Raise an `InputError` if the training data is not that with which a checkpoint was trained."""
        saved, ours = ref.manifest.data, self.data_fingerprint
        if saved is not None and ours is not None and saved != ours:
            where = self.plan.training.data_path or self.plan.training.data
            raise InputError(
                f"data: {where!r} is not allowed: its content is not what {ref.path} was trained on; start a new run "
                "from its network instead (export, then launch --from)"
            )

    def measure_resume(self) -> None:
        """Build the engine, load the run's checkpoint, and add the memory of this to the run's measurement."""
        self.start()
        self.load_checkpoint()
        self.add_measurement()
        self.report_status("finished")

    def train(self) -> None:
        """Train all steps, save and, unless only memory is measured, evaluate.

        CONTINUE starts at the step of the newest checkpoint.
        """
        training, resume = self.plan.training, self.mode is RunMode.CONTINUE
        evaluates = self.mode in (RunMode.TRAIN, RunMode.CONTINUE)
        global_batch = training.global_batch(self.engine.world_size)
        training_samples, held_out = self.load_data(global_batch)
        self.data_tensors = [*training_samples.resident, *held_out.resident]
        self.data_fingerprint = training_samples.fingerprint()
        # Before the engine: kornia cannot be imported after DeepSpeed has made a model under ZeRO-3.
        self.augment = Augmenter(self.plan.model, training, self.engine.rank, self.engine.world_size)
        self.start()
        first = self.load_checkpoint() if resume else 0
        weights = None if resume else first_weights(self.run)
        if weights is not None:
            load_first_weights(self.engine.deepspeed_engine, weights)
        batches: Iterator[list[Samples]] = micro_batches(
            training_samples,
            micro_batch=training.micro_batch,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            seed=training.seed,
            first_step=first,
        )
        self.log.start(first, self.engine.world_size, resume=resume, monitored=evaluates)
        # Adam has no moments before the first step, so a run of one step measures nothing.
        measured = None if resume else min(MEASURED_STEP, training.steps) - 1 or None
        with self.stop.watching():
            stopped = self.train_steps(batches, first, measured, held_out if evaluates else None)
        if stopped:
            self.report_status("stopped", stopped)
            return
        self.step = training.steps
        if not evaluates and self.evaluator.count(held_out):
            self.recorder.record(Phase.EVALUATION, partial(self.evaluator.evaluate_few, held_out))
        if training.final_checkpoint or not evaluates:
            self.save_checkpoint(measured)
        elif self.memory_kind == "process":
            self.add_measurement()
        if evaluates:
            with self.stop.watching():
                self.finish_evaluation(self.evaluator.evaluate(held_out, self.step))
        self.report_status("finished")

    def is_best(self, result: EvaluationResult | None) -> bool:
        """Return True, on every rank, if the plan keeps the best checkpoint and a result is better than all before."""
        if result is None or not self.plan.training.keep_best:
            return False
        # Rank 0 decides: others may see the shared folder as it was some time ago.
        best = self.engine.rank == 0 and is_best(self.run / CHECKPOINT, result)
        return self.engine.mean_over_ranks(float(best))[0] > 0

    def finish_evaluation(self, result: EvaluationResult | None) -> None:
        """Store the result of the evaluation after the last step with its checkpoint; save one if it must be kept."""
        if result is None:
            return
        folder = self.run / CHECKPOINT
        if self.plan.training.final_checkpoint:
            if self.engine.rank == 0:
                write_evaluation(folder, f"step_{self.step}", result)
                prune(folder, self.plan)
        elif self.is_best(result):
            self.save_checkpoint(None, result)

    def train_steps(
        self, batches: Iterator[list[Samples]], first: int, measured: int | None, held_out: DataSource | None
    ) -> str:
        """Train from a step to the last one, with evaluations and checkpoints.

        Args:
            batches: the micro-batches of each step.
            first: number of the first step, from 0.
            measured: number of the step whose memory is measured.
            held_out: samples to evaluate on, or None.

        Returns:
            The name of the signal that ended training after a checkpoint; empty if none did.
        """
        training, timer = self.plan.training, IntervalTimer(self.plan.training.checkpoint_minutes)
        for self.step in range(first, training.steps):
            began = time.perf_counter()
            loss = self.checked_step(self.augment(next(batches), self.step), measured)
            # All ranks must save after the same step: rank 0's timer decides, or a signal to any rank.
            wanted = float(self.stop.name is not None), float(self.engine.rank == 0 and timer.due())
            stop, due = self.engine.mean_over_ranks(*wanted)
            result = None
            self.log.write_step(self.step + 1, loss, time.perf_counter() - began, self.engine)
            done = self.step + 1
            if self.step % 20 == 0 or self.log.is_status_old():
                self.log.report_status("training", done)
            if stop:
                self.stop.notice()
            elif held_out is not None and done < training.steps and is_due(done, training.evaluation_steps):
                result = self.evaluator.evaluate(held_out, done)
                self.log.report_status("training", done)
            wanted_now = stop or due or is_due(done, training.checkpoint_steps) or self.is_best(result)
            if done < training.steps and wanted_now:
                self.step = done
                self.save_checkpoint(None, result)
                timer.restart()
                if stop:
                    return self.stop.name or ANOTHER_RANK
        return ""

    def checked_step(self, batches: list[Samples], measured: int | None) -> float:
        """Do one step with its own random seed, and stop the run if its gradients are not finite."""
        self.engine.seed_step(self.step)
        loss = self.recorded_step(batches, measured)
        self.check_gradients(batches)
        return loss
