"""Unpacks ImageNet's archives into the folders that `images` reads: train/CLASS/* and val/CLASS/*.

Three kinds of tar archives are read: one that holds an archive per class (``ILSVRC2012_img_train.tar``), one of a
single class, named after it (``n01440764.tar``), and one with held-out images alone (``ILSVRC2012_img_val.tar``), whose
classes a file of labels gives. Archives within an archive are read in place, without a copy.
"""

from __future__ import annotations

import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from translution.planner.common import InputError, Schema, check_new_folder, new_folder, write_text
from translution.planner.config import IMAGE_SUFFIXES

from .labels import read_labels

MARKER = "images.json"
"""File that marks a folder as written here; it holds `PreparedImages`."""
_CLASS = re.compile(r"\w[\w.-]*")
_COPY_BYTES = 2**20

OnImage = Callable[[int], None]


class PreparedImages(Schema):
    """Number of images and classes of a prepared folder."""

    training_images: int
    held_out_images: int
    classes: int


def is_archive(path: Path) -> bool:
    """Return True if a path has the name of a tar archive."""
    return path.name.endswith((".tar", ".tar.gz", ".tgz"))


class _Unpacker:
    """Writes the images of archives into a folder.

    Args:
        folder: where train/ and val/ are made.
        labels: class of every held-out image by the stem of its name; None if no labels are given.
        on_image: called with the size of every image.
    """

    def __init__(self, folder: Path, labels: dict[str, str] | None, on_image: OnImage) -> None:
        self.folder, self.labels, self.on_image = folder, labels, on_image
        self.counts = {"train": 0, "val": 0}

    def unpack(self, path: Path) -> None:
        """Write the images of an archive.

        Raises:
            InputError: if it is damaged, or holds something else than this module describes.
        """
        for image, class_name, file in _images(path):
            if class_name is None:
                self._write("val", self._label(path, image), image, file, path)
            else:
                self._write("train", class_name, image, file, path)

    def _label(self, path: Path, image: str) -> str:
        if self.labels is None:
            raise InputError(f"{path}: holds images without classes ({image}): --labels must name a file with them")
        found = self.labels.get(Path(image).stem)
        if found is None:
            raise InputError(f"{path}: {image} is not allowed: must be named in the labels")
        return found

    def _write(self, split: str, class_name: str, image: str, file: IO[bytes], path: Path) -> None:
        target = self.folder / split / class_name / image
        if target.exists():
            raise InputError(f"{path}: {image} is not allowed: class {class_name} of {split} has one of that name")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with target.open("wb") as out:
                shutil.copyfileobj(file, out, _COPY_BYTES)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: {image} cannot be read: {error}: the archive is damaged or cut") from None
        self.counts[split] += 1
        self.on_image(target.stat().st_size)


def _images(path: Path) -> Iterator[tuple[str, str | None, IO[bytes]]]:
    """Yield name, class and content of the images of an archive; the class is None if the archive does not tell it."""
    own = path.name.partition(".")[0]
    own_class = own if re.fullmatch(r"n\d{8}", own) else None
    found = False
    for name, file in _members(path.open("rb"), str(path)):
        if name.endswith(".tar"):
            class_name = name.removesuffix(".tar")
            if not _CLASS.fullmatch(class_name):
                raise InputError(f"{path}: {name!r} is not allowed: must be CLASS.tar")
            for image, inner in _members(file, f"{path}: {name}"):
                if image.lower().endswith(IMAGE_SUFFIXES):
                    found = True
                    yield image, class_name, inner
        elif name.lower().endswith(IMAGE_SUFFIXES):
            found = True
            yield name, own_class, file
    if not found:
        raise InputError(f"{path}: holds no image, and no CLASS.tar with images")


def _members(file: IO[bytes], where: str) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the name, without folders, and the content of the plain files of an archive."""
    try:
        with file, tarfile.open(fileobj=file, mode="r:*") as archive:
            for member in archive:
                opened = archive.extractfile(member) if member.isfile() else None
                if opened is not None:
                    yield PurePosixPath(member.name).name, opened
            # tarfile takes an archive that is cut between two members for a whole one.
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise InputError(f"{where}: ends without the mark of its end: the archive is cut")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{where}: cannot be read as a tar archive: {str(error).partition(': - ')[0]}") from None


def _check(archives: Sequence[Path], out: Path) -> None:
    needed = 0
    for path in archives:
        if not path.is_file():
            raise InputError(f"{path}: {'is no plain file' if path.exists() else 'no such file'}")
        needed += path.stat().st_size
    parent = next(folder for folder in out.parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(f"{out}: the images take {needed:,} bytes and the drive has {free:,} bytes free")


def prepare_images(
    archives: Sequence[Path],
    out: Path,
    *,
    labels: Path | None = None,
    force: bool = False,
    on_image: OnImage = lambda _: None,
) -> PreparedImages:
    """Unpack archives of images into a folder, which is written completely or not at all.

    Args:
        archives: tar archives, as the module describes them.
        out: the folder to create.
        labels: classes of the images of an archive that does not tell them, as `read_labels` reads them.
        force: replace an existing folder of images.
        on_image: called with the size of every image that was written.

    Raises:
        InputError: if an archive or the labels are missing, damaged or not as described, an image has no class, there
            are no training or no held-out images, or the folder cannot be written.
    """
    out = out.absolute()
    _check(archives, out)
    replaces = check_new_folder(out, marker=MARKER, force=force)
    target = out.with_name(f".{out.name}.new") if replaces else out
    known = None if labels is None else read_labels(labels)
    with new_folder(target, marker=MARKER) as folder:
        unpacker = _Unpacker(folder, known, on_image)
        for path in archives:
            unpacker.unpack(path)
        for split, count in unpacker.counts.items():
            if not count:
                what = "training" if split == "train" else "held-out"
                raise InputError(f"archives: hold no {what} images")
        names = {split: {path.name for path in (folder / split).iterdir()} for split in unpacker.counts}
        unknown = sorted(names["val"] - names["train"])
        if unknown:
            raise InputError(f"labels: class {unknown[0]} is not allowed: must be one of the training images")
        made = PreparedImages(
            training_images=unpacker.counts["train"],
            held_out_images=unpacker.counts["val"],
            classes=len(names["train"]),
        )
        write_text(folder / MARKER, made.model_dump_json(indent=2) + "\n")
    if replaces:
        shutil.rmtree(out)
        target.rename(out)
    return made
