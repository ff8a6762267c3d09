"""Images of a micro-batch changed at random: cropped, mirrored, and mixed with each other.

Everything is drawn anew from the seed, the step and the rank, so that a resumed run draws what the
uninterrupted one does, and what comes before and after in torch's random state stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from translution.planner.config.model import ModelSpec, VitSpec
from translution.planner.config.training import TrainingSpec

from .base import Samples

_SALT = 0x5EED
"""Sets the seeds apart from those of dropout."""


def _mix(images: Tensor, classes: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Each image faded into another by a share drawn from Beta(alpha, alpha), as `Augmenter` has it."""
    from kornia.augmentation import RandomMixUpV2

    # kornia's own generator draws the shares evenly.
    count = len(images)
    params = {
        "mixup_pairs": torch.randperm(count),
        "mixup_lambdas": torch.distributions.Beta(alpha, alpha).sample((count,)),
        "batch_prob": torch.ones(count),
    }
    mixed, labels = RandomMixUpV2(data_keys=["input", "class"])(images, classes, params=params)
    return mixed, labels


def _cut(images: Tensor, classes: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """In each image a rectangle of another, its area by Beta(alpha, alpha)."""
    from kornia.augmentation import RandomCutMixV2

    mixed, labels = RandomCutMixV2(beta=alpha, data_keys=["input", "class"], use_correct_lambda=True)(images, classes)
    # kornia's share is the one that stays, here; in mixup it is the other's.
    stays = labels[0]
    return mixed, torch.stack([stays[:, 0], stays[:, 1], 1 - stays[:, 2]], dim=1)


def soft_targets(labels: Tensor, classes: int) -> Tensor:
    """Targets (B, classes) of mixed images.

    Args:
        labels: (B, 3): the image's own class, the other's, and the other's share.
        classes: of the model.
    """
    own, other = (one_hot(labels[:, column].long(), classes) for column in (0, 1))
    return own + labels[:, 2:] * (other - own)


class Augmenter:
    """What a plan does to a rank's images before the forward pass, on the host.

    Args:
        spec: the model, which gives the images' size and the classes.
        training: what to do.
        rank: which rank this is, of
        ranks: so many.
    """

    def __init__(self, spec: ModelSpec, training: TrainingSpec, rank: int, ranks: int) -> None:
        self._spec, self._training = spec, training
        self._first = (training.seed * ranks + rank + 1) * 1_000_003
        self._stages: list[Any] = []
        if not training.augmentation:
            return
        assert isinstance(spec, VitSpec)
        from kornia import augmentation

        if training.crop_padding:
            self._stages.append(augmentation.RandomCrop(spec.image, padding=training.crop_padding))
        if training.crop_scale < 1:
            self._stages.append(augmentation.RandomResizedCrop(spec.image, scale=(training.crop_scale, 1.0)))
        if training.flip:
            self._stages.append(augmentation.RandomHorizontalFlip(p=training.flip))

    def __call__(self, batches: list[Samples], step: int) -> list[Samples]:
        """The micro-batches of a step, changed; targets of mixed images are shares (B, classes) in fp32."""
        if not self._training.augmentation:
            return batches
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed((self._first + step) ^ (_SALT << 40))
            return [self._augment(batch) for batch in batches]

    def _augment(self, batch: Samples) -> Samples:
        training, images = self._training, batch.inputs
        for stage in self._stages:
            images = stage(images)
        ways = [(way, alpha) for way, alpha in ((_mix, training.mixup), (_cut, training.cutmix)) if alpha]
        if not ways:
            return Samples(images, batch.targets)
        way, alpha = ways[int(torch.randint(len(ways), ()))]
        images, labels = way(images, batch.targets, alpha)
        assert isinstance(self._spec, VitSpec)
        return Samples(images, soft_targets(labels, self._spec.classes))
