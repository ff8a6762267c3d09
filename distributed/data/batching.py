"""The micro-batches of a rank, in an order that depends on the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from translution.planner.common.errors import InputError

from .base import Samples, DataSource


def micro_batches(
    samples: DataSource,
    *,
    micro_batch: int,
    gradient_accumulation_steps: int,
    rank: int,
    ranks: int,
    seed: int,
    first_step: int = 0,
) -> Iterator[list[Samples]]:
    """One rank's micro-batches of every step, without end.

    The global batch of a step is the same whatever the number of ranks; ranks share it without
    overlap. A new random order begins when too few samples are left for a whole step.

    Args:
        samples: the training samples.
        micro_batch: samples per micro-batch.
        accumulation: micro-batches per step.
        rank: which share to give.
        ranks: number of shares.
        seed: of the order.
        first_step: the step to begin with, for a run that is resumed.

    Raises:
        InputError: if one step needs more samples than there are.
    """
    step = micro_batch * gradient_accumulation_steps * ranks
    if step > len(samples):
        raise InputError(f"global batch: {step} is not allowed: must be at most {len(samples)}, the training samples")
    shares = _shares(len(samples), step, (gradient_accumulation_steps, ranks, micro_batch), seed, first_step)
    epoch, share = next(shares)
    while True:
        batches = [samples.select(index, epoch) for index in share[:, rank]]
        epoch, share = next(shares)
        samples.prefetch(share[:, rank].flatten())
        yield batches


def _shares(
    count: int, step: int, shape: tuple[int, int, int], seed: int, first_step: int
) -> Iterator[tuple[int, Tensor]]:
    """The epoch of every step, and its samples in a shape of (accumulation, ranks, micro-batch)."""
    epoch, done = divmod(first_step, count // step)
    while True:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        # Copied out of torch's memory, which a run measures: the order of a million samples is no part of its state.
        order = torch.from_numpy(order.numpy().copy())
        for start in range(done * step, count - step + 1, step):
            yield epoch, order[start : start + step].view(shape)
        epoch, done = epoch + 1, 0
