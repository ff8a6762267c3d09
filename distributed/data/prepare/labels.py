"""Reads the classes of ImageNet's held-out images."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

from translution.planner.common import InputError

_GROUND_TRUTH, _CLASSES = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_PAIR = re.compile(rb"([\w-]+)(?:\.jpe?g|\.png)?[\s,;\"']+(?:\S*/)?([A-Za-z]\w*)", re.IGNORECASE)
"""Name of an image and of its class, as in a table or in a script that moves files."""
_IMAGE = re.compile(rb"[\w-]+_val_\d+", re.IGNORECASE)


def read_labels(path: Path) -> dict[str, str]:
    """Return the class of every held-out image, by the stem of its name.

    Args:
        path: the archive of ImageNet's development kit, or a text with one line per image that has its name followed
            by its class: a table, or the script with which many move the images into folders.

    Raises:
        InputError: if the file is missing or names no image.
    """
    try:
        if tarfile.is_tarfile(path):
            return _read_kit(path)
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as a tar archive: {str(error).partition(': - ')[0]}") from None
    labels = {}
    for line in lines:
        found = _IMAGE.search(line)
        pair = _PAIR.match(line[found.start() :]) if found else None
        if pair:
            labels[pair[1].decode()] = pair[2].decode()
    if not labels:
        raise InputError(f"{path}: names no held-out image: a line must be like ILSVRC2012_val_00000001.JPEG n01751748")
    return labels


def _read_kit(path: Path) -> dict[str, str]:
    """Return the labels of a development kit: numbers of classes in the order of the images, and the classes' names."""
    content = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name, opened = Path(member.name).name, archive.extractfile(member)
            if opened is not None and name in (_GROUND_TRUTH, _CLASSES):
                content[name] = opened.read()
    missing = [name for name in (_GROUND_TRUTH, _CLASSES) if name not in content]
    if missing:
        raise InputError(f"{path}: holds no {missing[0]}: must be ImageNet's development kit")
    try:
        from scipy.io import loadmat

        rows = loadmat(io.BytesIO(content[_CLASSES]), squeeze_me=True)["synsets"]
        names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
        numbers = [int(number) for number in content[_GROUND_TRUTH].split()]
        return {f"ILSVRC2012_val_{count:08d}": names[number] for count, number in enumerate(numbers, start=1)}
    except Exception as error:  # scipy raises errors of many kinds for a damaged file.
        raise InputError(f"{path}: cannot be read as ImageNet's development kit: {error}") from None
