"""Handwritten digits from scikit-learn: resized to the model's image, placed within it, or moving across a clip."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from translution.planner.common import MissingPackageError
from translution.planner.config import DIGITS_CLASSES, DataKind, VideoSpec, VitSpec

from .base import DataSource, Samples

_MEAN, _DEVIATION = 0.3, 0.38
_TRAINING, _HELD_OUT = 0, 1


def _read(size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return normalized digits (1797, 1, height, width), their classes (1797,), and a held-out mask (1797,).

    Raises:
        MissingPackageError: if scikit-learn is not installed.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise MissingPackageError("scikit-learn is missing: pip install 'translution-scale[train]'")
    # Read the file behind scikit-learn's load_digits: importing scikit-learn takes each rank two seconds.
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
    """Return scikit-learn's handwritten digits, resized to the model's image: training and held-out samples.

    Every fifth sample of each class is held out, 364 of 1,797.

    Raises:
        MissingPackageError: if scikit-learn is not installed.
    """
    images, targets, held_out = _read(spec.image)
    images = images.expand(-1, spec.channels, -1, -1).contiguous()
    return Samples(images[~held_out], targets[~held_out]), Samples(images[held_out], targets[held_out])


@dataclass(frozen=True)
class _SmallDigits(DataSource):
    """Digits (S, 1, P, P) that are smaller than the image."""

    digits: Tensor
    targets: Tensor
    channels: int
    image: tuple[int, int]
    """Height and width of the image in pixels."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def resident(self) -> list[Tensor]:
        """Digits and classes; images and clips are filled in when selected."""
        return [self.digits, self.targets]


@dataclass(frozen=True)
class PlacedDigits(_SmallDigits):
    """Digits (S, 1, P, P) placed on a larger image."""

    seed: tuple[int, int] | None
    """Seed of the positions; None puts every digit in the center."""
    step: tuple[int, int] = (1, 1)
    """Vertical and horizontal distance between possible positions, in pixels; the center is a possible position."""

    def corners(self, epoch: int) -> np.ndarray:
        """Return row and column of every digit's upper left pixel (S, 2); they depend only on seed and epoch."""
        room, step = np.array(self.image) - self.digits.shape[-1], np.array(self.step)
        center = room // 2
        if self.seed is None:
            return np.broadcast_to(center, (len(self), 2))
        drawn = np.random.default_rng((*self.seed, epoch)).integers(
            -(center // step), (room - center) // step + 1, size=(len(self), 2)
        )
        return center + step * drawn

    def select(self, index: Tensor, epoch: int = 0) -> Samples:
        """Return the images (B, channels, height, width) at the given indices, placed as in `epoch`."""
        size, corners = self.digits.shape[-1], self.corners(epoch)
        inputs = torch.full((len(index), self.channels, *self.image), -_MEAN / _DEVIATION)
        for position, number in enumerate(index.tolist()):
            row, column = corners[number]
            inputs[position, :, row : row + size, column : column + size] = self.digits[number]
        return Samples(inputs, self.targets[index])


def place_digits(spec: VitSpec, size: int, seed: int, kind: DataKind) -> tuple[PlacedDigits, PlacedDigits]:
    """Return the digits of `load_digits`, smaller than the image: training and held-out samples.

    Args:
        spec: the model.
        size: height and width of a digit in pixels.
        seed: seed of the positions.
        kind: ``digits-static`` puts every digit in the center, ``digits-shifted`` at a random position, and
            ``digits-patches`` at a random position a multiple of the patch size from the center. Random positions
            of training digits change in every epoch.

    Raises:
        MissingPackageError: if scikit-learn is not installed.
    """
    digits, targets, held_out = _read((size, size))

    def part(chosen: Tensor, stream: int) -> PlacedDigits:
        own = None if kind == "digits-static" else (seed, stream)
        step = spec.patch if kind == "digits-patches" else (1, 1)
        return PlacedDigits(digits[chosen], targets[chosen], spec.channels, spec.image, own, step)

    return part(~held_out, _TRAINING), part(held_out, _HELD_OUT)


@dataclass(frozen=True)
class MovingDigits(_SmallDigits):
    """Digits (S, 1, P, P) that move evenly and in a straight line across the frames of a clip.

    Each epoch draws anew where a digit begins and where it ends.
    """

    frames: int
    seed: tuple[int, int]
    """Seed of the paths."""

    def corners(self, epoch: int) -> np.ndarray:
        """Return row and column of every digit's upper left pixel in every frame, (S, frames, 2)."""
        room = np.array(self.image) - self.digits.shape[-1]
        ends = np.random.default_rng((*self.seed, epoch)).integers(0, room + 1, size=(len(self), 2, 1, 2))
        share = np.linspace(0, 1, self.frames)[None, :, None]
        return np.rint(ends[:, 0] * (1 - share) + ends[:, 1] * share).astype(int)

    def select(self, index: Tensor, epoch: int = 0) -> Samples:
        """Return the clips (B, channels, frames, height, width) at the given indices, with the paths of `epoch`."""
        size, corners = self.digits.shape[-1], self.corners(epoch)
        inputs = torch.full((len(index), self.channels, self.frames, *self.image), -_MEAN / _DEVIATION)
        for position, number in enumerate(index.tolist()):
            for frame, (row, column) in enumerate(corners[number]):
                inputs[position, :, frame, row : row + size, column : column + size] = self.digits[number]
        return Samples(inputs, self.targets[index])


def move_digits(spec: VideoSpec, size: int, seed: int) -> tuple[MovingDigits, MovingDigits]:
    """Return clips in which the digits of `load_digits` move: training and held-out samples.

    Args:
        spec: the model.
        size: height and width of a digit in pixels.
        seed: seed of the paths.

    Raises:
        MissingPackageError: if scikit-learn is not installed.
    """
    digits, targets, held_out = _read((size, size))

    def part(chosen: Tensor, stream: int) -> MovingDigits:
        return MovingDigits(digits[chosen], targets[chosen], spec.channels, spec.image, spec.frames, (seed, stream))

    return part(~held_out, _TRAINING), part(held_out, _HELD_OUT)
