"""The samples a run trains on, in an order that does not depend on the number of ranks."""

from __future__ import annotations

from pathlib import Path

from translution.planner.config.datasets import PLACED_DIGITS, DataKind, check_kind, digit_size
from translution.planner.config.model import ModelSpec, VitSpec
from translution.planner.config.training import TrainingSpec

from .base import DataSource
from .synthetic import make_synthetic


def load_samples(spec: ModelSpec, training: TrainingSpec, step: int = 1) -> tuple[DataSource, DataSource]:
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


def _load(spec: ModelSpec, training: TrainingSpec, kind: DataKind, step: int) -> tuple[DataSource, DataSource]:
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
