"""Micro-batches of a rank, in an order that depends only on the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from translution.planner.common import InputError

from .base import DataSource, Samples


def micro_batches(
    samples: DataSource,
    *,
    micro_batch: int,
    gradient_accumulation_steps: int,
    rank: int,
    world_size: int,
    seed: int,
    first_step: int = 0,
) -> Iterator[list[Samples]]:
    """Yield one rank's micro-batches of each step, indefinitely.

    The global batch of a step does not depend on the number of ranks; ranks split it without
    overlap. A new random order begins when too few samples are left for a full step.

    Args:
        samples: the training samples.
        micro_batch: samples per micro-batch.
        gradient_accumulation_steps: micro-batches per step and rank.
        rank: rank whose micro-batches to yield.
        world_size: number of ranks.
        seed: seed of the random order.
        first_step: number of steps already done, for a resumed run.

    Raises:
        InputError: if one step needs more samples than the source has.
    """
    step = micro_batch * gradient_accumulation_steps * world_size
    if step > len(samples):
        raise InputError(f"global batch: {step} is not allowed: must be at most {len(samples)}, the training samples")
    shares = _shares(len(samples), step, (gradient_accumulation_steps, world_size, micro_batch), seed, first_step)
    epoch, share = next(shares)
    while True:
        batches = [[samples.select(index, epoch) for index in share[:, rank]]]
        epoch, share = next(shares)
        samples.prefetch(share[:, rank].flatten(), epoch)
        # Nothing here refers to them during the step: augmented ones would lie in memory twice.
        yield batches.pop()


def _shares(
    count: int, step: int, shape: tuple[int, int, int], seed: int, first_step: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield each step's epoch and sample indices, shaped (accumulation, ranks, micro-batch)."""
    epoch, done = divmod(first_step, count // step)
    while True:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        # Copied out of torch's memory, which a run measures: the order of the samples is not training state.
        order = torch.from_numpy(order.numpy().copy())
        for start in range(done * step, count - step + 1, step):
            yield epoch, order[start : start + step].view(shape)
        epoch, done = epoch + 1, 0
