"""Plans the evaluation of held-out samples: how many at a time, how many at most, and what it costs."""

from __future__ import annotations

from ..common.errors import InputError
from ..common.phases import Tier
from ..common.schema import Schema
from ..common.types import NonNegative, Positive
from ..config.run_config import RunConfig
from ..memory.estimate import MemoryEstimate, PhasePeak, evaluation_peaks
from ..timing.step_time import StepTime, evaluation_seconds

TRAINING_FRACTION = 0.1
"""Fraction of the training's predicted time that evaluations take by default, all together."""
MAX_BATCH = 1024
"""Largest number of samples that a rank evaluates at once."""


class EvaluationPlan(Schema):
    """How held-out samples are evaluated, and the predicted time."""

    micro_batch: Positive
    """Samples that a rank evaluates at once."""
    max_samples: NonNegative | None
    """Samples that are evaluated at most; null evaluates every held-out sample."""
    low_s: float | None = None
    likely_s: float | None = None
    high_s: float | None = None
    """Seconds of one pass, in which every rank evaluates a micro-batch; null if the cluster lacks a rate."""

    def passes(self, samples: int, world_size: int) -> int:
        """Return the number of passes that evaluate a number of samples."""
        return -(-samples // (self.micro_batch * world_size))


def _fitting_batch(run: RunConfig, prediction: MemoryEstimate, wanted: int) -> int:
    """Return the largest micro-batch, up to what is wanted, whose memory stays below that of training on every tier.

    It is the training's micro-batch times a power of two.
    """
    limits = {tier: prediction.highest(tier) for tier in prediction.tiers}

    def fits(batch: int) -> bool:
        return all(peak.bytes <= limits.get(peak.tier, 0) for peak in evaluation_peaks(run, batch))

    batch = run.training.micro_batch
    # Memory grows linearly with the batch: two simulations give the slope, and a third one checks the result.
    if wanted <= batch or not fits(2 * batch):
        return batch
    first, second = (evaluation_peaks(run, size) for size in (batch, 2 * batch))
    factor = 2
    while factor * batch < wanted and _extrapolated_fits(first, second, 2 * factor, limits):
        factor *= 2
    while factor > 2 and not fits(factor * batch):
        factor //= 2
    return factor * batch


def _extrapolated_fits(
    first: tuple[PhasePeak, ...], second: tuple[PhasePeak, ...], factor: int, limits: dict[Tier, int]
) -> bool:
    slopes = {peak.tier: peak.bytes for peak in second}
    return all(
        peak.bytes + (factor - 1) * (slopes[peak.tier] - peak.bytes) <= limits.get(peak.tier, 0) for peak in first
    )


def plan_evaluation(run: RunConfig, prediction: MemoryEstimate, time: StepTime | None) -> EvaluationPlan | None:
    """Plan the evaluations of a run; None if it has none, as under FSDP2.

    The micro-batch is the largest that needs no more memory than training does. By default the number of samples is
    bounded so that all evaluations together take `TRAINING_FRACTION` of the training's likely time.

    Args:
        run: what is trained, where and how.
        prediction: predicted memory of training.
        time: predicted time of a step; None if the cluster lacks a rate, which leaves the number unbounded.
    """
    training, ranks = run.training, run.world_size
    if not training.evaluates or run.zero.uses_fsdp2:
        return None
    given = training.evaluation_samples if isinstance(training.evaluation_samples, int) else 0
    wanted = min(MAX_BATCH, -(-given // ranks)) if given else MAX_BATCH
    batch = _fitting_batch(run, prediction, max(wanted, 1))
    if batch > wanted > training.micro_batch:
        batch = wanted
    if training.evaluation_samples != "auto" or time is None:
        return _timed(run, batch, given or None)
    count = 1 + ((training.steps - 1) // training.evaluation_steps if training.evaluation_steps else 0)
    allowed = TRAINING_FRACTION * time.likely_s * training.steps / count
    while batch > training.micro_batch and evaluation_seconds(run, batch)[1] > allowed:
        batch = max(training.micro_batch, batch // 2)
    passes = max(1, int(allowed / evaluation_seconds(run, batch)[1]))
    return _timed(run, batch, passes * batch * ranks)


def _timed(run: RunConfig, batch: int, limit: int | None) -> EvaluationPlan:
    try:
        low, likely, high = evaluation_seconds(run, batch)
    except InputError:
        return EvaluationPlan(micro_batch=batch, max_samples=limit)
    return EvaluationPlan(micro_batch=batch, max_samples=limit, low_s=low, likely_s=likely, high_s=high)


def with_evaluation(
    run: RunConfig, prediction: MemoryEstimate, evaluation: EvaluationPlan | None, rank: int | None = None
) -> MemoryEstimate:
    """Return a memory estimate with the peaks of the evaluation added.

    Args:
        run: what is trained, where and how.
        prediction: predicted memory without evaluation.
        evaluation: the planned evaluation; None adds nothing.
        rank: number of the rank; None is the rank that holds the most.
    """
    if evaluation is None:
        return prediction
    peaks = (*prediction.peaks, *evaluation_peaks(run, evaluation.micro_batch, rank))
    return prediction.model_copy(update={"peaks": peaks})
