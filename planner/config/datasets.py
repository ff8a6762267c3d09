"""Kinds of training data, and the models that each kind suits."""

from __future__ import annotations

from typing import Literal, TypeAlias

from ..common.errors import InputError
from .model import GptSpec, ModelSpec, PatchSpec, VideoSpec, VitSpec

DataKind: TypeAlias = Literal[
    "digits",
    "digits-static",
    "digits-shifted",
    "digits-patches",
    "digits-moving",
    "images",
    "tokens",
    "stdlib",
    "synthetic",
]

MOVING_DIGITS: DataKind = "digits-moving"
"""Clips in which a digit moves across the image."""
PLACED_DIGITS: tuple[DataKind, ...] = ("digits-static", "digits-shifted", "digits-patches", MOVING_DIGITS)
"""Kinds whose digits do not fill the image."""
DIGITS: tuple[DataKind, ...] = ("digits", *PLACED_DIGITS)
READ_FROM_PATH: tuple[DataKind, ...] = ("images", "tokens")
TEXTS: tuple[DataKind, ...] = ("tokens", "stdlib")
"""Kinds whose samples are windows of a text."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Ends of the names of image files."""
DIGITS_CLASSES = 10
DIGITS_TRAINING_SAMPLES = 1433
"""Training samples of scikit-learn's 1,797 digits; the others are held out."""
BYTES_VOCABULARY = 256


def digit_size(spec: PatchSpec, digit_pixels: int | None) -> int:
    """Height and width in pixels of a digit that does not fill the image; half the shorter side by default.

    Raises:
        InputError: if the digit is larger than the image.
    """
    shorter = min(spec.image)
    if digit_pixels is not None and digit_pixels > shorter:
        raise InputError(
            f"digit_pixels: {digit_pixels} is not allowed: must be at most {shorter}, the image's shorter side"
        )
    return digit_pixels or -(-shorter // 2)


def check_kind(spec: ModelSpec, kind: DataKind, digit_pixels: int | None, field: str = "data") -> None:
    """Check that a kind of data suits a model.

    Args:
        spec: the model.
        kind: the kind of data.
        digit_pixels: as in `TrainingSpec`.
        field: the field that names the kind; opens the error line.

    Raises:
        InputError: naming the field.
    """
    if kind in DIGITS:
        family = VideoSpec if kind == MOVING_DIGITS else VitSpec
        if not (isinstance(spec, family) and spec.classes >= DIGITS_CLASSES):
            name = "video" if kind == MOVING_DIGITS else "vit"
            other = MOVING_DIGITS if isinstance(spec, VideoSpec) and spec.classes >= DIGITS_CLASSES else "synthetic"
            raise InputError(
                f"{field}: {kind!r} is not allowed: must be used with a {name} model of at least {DIGITS_CLASSES} "
                f"classes; use {other}"
            )
        if kind in PLACED_DIGITS:
            digit_size(spec, digit_pixels)
    elif kind == "images" and not isinstance(spec, VitSpec):
        raise InputError(f"{field}: 'images' is not allowed: must be used with a vit model; use tokens")
    elif kind == "tokens" and not isinstance(spec, GptSpec):
        raise InputError(f"{field}: 'tokens' is not allowed: must be used with a gpt model; use images")
    elif kind == "stdlib" and not (isinstance(spec, GptSpec) and spec.vocabulary >= BYTES_VOCABULARY):
        raise InputError(
            f"{field}: 'stdlib' is not allowed: must be used with a gpt model of vocabulary {BYTES_VOCABULARY} or more"
        )
