"""The learning-rate schedule: linear warm-up, then a cosine."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, warmup_steps: int, steps: int) -> float:
    """Factor of the peak learning rate at a step, counted from 0: linear warm-up, then a cosine to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
