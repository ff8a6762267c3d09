"""Archives laid out like ImageNet's, with tiny images."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

CLASSES = ("n01440764", "n01443537", "n02102040")
LABELS = {f"ILSVRC2012_val_{number + 1:08d}": CLASSES[number % 3] for number in range(7)}
"""Class of every held-out image."""
TRAINING, HELD_OUT, KIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


def jpeg(shade: int) -> bytes:
    """An image of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (shade, 0, 255 - shade)).save(file, "JPEG")
    return file.getvalue()


def tar(files: Mapping[str, bytes], mode: str = "w") -> bytes:
    """An archive with files of the given contents."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]  # any of tarfile's modes
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def class_archive(label: int) -> bytes:
    """The archive of a class, with three images."""
    return tar({f"{CLASSES[label]}_{number}.JPEG": jpeg(80 * label + number) for number in range(3)})


def kit_files() -> dict[str, bytes]:
    """Files of a development kit whose class numbers are not in the order of the names."""
    numbers = {CLASSES[0]: 3, CLASSES[1]: 1, CLASSES[2]: 2}
    synsets = np.empty((3, 1), dtype=[(name, object) for name in ("ILSVRC2012_ID", "WNID", "words")])
    for row, (name, number) in enumerate(numbers.items()):
        synsets[row, 0] = (number, name, "a fish")
    file = io.BytesIO()
    savemat(file, {"synsets": synsets})
    truth = "".join(f"{numbers[name]}\n" for name in LABELS.values()).encode()
    folder = "ILSVRC2012_devkit_t12/data/"
    return {f"{folder}meta.mat": file.getvalue(), f"{folder}ILSVRC2012_validation_ground_truth.txt": truth}


def write_archives(folder: Path) -> None:
    """Write the archives of training and held-out images, and the development kit."""
    classes = {f"{name}.tar": class_archive(label) for label, name in enumerate(CLASSES)}
    (folder / TRAINING).write_bytes(tar(classes))
    (folder / HELD_OUT).write_bytes(tar({f"{name}.JPEG": jpeg(7) for name in LABELS}))
    (folder / KIT).write_bytes(tar(kit_files(), "w:gz"))
