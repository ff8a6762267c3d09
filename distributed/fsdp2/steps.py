"""What a training script needs besides the network: the batches of each step, their loss, and the learning rate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from translution.planner.plans import Plan

from ..data.augment import Augmenter
from ..data.base import Samples
from ..data.batching import micro_batches
from ..data.loaders import load_samples
from ..training.engine import MODEL_DTYPES, smoothed_cross_entropy
from ..training.lr_schedule import learning_rate_factor


def training_steps(plan: Plan, mesh: DeviceMesh, first: int = 0) -> Iterator[tuple[int, list[Samples]]]:
    """Yield the number of each step, from ``first`` on, and this rank's micro-batches: those that DeepSpeed would get.

    Before a step torch is seeded for this rank, so that dropout depends only on the step and the rank.

    Args:
        plan: gives the data and the batch.
        mesh: the ranks.
        first: number of steps already done.

    Raises:
        InputError: if the data is missing or does not suit the model.
    """
    training, rank, world_size = plan.training, mesh.get_rank(), mesh.size()
    samples, _ = load_samples(plan.model, training, training.global_batch(world_size))
    augment = Augmenter(plan.model, training, rank, world_size)
    batches = micro_batches(
        samples,
        micro_batch=training.micro_batch,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        rank=rank,
        world_size=world_size,
        seed=training.seed,
        first_step=first,
    )
    for step in range(first, training.steps):
        torch.manual_seed((training.seed * world_size + rank + 1) * 1_000_003 + step)
        yield step, augment(next(batches), step)


def batch_loss(plan: Plan, network: nn.Module, batch: Samples) -> Tensor:
    """Return the mean cross-entropy of a micro-batch in fp32, a scalar."""
    training, device = plan.training, plan.cluster.device
    inputs, targets = batch.inputs.to(device), batch.targets.to(device)
    if inputs.is_floating_point():
        inputs = inputs.to(MODEL_DTYPES[training.precision])
    return smoothed_cross_entropy(network(inputs).flatten(0, -2).float(), targets, training.label_smoothing)


def learning_rate(plan: Plan, step: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    training = plan.training
    epoch_steps = training.epoch_steps if training.lr_schedule == "cosine-epoch" else None
    return training.learning_rate * learning_rate_factor(step, training.warmup_steps, training.steps, epoch_steps or 1)


def newest_step(run: Path) -> int:
    """Return the number of steps of a run's newest complete checkpoint, ``step_N``; 0 if there is none.

    torch.distributed.checkpoint writes ``.metadata`` when the shares of all ranks are written.
    """
    names = [path.parent.name for path in run.glob("step_*/.metadata")]
    return max((int(name[5:]) for name in names if re.fullmatch(r"step_\d+", name)), default=0)
