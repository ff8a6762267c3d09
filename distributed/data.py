"""The samples a run trains on, in an order that does not depend on the number of ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from translution.planner.data_kinds import PLACED_DIGITS, DataKind, check_kind, digit_size
from translution.planner.errors import InputError
from translution.planner.model_spec import GptSpec, ModelSpec, VitSpec
from translution.planner.training import TrainingSpec

_SYNTHETIC_SAMPLES = 4096


class Source(ABC):
    """Samples that are made or read when a micro-batch needs them."""

    @property
    def resident(self) -> list[Tensor]:
        """Tensors that are held for the whole run."""
        return []

    @abstractmethod
    def __len__(self) -> int:
        """How many samples an epoch has."""

    def expect(self, index: Tensor) -> None:  # noqa: B027 - most have nothing to begin
        """Begin to read samples that will soon be asked for, where that takes time.

        Args:
            index: their numbers (B,).
        """

    @abstractmethod
    def select(self, index: Tensor, epoch: int = 0) -> Samples:
        """A micro-batch.

        Args:
            index: numbers of samples (B,); what they give depends on nothing else but the epoch.
            epoch: for what is drawn anew in each; 0 for held-out samples.

        Raises:
            InputError: if what was to be read is damaged.
        """


@dataclass(frozen=True)
class Samples(Source):
    """Inputs (S, …) with their targets (S,) or (S, context)."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def resident(self) -> list[Tensor]:
        """The tensors themselves."""
        return [self.inputs, self.targets]

    def select(self, index: Tensor, epoch: int = 0) -> Samples:
        """The samples of an index tensor, the same in every epoch."""
        return Samples(self.inputs[index], self.targets[index])


def make_synthetic(spec: ModelSpec, seed: int, step: int = 1) -> tuple[Samples, Samples]:
    """Random samples of the model's shape, for load tests; nothing can be learned from them.

    Args:
        spec: the model.
        seed: of the samples.
        step: samples of a global batch; there are at least so many to train on.
    """
    generator = torch.Generator().manual_seed(seed)
    count = max(_SYNTHETIC_SAMPLES, 2 * step)
    if isinstance(spec, VitSpec):
        # One image viewed count times: the memory of a load test belongs to the model.
        inputs = torch.randn(1, spec.channels, *spec.image, generator=generator).expand(count, -1, -1, -1)
        samples = Samples(inputs, torch.randint(spec.classes, (count,), generator=generator))
    else:
        assert isinstance(spec, GptSpec)
        text = torch.randint(spec.vocabulary, (count + spec.context,), generator=generator)
        windows = text.unfold(0, spec.context + 1, 1)
        samples = Samples(windows[:, :-1], windows[:, 1:])
    cut = count - _SYNTHETIC_SAMPLES // 4
    return Samples(samples.inputs[:cut], samples.targets[:cut]), Samples(samples.inputs[cut:], samples.targets[cut:])


def load_samples(spec: ModelSpec, training: TrainingSpec, step: int = 1) -> tuple[Source, Source]:
    """Training and held-out samples of a plan.

    Args:
        spec: the model.
        training: says which data.
        step: samples of a global batch.

    Raises:
        InputError: if the data does not suit the model, is absent or damaged.
        MissingPackageError: without a package that reads it.
    """
    samples, held_out = _load(spec, training, training.data, step)
    if training.evaluation_data not in (None, training.data):
        _, held_out = _load(spec, training, training.evaluation_data, step)
    return samples, held_out


def _load(spec: ModelSpec, training: TrainingSpec, kind: DataKind, step: int) -> tuple[Source, Source]:
    check_kind(spec, kind, training.digit_pixels)
    # Each has packages of its own, which the others do without.
    if isinstance(spec, VitSpec):
        if kind == "digits":
            from .digits import load_digits

            return load_digits(spec)
        if kind in PLACED_DIGITS:
            from .digits import place_digits

            size = digit_size(spec, training.digit_pixels)
            return place_digits(spec, size, training.seed, kind)
        if kind == "images":
            from .images import load_images

            return load_images(spec, Path(str(training.data_path)), training.corrupt_limit)
    elif kind == "tokens":
        from .tokens import load_tokens

        return load_tokens(spec, Path(str(training.data_path)))
    elif kind == "stdlib":
        from .tokens import load_stdlib

        return load_stdlib(spec)
    return make_synthetic(spec, training.seed, step)


def micro_batches(
    samples: Source, *, micro_batch: int, accumulation: int, rank: int, ranks: int, seed: int, first_step: int = 0
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
    step = micro_batch * accumulation * ranks
    if step > len(samples):
        raise InputError(f"global batch: {step} is not allowed: must be at most {len(samples)}, the training samples")
    shares = _shares(len(samples), step, (accumulation, ranks, micro_batch), seed, first_step)
    epoch, share = next(shares)
    while True:
        batches = [samples.select(index, epoch) for index in share[:, rank]]
        epoch, share = next(shares)
        samples.expect(share[:, rank].flatten())
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
