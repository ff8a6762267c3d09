"""The classes of ImageNet's held-out images, from the files in which people have them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from translution.distributed.data.prepare.labels import read_labels
from translution.planner.common.errors import InputError

CLASSES = ("n01440764", "n01443537", "n02102040")
LABELS = {f"ILSVRC2012_val_{number + 1:08d}": CLASSES[number % 3] for number in range(7)}

TEXTS = {
    "lines": "".join(f"{image}.JPEG {name}\n" for image, name in LABELS.items()),
    "script": "#!/bin/bash\nmkdir -p n01440764\n"
    + "".join(f"mv ILSVRC2012_img_val/{image}.JPEG {name}/\n" for image, name in LABELS.items()),
    "table": "ImageId,PredictionString\n" + "".join(f"{image},{name} 1 2 30 40 \n" for image, name in LABELS.items()),
    "quoted": "".join(f'"{image}.JPEG","{name}"\r\n' for image, name in LABELS.items()),
    "paths": "".join(f"val/{image}.JPEG\tval/{name}\n" for image, name in LABELS.items()),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_lines_of_every_kind_are_read(kind: str, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text(TEXTS[kind])
    assert read_labels(tmp_path / "labels") == LABELS


def kit(path: Path, *, meta: bytes | None = None, leave_out: str = "") -> Path:
    """Write a development kit whose class numbers are not in the order of the names."""
    numbers = {CLASSES[0]: 3, CLASSES[1]: 1, CLASSES[2]: 2}
    synsets = np.empty((3, 1), dtype=[(name, object) for name in ("ILSVRC2012_ID", "WNID", "words")])
    for row, (name, number) in enumerate(numbers.items()):
        synsets[row, 0] = (number, name, "a fish")
    file = io.BytesIO()
    savemat(file, {"synsets": synsets})
    truth = "".join(f"{numbers[name]}\n" for name in LABELS.values()).encode()
    content = {"meta.mat": meta or file.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth}
    with tarfile.open(path, "w:gz") as archive:
        for name, data in content.items():
            if name != leave_out:
                member = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def test_a_development_kit_is_read(tmp_path: Path) -> None:
    assert read_labels(kit(tmp_path / "kit.tar.gz")) == LABELS


def test_other_archives_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"kit.tar.gz: holds no meta.mat: must be ImageNet's development kit"):
        read_labels(kit(tmp_path / "kit.tar.gz", leave_out="meta.mat"))
    with pytest.raises(InputError, match=r"kit.tar.gz: cannot be read as ImageNet's development kit"):
        read_labels(kit(tmp_path / "kit.tar.gz", meta=b"no matrix"))
    path = kit(tmp_path / "kit.tar.gz")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=r"kit.tar.gz: "):
        read_labels(path)
