"""The samples a run trains on, in an order that does not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from translution.planner.errors import InputError, MissingPackageError
from translution.planner.model_spec import GptSpec, ModelSpec, VitSpec

DIGITS_IMAGE = (8, 8)
DIGITS_CLASSES = 10
_SYNTHETIC_SAMPLES = 4096


@dataclass(frozen=True)
class Samples:
    """Inputs (S, …) with their targets (S,) or (S, context)."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, index: Tensor) -> Samples:
        """The samples of an index tensor."""
        return Samples(self.inputs[index], self.targets[index])


def load_digits(spec: ModelSpec) -> tuple[Samples, Samples]:
    """The handwritten digits of scikit-learn, resized to the model's image: training and held-out.

    Every fifth sample of each class is held out, 364 of 1,797.

    Raises:
        InputError: if the model does not classify images into at least ten classes.
        MissingPackageError: without scikit-learn.
    """
    if not isinstance(spec, VitSpec) or spec.classes < DIGITS_CLASSES:
        raise InputError("data: 'digits' is not allowed: must be used with a vit model of at least 10 classes")
    try:
        from sklearn import datasets
    except ImportError:
        raise MissingPackageError("scikit-learn is missing: pip install 'translution-scale[train]'") from None
    bunch = datasets.load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    targets = torch.tensor(bunch.target, dtype=torch.int64)
    if spec.image != DIGITS_IMAGE:
        images = torch.nn.functional.interpolate(images, size=spec.image, mode="bilinear", antialias=True)
    images = (images - 0.3) / 0.38
    images = images.expand(-1, spec.channels, -1, -1).contiguous()
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    for digit in range(DIGITS_CLASSES):
        held_out[torch.nonzero(targets == digit).flatten()[::5]] = True
    return Samples(images[~held_out], targets[~held_out]), Samples(images[held_out], targets[held_out])


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


def load_samples(spec: ModelSpec, data: str, seed: int, step: int = 1) -> tuple[Samples, Samples]:
    """Training and held-out samples of a plan, as `load_digits` and `make_synthetic` describe.

    Raises:
        InputError: if the data does not suit the model.
    """
    return load_digits(spec) if data == "digits" else make_synthetic(spec, seed, step)


def micro_batches(
    samples: Samples, *, micro_batch: int, accumulation: int, rank: int, ranks: int, seed: int, first_step: int = 0
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
    epoch, done = divmod(first_step, len(samples) // step)
    while True:
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for start in range(done * step, len(samples) - step + 1, step):
            shares = order[start : start + step].view(accumulation, ranks, micro_batch)
            yield [samples.select(shares[n, rank]) for n in range(accumulation)]
        epoch, done = epoch + 1, 0
