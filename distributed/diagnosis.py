"""What has gone wrong in a step whose loss or gradients are not finite: its micro-batches run again, watched.

Every rank makes the same calls, as ZeRO's collectives require, and gets the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from .data import Samples
from .finite import first_bad_gradient, first_not_finite
from .rank import EngineRank


def find_in_forward(rank: EngineRank, batches: list[Samples]) -> str:
    """What is not finite first when a step's micro-batches run forward.

    Args:
        rank: this rank, whose parameters are those of the step.
        batches: its micro-batches.
    """
    rank.seed_step()
    own = [first_not_finite(rank.engine.module, partial(rank.loss, batch)) for batch in batches]
    everywhere: list[str | None] = [None] * rank.ranks
    torch.distributed.all_gather_object(everywhere, next((text for text in own if text), None))
    for number, text in enumerate(everywhere):
        if text:
            return f"first not finite: {text}" + (f", on rank {number}" if rank.ranks > 1 else "")
    return "all is finite in a second forward pass"


def find_in_backward(rank: EngineRank, batches: list[Samples], passes: Callable[[list[Samples]], float]) -> str:
    """Where a step's gradients are first not finite; nothing if that does not show again.

    Args:
        rank: this rank, whose parameters are those of the step.
        batches: its micro-batches.
        passes: runs them forward and backward, and gives the mean loss.
    """
    from deepspeed.utils import safe_get_full_grad

    rank.seed_step()
    (loss,) = rank.mean_over_ranks(passes(batches))
    name = first_bad_gradient(rank.engine.module, safe_get_full_grad) if math.isfinite(loss) else None
    return f": first not finite, from the loss backwards: {name} (gradient)" if name else ""
