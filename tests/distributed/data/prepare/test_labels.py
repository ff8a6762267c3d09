"""The classes of ImageNet's held-out images, from the files in which people have them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.data.imagenet import LABELS, kit_files, tar

from translution.distributed.data.prepare.labels import read_labels
from translution.planner.common.errors import InputError

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


def write_kit(path: Path, changes: dict[str, bytes | None]) -> Path:
    """Write a development kit with some files changed, or left out where a change is None."""
    made = {name: changes.get(Path(name).name, content) for name, content in kit_files().items()}
    path.write_bytes(tar({name: content for name, content in made.items() if content is not None}, "w:gz"))
    return path


def test_a_development_kit_is_read(tmp_path: Path) -> None:
    assert read_labels(write_kit(tmp_path / "kit.tar.gz", {})) == LABELS


def test_other_archives_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"kit.tar.gz: holds no meta.mat: must be ImageNet's development kit"):
        read_labels(write_kit(tmp_path / "kit.tar.gz", {"meta.mat": None}))
    with pytest.raises(InputError, match=r"kit.tar.gz: cannot be read as ImageNet's development kit"):
        read_labels(write_kit(tmp_path / "kit.tar.gz", {"meta.mat": b"no matrix"}))
    path = write_kit(tmp_path / "kit.tar.gz", {})
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=r"kit.tar.gz: "):
        read_labels(path)
