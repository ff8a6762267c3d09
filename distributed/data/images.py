"""Images from class folders or a Hugging Face `datasets` folder, decoded when a micro-batch needs them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from translution.planner.common import InputError, MissingPackageError
from translution.planner.config import IMAGE_SUFFIXES, TrainingSpec, VitSpec

from .base import DataSource, Samples
from .image_view import ImageView, held_out_view, training_view

TRAINING_SPLITS, HELD_OUT_SPLITS = ("train",), ("val", "validation", "test")
"""Accepted names of each split; the first that exists is used."""
_MEAN = {1: np.array([0.449], np.float32), 3: np.array([0.485, 0.456, 0.406], np.float32)}
_DEVIATION = {1: np.array([0.226], np.float32), 3: np.array([0.229, 0.224, 0.225], np.float32)}
"""ImageNet's mean and standard deviation by number of channels: gray, or red, green and blue, from 0 to 1."""
_SAMPLED = 64
"""Images whose content is part of the fingerprint."""


class ImageFiles(Protocol):
    """Encoded images with their classes."""

    def __len__(self) -> int:
        """Number of images."""

    def content(self, number: int) -> str | bytes:
        """Return the path of an image, or its encoded bytes."""

    def label(self, number: int) -> int:
        """Return the class of an image."""

    def name(self, number: int) -> str:
        """Return the name of an image for messages."""

    def names_and_labels(self) -> bytes:
        """Return the names, if they have any, and the classes of all images."""


class CorruptImages:
    """Collects the images that could not be read, and reports each once.

    Args:
        limit: number of unreadable images allowed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.names: set[str] = set()

    def add(self, name: str, reason: str) -> None:
        """Report an unreadable image on stderr.

        Raises:
            InputError: if there are now more than `limit`.
        """
        if name in self.names:
            return
        self.names.add(name)
        print(f"warning: {name} is skipped: {reason}", file=sys.stderr, flush=True)
        if len(self.names) > self.limit:
            raise InputError(
                f"{name}: cannot be read as an image ({reason}), which is one more than "
                f"corrupt_limit {self.limit} allows"
            )


class Images(DataSource):
    """Normalized images (B, channels, height, width) and their classes.

    An unreadable image is replaced by the next readable one.

    Args:
        files: the encoded images.
        view: makes the pixels that the model sees.
        corrupt: counts the unreadable images.
    """

    def __init__(self, files: ImageFiles, view: ImageView, corrupt: CorruptImages) -> None:
        self.files, self.view, self.spec, self.corrupt = files, view, view.spec, corrupt
        self._replacements: dict[int, int] = {}
        self._prefetched: dict[tuple[int, int], Future[np.ndarray | str]] = {}

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        """Return a digest of all names and classes, and of the content of some images."""
        digest = hashlib.sha256(self.files.names_and_labels())
        for number in sorted({len(self) * part // _SAMPLED for part in range(_SAMPLED)}):
            content = self.files.content(number)
            with contextlib.suppress(OSError):
                digest.update(content if isinstance(content, bytes) else Path(content).read_bytes())
        return digest.hexdigest()

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=torch.get_num_threads(), thread_name_prefix="decode")

    def _decoding(self, number: int, epoch: int) -> Future[np.ndarray | str]:
        """Return the prefetched decoding of an image, or start it now."""
        if (number, epoch) in self._prefetched:
            return self._prefetched.pop((number, epoch))
        return self._pool.submit(self._decode, number, epoch)

    def prefetch(self, index: Tensor, epoch: int = 0) -> None:
        """Start decoding the images at the given indices (B,), while the model computes."""
        numbers = {self._replacements.get(number, number) for number in index.tolist()}
        self._prefetched = {(number, epoch): self._decoding(number, epoch) for number in numbers}

    def select(self, index: Tensor, epoch: int = 0) -> Samples:
        """Return the images at the given indices; training images are cropped and changed anew in every epoch.

        Raises:
            InputError: if more images than allowed cannot be read, or a class is out of range.
        """
        numbers = [self._replacements.get(number, number) for number in index.tolist()]
        decoding = [self._decoding(number, epoch) for number in numbers]
        # Images are decoded into numpy's memory: a run measures torch's, which should hold only the micro-batch.
        channels = self.spec.channels
        inputs = torch.empty(len(numbers), channels, *self.spec.image)
        for position, decoded in enumerate(decoding):
            pixels = decoded.result()
            if isinstance(pixels, str):
                numbers[position], pixels = self._replace(int(index[position]), numbers[position], pixels, epoch)
            normal = (pixels / np.float32(255) - _MEAN[channels]) / _DEVIATION[channels]
            inputs.numpy()[position] = normal.transpose(2, 0, 1)
        return Samples(inputs, torch.tensor([self._label(number) for number in numbers]))

    def _replace(self, wanted: int, number: int, reason: str, epoch: int) -> tuple[int, np.ndarray]:
        """Return the first readable image after an unreadable one, and its pixels."""
        for _ in range(len(self)):
            self.corrupt.add(self.files.name(number), reason)
            number = (number + 1) % len(self)
            pixels = self._decode(number, epoch)
            if not isinstance(pixels, str):
                self._replacements[wanted] = number
                return number, pixels
            reason = pixels
        raise InputError(f"{self.files.name(number)}: cannot be read as an image, nor can any other")

    def _decode(self, number: int, epoch: int) -> np.ndarray | str:
        """Return an image's pixels (height, width, channels) as uint8, or the reason why it cannot be decoded."""
        try:
            return self.view.pixels(self.files.content(number), number, epoch)
        except Exception as error:  # Damaged files raise many kinds of errors in Pillow.
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def _label(self, number: int) -> int:
        label = self.files.label(number)
        if not 0 <= label < self.spec.classes:
            raise InputError(
                f"{self.files.name(number)}: class {label} is not allowed: must be from 0 to {self.spec.classes - 1}"
            )
        return label


class FolderImages:
    """Images in one folder per class.

    Args:
        folder: folder that holds the class folders.
        classes: names of the class folders, in the order of the class numbers.

    Raises:
        InputError: if there is no image, or a folder that is not in `classes`.
    """

    def __init__(self, folder: Path, classes: list[str]) -> None:
        unknown = sorted(set(_folders(folder)) - set(classes))
        if unknown:
            raise InputError(f"{folder / unknown[0]}: is not allowed: must be a class of the training images")
        self._folder, self._classes = folder, classes
        names: list[bytes] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            found = _images_in(folder / name)
            names += found
            labels += [label] * len(found)
        if not names:
            raise InputError(
                f"{folder}: holds no image: must hold CLASS/*{', CLASS/*'.join(IMAGE_SUFFIXES[:3])} or similar"
            )
        # A numpy array of bytes is smaller: a Python string takes about 100 bytes per name.
        self._names, self._labels = np.array(names), np.array(labels, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._names)

    def content(self, number: int) -> str:
        """Return the path of an image."""
        return str(self._folder / self._classes[self._labels[number]] / os.fsdecode(self._names[number]))

    def label(self, number: int) -> int:
        """Return the number of an image's class folder."""
        return int(self._labels[number])

    def name(self, number: int) -> str:
        """Return the path of an image."""
        return self.content(number)

    def names_and_labels(self) -> bytes:
        """Return the names, without the folder, and the classes of all images."""
        return self._names.tobytes() + self._labels.tobytes()


class DatasetImages:
    """Images of one split of a Hugging Face `datasets` folder.

    Args:
        split: the split.
        name: its name for messages.

    Raises:
        InputError: if it has no image column, no class column or no rows.
    """

    def __init__(self, split: Any, name: str) -> None:
        import datasets

        columns = split.features.items()
        images = [column for column, feature in columns if isinstance(feature, datasets.Image)]
        labels = [column for column, feature in columns if isinstance(feature, datasets.ClassLabel)]
        if not images or not labels:
            raise InputError(f"{name}: columns {', '.join(split.features)}: must include an Image and a ClassLabel")
        if not len(split):
            raise InputError(f"{name}: holds no image")
        self._image, self._name = images[0], name
        self.classes = int(split.features[labels[0]].num_classes)
        # Read the class column once: reading a row's class would also load its image.
        values = split.select_columns(labels[:1])[:][labels[0]]
        self._labels = np.array([-1 if value is None else value for value in values], dtype=np.int32)
        self._split = split.select_columns([self._image]).cast_column(self._image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._split)

    def content(self, number: int) -> str | bytes:
        """Return an image's encoded bytes, or its path if it is stored outside the data set."""
        cell = self._split[number][self._image] or {}
        return cell.get("bytes") or cell.get("path") or b""

    def label(self, number: int) -> int:
        """Return the value of the class column."""
        return int(self._labels[number])

    def name(self, number: int) -> str:
        """Return the split's name and the row number."""
        return f"{self._name} row {number}"

    def names_and_labels(self) -> bytes:
        """Return the classes of all rows."""
        return self._labels.tobytes()


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _images_in(folder: Path) -> list[bytes]:
    if not folder.is_dir():
        return []
    names = (entry.name for entry in os.scandir(folder))
    return sorted(os.fsencode(name) for name in names if name.lower().endswith(IMAGE_SUFFIXES))


def _first(names: tuple[str, ...], existing: Any) -> str | None:
    return next((name for name in names if name in existing), None)


def _check_classes(spec: VitSpec, count: int, where: Path) -> None:
    if count > spec.classes:
        raise InputError(f"classes: {spec.classes} is not allowed: must be at least {count}, the classes of {where}")


def _open_dataset(path: Path) -> tuple[DatasetImages, DatasetImages]:
    try:
        import datasets
    except ImportError:
        raise MissingPackageError("datasets is missing: pip install 'translution-scale[train]'") from None
    try:
        splits = datasets.load_from_disk(str(path))
    except Exception as error:  # Arrow, JSON and the file system raise errors of different kinds.
        raise InputError(f"{path}: cannot be read as a data set: {' '.join(str(error).split())[:300]}") from None
    names = _first(TRAINING_SPLITS, splits), _first(HELD_OUT_SPLITS, splits)
    if not isinstance(splits, datasets.DatasetDict) or None in names:
        raise InputError(
            f"{path}: must hold splits train, and {', '.join(HELD_OUT_SPLITS[:-1])} or {HELD_OUT_SPLITS[-1]}"
        )
    training, held_out = (DatasetImages(splits[name], f"{path} {name}") for name in names)
    return training, held_out


def _open_folders(path: Path) -> tuple[FolderImages, FolderImages, int]:
    folders = _folders(path) if path.is_dir() else []
    training, held_out = _first(TRAINING_SPLITS, folders), _first(HELD_OUT_SPLITS, folders)
    if training is None or held_out is None:
        raise InputError(
            f"data_path: {str(path)!r} is not allowed: must be a folder with train/CLASS/* and val/CLASS/*, "
            "or one that save_to_disk of datasets wrote"
        )
    classes = _folders(path / training)
    return FolderImages(path / training, classes), FolderImages(path / held_out, classes), len(classes)


def load_images(spec: VitSpec, training: TrainingSpec) -> tuple[Images, Images]:
    """Return the images of a folder: training and held-out samples.

    Args:
        spec: the model, with one or three channels.
        training: names a folder laid out like ImageNet, or one with splits that `save_to_disk` of `datasets` wrote,
            how its images are cropped and changed, and how many of them may be unreadable.

    Raises:
        InputError: if the layout is unknown, there are more classes than the model has, or no images.
        MissingPackageError: if Pillow is not installed, or `datasets` where it is needed.
    """
    if importlib.util.find_spec("PIL") is None:
        raise MissingPackageError("Pillow is missing: pip install 'translution-scale[train]'")
    if spec.channels not in (1, 3):
        raise InputError(f"channels: {spec.channels} is not allowed: must be 1 or 3 with data images")
    path = Path(str(training.data_path))
    files: ImageFiles
    held_out: ImageFiles
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        files, held_out = data_set = _open_dataset(path)
        count = max(part.classes for part in data_set)
    else:
        files, held_out, count = _open_folders(path)
    _check_classes(spec, count, path)
    corrupt = CorruptImages(training.corrupt_limit)
    return (
        Images(files, training_view(spec, training), corrupt),
        Images(held_out, held_out_view(spec, training), corrupt),
    )
