"""What a model sees of an image: a random crop changed by RandAugment in training, a centre crop in evaluation.

Pillow decodes, crops and changes the image in the thread that reads it. Random values depend only on the seed, the
epoch and the image's number, so that a resumed run sees the same pixels as an uninterrupted one.

Sources: RandomResizedCrop of arXiv 1409.4842, section 6; RandAugment of arXiv 1909.13719, with the strengths that its
implementation in torchvision 0.28 gives the operations.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from translution.planner.config import TrainingSpec, VitSpec

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_MAGNITUDE = 30
_CROP_TRIES = 10
_LOG_RATIO = math.log(4 / 3)
"""Logarithm of the largest ratio of a random crop's sides."""
_SALT = 0xC209
"""Mixed into the seeds, so that they differ from those of other random draws."""

Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a part of an image, in pixels."""


class Operation(NamedTuple):
    """One of RandAugment's operations."""

    apply: Callable[[Image, float], Image]
    """Changes an image; a strength from 0 to 1, or from -1 to 1 for an operation with a direction."""
    directed: bool = False
    """Whether the strength has a random sign."""


def _affine(image: Image, *coefficients: float) -> Image:
    import PIL.Image

    return image.transform(image.size, PIL.Image.Transform.AFFINE, coefficients, PIL.Image.Resampling.NEAREST)


def _enhance(name: str) -> Operation:
    def apply(image: Image, strength: float) -> Image:
        from PIL import ImageEnhance

        enhancer: Callable[[Image], ImageEnhance._Enhance] = getattr(ImageEnhance, name)
        return enhancer(image).enhance(1 + 0.9 * strength)

    return Operation(apply, directed=True)


def _operate(name: str, argument: Callable[[float], int] | None = None) -> Operation:
    def apply(image: Image, strength: float) -> Image:
        from PIL import ImageOps

        function: Callable[..., Image] = getattr(ImageOps, name)
        return function(image) if argument is None else function(image, argument(strength))

    return Operation(apply)


_LARGEST_SHIFT = 150 / 331
"""Largest translation as a fraction of the image's side."""

OPERATIONS: dict[str, Operation] = {
    "identity": Operation(lambda image, _: image),
    "shear-x": Operation(lambda image, strength: _affine(image, 1, 0.3 * strength, 0, 0, 1, 0), directed=True),
    "shear-y": Operation(lambda image, strength: _affine(image, 1, 0, 0, 0.3 * strength, 1, 0), directed=True),
    "translate-x": Operation(
        lambda image, strength: _affine(image, 1, 0, -int(_LARGEST_SHIFT * image.width * strength), 0, 1, 0),
        directed=True,
    ),
    "translate-y": Operation(
        lambda image, strength: _affine(image, 1, 0, 0, 0, 1, -int(_LARGEST_SHIFT * image.height * strength)),
        directed=True,
    ),
    "rotate": Operation(lambda image, strength: image.rotate(30 * strength), directed=True),
    "brightness": _enhance("Brightness"),
    "color": _enhance("Color"),
    "contrast": _enhance("Contrast"),
    "sharpness": _enhance("Sharpness"),
    "posterize": _operate("posterize", lambda strength: 8 - round(4 * strength)),
    "solarize": _operate("solarize", lambda strength: math.ceil(round(255 * (1 - strength), 3))),
    "autocontrast": _operate("autocontrast"),
    "equalize": _operate("equalize"),
}
"""RandAugment's operations by name."""


def rand_augment(image: Image, operations: int, magnitude: int, random: np.random.Generator) -> Image:
    """Apply random operations of equal probability to an image.

    Args:
        image: gray, or red, green and blue.
        operations: number of operations.
        magnitude: their strength, from 0 to `LARGEST_MAGNITUDE`.
        random: draws the operations and their directions.
    """
    choices = tuple(OPERATIONS.values())
    for number in random.integers(len(choices), size=operations):
        operation, strength = choices[number], magnitude / LARGEST_MAGNITUDE
        if operation.directed and random.integers(2):
            strength = -strength
        image = operation.apply(image, strength)
    return image


def random_box(size: tuple[int, int], smallest: float, random: np.random.Generator) -> Box:
    """Draw the part of an image that a random resized crop keeps.

    Its area is a uniform fraction of the image's, the logarithm of its sides' ratio is uniform between those of 3:4 and
    4:3. If no draw of several fits, the part is the largest of such a ratio in the centre.

    Args:
        size: width and height of the image in pixels.
        smallest: smallest fraction of the area.
        random: draws the part.
    """
    width, height = size
    for _ in range(_CROP_TRIES):
        area = width * height * random.uniform(smallest, 1)
        ratio = math.exp(random.uniform(-_LOG_RATIO, _LOG_RATIO))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(random.integers(width - wide + 1)), int(random.integers(height - high + 1))
            return left, top, left + wide, top + high
    wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def scaled_size(size: tuple[int, int], wanted: tuple[int, int], kept: float) -> tuple[int, int]:
    """Return the size to which an image is scaled before its centre is cropped.

    Args:
        size: width and height of the image in pixels.
        wanted: width and height of the crop in pixels.
        kept: fraction that the crop keeps of the side that limits it.
    """
    width, height = size
    wide, high = (math.floor(side / kept + 1e-6) for side in wanted)
    if width * high < height * wide:
        return wide, int(wide * height / width)
    return int(high * width / height), high


@dataclass(frozen=True)
class ImageView:
    """Turns encoded images into pixels of a model's image size."""

    spec: VitSpec
    crop_scale: float = 1.0
    """Smallest fraction of the area that a random crop keeps; 1 does not crop at random."""
    operations: int = 0
    """Operations of RandAugment per image."""
    magnitude: int = 0
    """Strength of the operations."""
    centre_crop: float = 1.0
    """Fraction of the shorter side that a centre crop keeps."""
    seed: int = 0

    def pixels(self, content: str | bytes, number: int, epoch: int) -> np.ndarray:
        """Return an image's pixels (height, width, channels) as uint8.

        Args:
            content: path or bytes of the encoded image.
            number: its number in the data.
            epoch: number of the epoch.

        Raises:
            Exception: of any kind that Pillow raises for a damaged file.
        """
        import PIL.Image

        height, width = self.spec.image
        random = np.random.default_rng((_SALT, self.seed, epoch, number))
        with PIL.Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            plain = self._random_crop(image, random) if self.crop_scale < 1 else self._centre(image)
        if self.operations:
            plain = rand_augment(plain, self.operations, self.magnitude, random)
        return np.asarray(plain, dtype=np.uint8).reshape(height, width, self.spec.channels)

    @property
    def _mode(self) -> str:
        return "L" if self.spec.channels == 1 else "RGB"

    def _random_crop(self, image: Image, random: np.random.Generator) -> Image:
        import PIL.Image

        (height, width), full = self.spec.image, image.size
        left, top, right, bottom = random_box(full, self.crop_scale, random)
        # Decode a JPEG at 1/2, 1/4 or 1/8 of its size, if the crop is then still at least twice as large as wanted.
        needed = 2 * width * full[0] // (right - left), 2 * height * full[1] // (bottom - top)
        image.draft(self._mode, needed)
        across, down = image.width / full[0], image.height / full[1]
        box = round(left * across), round(top * down), round(right * across), round(bottom * down)
        plain = image.convert(self._mode).crop(box)
        return plain.resize((width, height), PIL.Image.Resampling.BILINEAR)

    def _centre(self, image: Image) -> Image:
        import PIL.Image
        from PIL import ImageOps

        height, width = self.spec.image
        mode, bilinear = self._mode, PIL.Image.Resampling.BILINEAR
        if self.centre_crop == 1:
            image.draft(mode, (2 * width, 2 * height))
            return ImageOps.fit(image.convert(mode), (width, height), bilinear)
        wide, high = scaled_size(image.size, (width, height), self.centre_crop)
        image.draft(mode, (2 * wide, 2 * high))
        scaled = image.convert(mode).resize((wide, high), bilinear)
        left, top = round((wide - width) / 2), round((high - height) / 2)
        return scaled.crop((left, top, left + width, top + height))


def training_view(spec: VitSpec, training: TrainingSpec) -> ImageView:
    """Return the view of the training images."""
    return ImageView(
        spec,
        crop_scale=training.crop_scale,
        operations=training.rand_augment_operations,
        magnitude=training.rand_augment_magnitude,
        seed=training.seed,
    )


def held_out_view(spec: VitSpec, training: TrainingSpec) -> ImageView:
    """Return the view of the held-out images."""
    return ImageView(spec, centre_crop=training.evaluation_crop)
