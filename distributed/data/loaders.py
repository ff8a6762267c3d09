"""Open the data source that a plan names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from translution.planner.config import (
    PLACED_DIGITS,
    DataKind,
    ModelSpec,
    TrainingSpec,
    VideoSpec,
    VitSpec,
    check_kind,
    digit_size,
)

from .base import DataSource
from .synthetic import make_synthetic

if TYPE_CHECKING:
    from .tokens import RandomWindows


def load_samples(spec: ModelSpec, training: TrainingSpec, global_batch: int = 1) -> tuple[DataSource, DataSource]:
    """Return the training and held-out samples of a plan.

    Args:
        spec: the model.
        training: the training settings; they name the data.
        global_batch: samples per step; synthetic data has at least this many.

    Raises:
        InputError: if the data does not fit the model, is missing or is damaged.
        MissingPackageError: if a package that reads the data is not installed.
    """
    samples, held_out = _load(spec, training, training.data, global_batch)
    if training.evaluation_data not in (None, training.data):
        _, held_out = _load(spec, training, training.evaluation_data, global_batch)
    return samples, held_out


def _random_windows(training: TrainingSpec, global_batch: int) -> RandomWindows | None:
    if training.token_windows != "random":
        return None
    from .tokens import RandomWindows

    return RandomWindows(training.seed, training.epoch_steps and training.epoch_steps * global_batch)


def _load(spec: ModelSpec, training: TrainingSpec, kind: DataKind, global_batch: int) -> tuple[DataSource, DataSource]:
    check_kind(spec, kind, training.digit_pixels)
    # Imported on use: each source needs packages that the others do not.
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

            return load_images(spec, training)
    elif isinstance(spec, VideoSpec):
        if kind in PLACED_DIGITS:
            from .digits import move_digits

            return move_digits(spec, digit_size(spec, training.digit_pixels), training.seed)
    elif kind == "tokens":
        from .tokens import load_tokens

        return load_tokens(spec, Path(str(training.data_path)), _random_windows(training, global_batch))
    elif kind == "stdlib":
        from .tokens import load_stdlib

        return load_stdlib(spec, random=_random_windows(training, global_batch))
    return make_synthetic(spec, training.seed, global_batch)
