"""Handwritten digits: filling the model's image, in its middle, or anywhere in it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from translution.planner.common.errors import MissingPackageError
from translution.planner.config.datasets import DIGITS_CLASSES, DataKind
from translution.planner.config.model import VitSpec

from .base import Samples, DataSource

_MEAN, _DEVIATION = 0.3, 0.38
_TRAINING, _HELD_OUT = 0, 1


def _read(size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised digits (1797, 1, height, width), their classes, and which are held out.

    Raises:
        MissingPackageError: without scikit-learn.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise MissingPackageError("scikit-learn is missing: pip install 'translution-scale[train]'")
    # What its load_digits reads: importing it takes each rank two seconds.
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images = torch.tensor(table[:, :-1].reshape(-1, 1, 8, 8), dtype=torch.float32) / 16
    targets = torch.tensor(table[:, -1], dtype=torch.int64)
    if size != images.shape[2:]:
        images = torch.nn.functional.interpolate(images, size=size, mode="bilinear", antialias=True)
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    for digit in range(DIGITS_CLASSES):
        held_out[torch.nonzero(targets == digit).flatten()[::5]] = True
    return (images - _MEAN) / _DEVIATION, targets, held_out


def load_digits(spec: VitSpec) -> tuple[Samples, Samples]:
    """The handwritten digits of scikit-learn, resized to the model's image: training and held-out.

    Every fifth sample of each class is held out, 364 of 1,797.

    Raises:
        MissingPackageError: without scikit-learn.
    """
    images, targets, held_out = _read(spec.image)
    images = images.expand(-1, spec.channels, -1, -1).contiguous()
    return Samples(images[~held_out], targets[~held_out]), Samples(images[held_out], targets[held_out])


@dataclass(frozen=True)
class PlacedDigits(DataSource):
    """Digits (S, 1, P, P) that are smaller than the image they lie in."""

    digits: Tensor
    targets: Tensor
    channels: int
    image: tuple[int, int]
    """Height and width in pixels."""
    seed: tuple[int, int] | None
    """Of the positions; None puts every digit in the middle."""
    step: tuple[int, int] = (1, 1)
    """Pixels between one position and the next, downwards and to the right; the middle is one of them."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def resident(self) -> list[Tensor]:
        """The digits without their surroundings."""
        return [self.digits, self.targets]

    def corners(self, epoch: int) -> np.ndarray:
        """Row and column of every digit's upper left pixel (S, 2); they depend on the seed and the epoch alone."""
        room, step = np.array(self.image) - self.digits.shape[-1], np.array(self.step)
        middle = room // 2
        if self.seed is None:
            return np.broadcast_to(middle, (len(self), 2))
        drawn = np.random.default_rng((*self.seed, epoch)).integers(
            -(middle // step), (room - middle) // step + 1, size=(len(self), 2)
        )
        return middle + step * drawn

    def select(self, index: Tensor, epoch: int = 0) -> Samples:
        """The digits of an index tensor, where they lie in an epoch: (B, channels, height, width)."""
        size, corners = self.digits.shape[-1], self.corners(epoch)
        inputs = torch.full((len(index), self.channels, *self.image), -_MEAN / _DEVIATION)
        for place, number in enumerate(index.tolist()):
            row, column = corners[number]
            inputs[place, :, row : row + size, column : column + size] = self.digits[number]
        return Samples(inputs, self.targets[index])


def place_digits(spec: VitSpec, size: int, seed: int, kind: DataKind) -> tuple[PlacedDigits, PlacedDigits]:
    """The same digits as `load_digits`, smaller than the image: training and held-out.

    Args:
        spec: the model.
        size: height and width of a digit in pixels.
        seed: of the positions.
        kind: ``digits-static`` puts all in the middle, ``digits-shifted`` each somewhere, training digits elsewhere in
            every epoch; ``digits-patches`` the same, whole patches from the middle.

    Raises:
        MissingPackageError: without scikit-learn.
    """
    digits, targets, held_out = _read((size, size))

    def part(chosen: Tensor, stream: int) -> PlacedDigits:
        own = None if kind == "digits-static" else (seed, stream)
        step = spec.patch if kind == "digits-patches" else (1, 1)
        return PlacedDigits(digits[chosen], targets[chosen], spec.channels, spec.image, own, step)

    return part(~held_out, _TRAINING), part(held_out, _HELD_OUT)
