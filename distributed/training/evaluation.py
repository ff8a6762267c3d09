"""Evaluation of held-out samples: how many, in passes of which size, with progress in the metrics and the status."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from translution.planner.plans import Plan

from ..checkpoint.manifest import EvaluationResult
from ..data.base import DataSource, Samples
from ..system.signals import StopRequest
from .engine import Engine, has_top5
from .run_log import RunLog

_LARGEST_EXPONENT = 709.0
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


def perplexity(loss: float) -> float | None:
    """Return the exponential of a loss; None above the largest float, and for a loss that is not a number."""
    return math.exp(loss) if loss < _LARGEST_EXPONENT else None


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

    def evaluate(self, held_out: DataSource, step: int) -> EvaluationResult | None:
        """Evaluate after a number of steps, write the progress and the result, and return it.

        A signal to any rank ends the evaluation without a result. There is none without samples either.
        """
        count, micro_batch = evaluation_size(self.plan, len(held_out))
        if not count:
            return None
        self.log.report_status("evaluating", step, f"{count} held-out samples")
        result = self._passes(held_out, count, micro_batch, partial(self._goes_on, step, count))
        if result is not None:
            self.log.write_evaluation(step, result)
        return result

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
    ) -> EvaluationResult | None:
        """Return the means over held-out samples; each sample counts once. None if the evaluation was ended.

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
        totals = torch.zeros(4, dtype=torch.float64, device=engine.deepspeed_engine.device)
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
        loss, right, right_of_five = (totals[1:] / totals[0]).tolist()
        return EvaluationResult(
            samples=count,
            loss=loss,
            accuracy=right,
            top5_accuracy=right_of_five if has_top5(self.plan.model) else None,
            perplexity=perplexity(loss) if self.plan.model.family == "gpt" else None,
        )

    def _one_pass(self, batch: Samples, counted: Tensor) -> Tensor:
        """Return the number of predictions of the counted samples, the sum of their losses, and how many are right.

        The last value is the number with the right class among five, or 0.

        Args:
            batch: B samples.
            counted: which samples count (B,).
        """
        losses, right = self.engine.scores(batch)
        counts = counted.to(losses.device).repeat_interleave(losses.numel() // len(counted))
        sums = torch.zeros(4, dtype=torch.float64, device=losses.device)
        sums[0], sums[1] = counts.sum(), (losses.double() * counts).sum()
        sums[2 : 2 + len(right)] = (right & counts).sum(-1)
        return sums
