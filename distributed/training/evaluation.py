"""Evaluation of held-out samples: how many, in passes of which size, with progress in the metrics and the status."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from translution.planner.plans import Plan

from ..data.base import DataSource, Samples
from ..system.signals import StopRequest
from .engine import Engine
from .run_log import RunLog

MEASURED_PASSES = 2
"""Passes of an evaluation whose memory is measured: later ones allocate what the second does."""


def evaluation_size(plan: Plan, available: int) -> tuple[int, int]:
    """Return the number of samples that a run evaluates, and the samples of a rank in one pass.

    Args:
        plan: the plan.
        available: number of held-out samples.
    """
    planned, training = plan.evaluation, plan.training
    if planned is None:
        # A plan of an earlier version has no planned evaluation.
        given = training.evaluation_samples
        limit = given if isinstance(given, int) else 0
        return (min(limit or available, available) if training.evaluates else 0), training.micro_batch
    return min(available, available if planned.max_samples is None else planned.max_samples), planned.micro_batch


class Evaluator:
    """Evaluates held-out samples on one rank.

    Args:
        plan: gives the number of samples and the size of a pass.
        engine: the rank's engine.
        log: receives the progress and the result.
        stop: a request ends the evaluation.
    """

    def __init__(self, plan: Plan, engine: Engine, log: RunLog, stop: StopRequest) -> None:
        self.plan, self.engine, self.log, self.stop = plan, engine, log, stop

    def count(self, held_out: DataSource) -> int:
        """Return the number of samples that are evaluated."""
        return evaluation_size(self.plan, len(held_out))[0]

    def evaluate(self, held_out: DataSource, step: int) -> None:
        """Evaluate after a number of steps, and write the progress and the result.

        A signal to any rank ends the evaluation without a result.
        """
        count, micro_batch = evaluation_size(self.plan, len(held_out))
        if not count:
            return
        self.log.report_status("evaluating", step, f"{count} held-out samples")
        result = self._passes(held_out, count, micro_batch, partial(self._goes_on, step, count))
        if result is not None:
            self.log.write_evaluation(step, *result, count)

    def evaluate_few(self, held_out: DataSource) -> None:
        """Evaluate `MEASURED_PASSES` passes, of which nothing is written, for a measurement of their memory."""
        count, micro_batch = evaluation_size(self.plan, len(held_out))
        few = min(count, MEASURED_PASSES * micro_batch * self.engine.world_size)
        if few:
            self._passes(held_out, few, micro_batch, lambda _: True)

    def _goes_on(self, step: int, count: int, done: int) -> bool:
        """Write the progress; return whether the evaluation goes on, the same on every rank."""
        self.log.write_progress(step, done, count)
        (stop,) = self.engine.mean_over_ranks(float(self.stop.name is not None))
        return not stop

    @torch.no_grad()
    def _passes(
        self, held_out: DataSource, count: int, micro_batch: int, on_pass: Callable[[int], bool]
    ) -> tuple[float, float] | None:
        """Return mean loss and accuracy of held-out samples; each sample counts once. None if the evaluation was ended.

        Every rank runs the same number of passes, because ZeRO-3 gathers parameters on all ranks at once. A rank
        that has no sample left repeats one and does not count it.

        Args:
            held_out: the samples.
            count: number of samples to evaluate, evenly spaced.
            micro_batch: samples that a rank evaluates in a pass.
            on_pass: called with the number of samples done before each pass; False ends the evaluation, and must be
                returned on all ranks.
        """
        engine = self.engine
        engine.deepspeed_engine.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=engine.deepspeed_engine.device)
        try:
            for start in range(0, count, micro_batch * engine.world_size):
                if not on_pass(start):
                    return None
                index = torch.arange(micro_batch) + start + engine.rank * micro_batch
                # Spread over the whole set: its samples may be sorted by class.
                batch = held_out.select(index.clamp(max=count - 1) * len(held_out) // count)
                totals += self._one_pass(batch, index < count)
        finally:
            engine.deepspeed_engine.train()
        torch.distributed.all_reduce(totals)
        return float(totals[0] / totals[2]), float(totals[1] / totals[2])

    def _one_pass(self, batch: Samples, counted: Tensor) -> Tensor:
        """Return the sum of losses, the number of right predictions and the number of all, of the counted samples.

        Args:
            batch: B samples.
            counted: which samples count (B,).
        """
        losses, right = self.engine.scores(batch)
        counts = counted.to(losses.device).repeat_interleave(losses.numel() // len(counted))
        return torch.stack([(losses.double() * counts).sum(), (right & counts).sum().double(), counts.sum().double()])
