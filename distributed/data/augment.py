"""Random image augmentation of a micro-batch: crops, flips, mixup and cutmix.

Random values depend only on the seed, the step and the rank, so that a resumed run draws the same ones as an
uninterrupted run. torch's global random state is left unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from translution.planner.config import ModelSpec, TrainingSpec, VitSpec

from .base import Samples

_SALT = 0x5EED
"""Mixed into the seeds, so that they differ from those of dropout."""


def _mixup(images: Tensor, classes: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Apply mixup: blend each image with another, by a weight drawn from Beta(alpha, alpha)."""
    from kornia.augmentation import RandomMixUpV2

    # kornia's own generator draws the weights uniformly.
    count = len(images)
    params = {
        "mixup_pairs": torch.randperm(count),
        "mixup_lambdas": torch.distributions.Beta(alpha, alpha).sample((count,)),
        "batch_prob": torch.ones(count),
    }
    mixed, labels = RandomMixUpV2(data_keys=["input", "class"])(images, classes, params=params)
    return mixed, labels


def _cutmix(images: Tensor, classes: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Apply cutmix: replace a rectangle of each image by one of another; its area follows Beta(alpha, alpha)."""
    from kornia.augmentation import RandomCutMixV2

    mixed, labels = RandomCutMixV2(beta=alpha, data_keys=["input", "class"], use_correct_lambda=True)(images, classes)
    # kornia's cutmix gives the weight of the image's own class; its mixup gives the weight of the other class.
    own = labels[0]
    return mixed, torch.stack([own[:, 0], own[:, 1], 1 - own[:, 2]], dim=1)


def soft_targets(labels: Tensor, classes: int) -> Tensor:
    """Return the target distributions (B, classes) of mixed images.

    Args:
        labels: (B, 3): the image's own class, the other image's class, and the weight of the other class.
        classes: number of classes of the model.
    """
    own, other = (one_hot(labels[:, column].long(), classes) for column in (0, 1))
    return own + labels[:, 2:] * (other - own)


class Augmenter:
    """Augments the images of one rank on the host, before the forward pass.

    Args:
        spec: the model; it gives the image size and the number of classes.
        training: the training settings; they choose the augmentations.
        rank: this rank.
        world_size: number of ranks.
    """

    def __init__(self, spec: ModelSpec, training: TrainingSpec, rank: int, world_size: int) -> None:
        self._spec, self._training = spec, training
        self._first = (training.seed * world_size + rank + 1) * 1_000_003
        self._stages: list[Any] = []
        if not training.augmentation:
            return
        assert isinstance(spec, VitSpec)
        from kornia import augmentation

        if training.crop_padding:
            self._stages.append(augmentation.RandomCrop(spec.image, padding=training.crop_padding))
        # Images of files are cropped when they are decoded, where all their pixels are at hand.
        if training.crop_scale < 1 and training.data != "images":
            self._stages.append(augmentation.RandomResizedCrop(spec.image, scale=(training.crop_scale, 1.0)))
        if training.flip:
            self._stages.append(augmentation.RandomHorizontalFlip(p=training.flip))

    def __call__(self, batches: list[Samples], step: int) -> list[Samples]:
        """Augment the micro-batches of a step; mixed images get fp32 target distributions (B, classes)."""
        if not self._training.augmentation:
            return batches
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed((self._first + step) ^ (_SALT << 40))
            return [self._augment(batch) for batch in batches]

    def _augment(self, batch: Samples) -> Samples:
        training, images = self._training, batch.inputs
        for stage in self._stages:
            images = stage(images)
        mixers = [(mix, alpha) for mix, alpha in ((_mixup, training.mixup), (_cutmix, training.cutmix)) if alpha]
        if not mixers:
            return Samples(images, batch.targets)
        mix, alpha = mixers[int(torch.randint(len(mixers), ()))]
        images, labels = mix(images, batch.targets, alpha)
        assert isinstance(self._spec, VitSpec)
        return Samples(images, soft_targets(labels, self._spec.classes))
