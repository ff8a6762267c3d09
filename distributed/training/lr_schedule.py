"""The learning-rate schedule: linear warm-up, then a cosine."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, warmup_steps: int, steps: int, epoch_steps: int = 1) -> float:
    """Factor of the peak learning rate at a step: linear warm-up, then a cosine to zero.

    Args:
        step: number of the step, from 0.
        warmup_steps: steps of the warm-up.
        steps: steps of the whole run.
        epoch_steps: steps after which the cosine falls; it is constant in between.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    # The last epoch may be short.
    epochs = -(-(steps - warmup_steps) // epoch_steps)
    return 0.5 * (1 + math.cos(math.pi * ((step - warmup_steps) // epoch_steps) / max(1, epochs)))
