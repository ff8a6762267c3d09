"""Time, GPU-hours and price of a whole run."""

from __future__ import annotations

from ..common.schema import Schema
from ..config.run_config import TrainingSpec
from ..hardware.cluster import ClusterSpec
from .step_time import StepTime


class RunCost(Schema):
    """Cost of all steps of a run."""

    steps: int
    """Optimizer steps."""
    samples: int
    """Samples of all steps over all ranks."""
    low_s: float
    likely_s: float
    high_s: float
    """Seconds of all steps: low, likely and high prediction."""
    gpu_hours: float
    price: float | None
    """Price at the cluster's price per GPU-hour; null if the cluster has none."""


def run_cost(time: StepTime, cluster: ClusterSpec, training: TrainingSpec) -> RunCost:
    """Multiply the predicted time of one step by the number of steps.

    Args:
        time: predicted time of one step.
        cluster: gives the number of ranks and the price.
        training: gives the number of steps and the batch.
    """
    hours = time.likely_s * training.steps * cluster.world_size / 3600
    price = cluster.price_per_gpu_hour
    return RunCost(
        steps=training.steps,
        samples=training.steps * training.global_batch(cluster.world_size),
        low_s=time.low_s * training.steps,
        likely_s=time.likely_s * training.steps,
        high_s=time.high_s * training.steps,
        gpu_hours=hours,
        price=None if price is None else price * hours,
    )
