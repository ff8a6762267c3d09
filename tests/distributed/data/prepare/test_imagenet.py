"""Image folders that `prepare` makes from archives laid out like ImageNet's."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from helpers.data.imagenet import CLASSES, HELD_OUT, KIT, LABELS, TRAINING, class_archive, jpeg, tar, write_archives

from translution.cli.main import run
from translution.distributed.data.loaders import load_samples
from translution.planner.config.model import parse_model_spec
from translution.planner.config.training import TrainingSpec

TRAIN, VAL, LABELS_FILE = TRAINING, HELD_OUT, "labels.txt"


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The two archives and a file of labels, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_archives(tmp_path)
    Path(LABELS_FILE).write_text("".join(f"{image}.JPEG {name}\n" for image, name in LABELS.items()))
    return tmp_path


def files(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def listed() -> list[Path]:
    return sorted(Path().iterdir())


WANTED = {
    "images.json",
    *(f"train/{name}/{name}_{number}.JPEG" for name in CLASSES for number in range(3)),
    *(f"val/{name}/{image}.JPEG" for image, name in LABELS.items()),
}


def test_archives_become_folders_that_a_plan_reads(archives: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prepare", TRAIN, VAL, "--labels", LABELS_FILE, "--out", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "folder": "out",
        "training_images": 9,
        "held_out_images": 7,
        "classes": 3,
    }
    assert files("out") == WANTED
    assert Path("out/train/n01443537/n01443537_1.JPEG").read_bytes() == jpeg(81)
    model = {"family": "vit", "image": 8, "patch": 4, "classes": 3, "dim": 8, "depth": 1, "heads": 1}
    training, held_out = load_samples(parse_model_spec(model), TrainingSpec(data="images", data_path="out"))
    assert training.select(torch.arange(9)).targets.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert held_out.select(torch.arange(7)).targets.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert run(["prepare", TRAIN, VAL, "--labels", KIT, "--out", "other"]) == 0
    assert files("other") == WANTED
    assert "wrote other: 9 images to train on, 7 held out, 3 classes; plan with them" in capsys.readouterr().out


def test_archives_of_single_classes_and_compressed_ones_are_read_too(archives: Path) -> None:
    for label, name in enumerate(CLASSES):
        Path(f"{name}.tar").write_bytes(class_archive(label))
    Path("val.tar.gz").write_bytes(tar({f"folder/{name}.JPEG": jpeg(7) for name in LABELS}, "w:gz"))
    single = [f"{name}.tar" for name in CLASSES]
    assert run(["prepare", *single, "val.tar.gz", "--labels", LABELS_FILE, "--out", "out"]) == 0
    assert files("out") == WANTED


def test_a_folder_is_replaced_only_when_asked_and_only_one_of_images(
    archives: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prepare", TRAIN, VAL, "--labels", LABELS_FILE, "--out", "out"]
    assert run(command) == 0
    Path("out/train/n01440764/old.JPEG").write_bytes(b"old")
    assert run(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert Path("out/train/n01440764/old.JPEG").exists()
    # A failure leaves the old folder.
    Path("bad.txt").write_text("ILSVRC2012_val_00000001.JPEG n01440764\n")
    assert run([*command[:3], "--labels", "bad.txt", "--out", "out", "--force"]) == 2
    assert Path("out/train/n01440764/old.JPEG").exists()
    assert run([*command, "--force"]) == 0
    assert files("out") == WANTED
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    assert run([*command[:-1], "mine", "--force"]) == 2
    assert files("mine") == {"thesis.txt"}
    assert not [path for path in archives.iterdir() if path.name.startswith(".")]


def cut(name: str, size: int) -> None:
    Path(name).write_bytes(Path(name).read_bytes()[:size])


@pytest.mark.parametrize("size", [700, 5000, 512 * 7, 10240, 10240 + 512])
def test_a_cut_archive_is_an_error_and_leaves_nothing(
    size: int, archives: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it ends between two members, which tarfile takes for its end."""
    cut(TRAIN, size)
    before = listed()
    assert run(["prepare", TRAIN, VAL, "--labels", LABELS_FILE, "--out", "out"]) == 2
    printed = capsys.readouterr().err
    assert TRAIN in printed
    assert printed.count("\n") == 1
    assert listed() == before


def test_an_archive_cut_between_its_members_is_an_error(archives: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(VAL) as archive:
        third = archive.getmembers()[2]
    cut(VAL, third.offset)
    assert run(["prepare", TRAIN, VAL, "--labels", LABELS_FILE, "--out", "out"]) == 2
    assert f"{VAL}: ends without the mark of its end: the archive is cut\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [TRAIN, VAL],
            f"{VAL}: holds images without classes (ILSVRC2012_val_00000001.JPEG): --labels must name a file",
        ),
        ([TRAIN, "absent.tar"], "absent.tar: no such file"),
        ([TRAIN, "."], ".: is not allowed: must be a tar archive, like ILSVRC2012_img_train.tar"),
        ([TRAIN, "notes.txt"], "notes.txt: is not allowed: must be a tar archive"),
        ([TRAIN], "archives: hold no held-out images"),
        ([VAL, "--labels", LABELS_FILE], "archives: hold no training images"),
        ([TRAIN, VAL, "--labels", "absent"], "absent: cannot be read: No such file"),
        ([TRAIN, VAL, "--labels", "notes.txt"], "notes.txt: names no held-out image: a line must be like"),
        (
            [TRAIN, VAL, "--labels", "fewer.txt"],
            "ILSVRC2012_val_00000002.JPEG is not allowed: must be named in the labels",
        ),
        ([TRAIN, VAL, "--labels", "other.txt"], "labels: class n99999999 is not allowed: must be one of the training"),
        ([TRAIN, VAL, "--tokenizer", "t.json"], "tokenizer: 't.json' is not allowed: must be left out with archives"),
        ([TRAIN, VAL, "--held-out", "0.2"], "held-out: '0.2' is not allowed: must be left out with archives"),
        (["notes.txt", "--labels", LABELS_FILE], "labels: 'labels.txt' is not allowed: must be left out with texts"),
        (["empty.tar", VAL, "--labels", LABELS_FILE], "empty.tar: holds no image, and no CLASS.tar with images"),
        (["text.tar", VAL, "--labels", LABELS_FILE], "text.tar: cannot be read as a tar archive"),
        (
            ["twice.tar", VAL, "--labels", LABELS_FILE],
            "twice.tar: a.JPEG is not allowed: class n01440764 of train has one",
        ),
        (["outside.tar", VAL, "--labels", LABELS_FILE], "outside.tar: '...tar' is not allowed: must be CLASS.tar"),
    ],
)
def test_bad_archives_and_labels_are_one_line_and_leave_nothing(
    arguments: list[str], message: str, archives: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("notes.txt").write_text("some notes\n")
    Path("fewer.txt").write_text("ILSVRC2012_val_00000001.JPEG n01440764\n")
    Path("other.txt").write_text("".join(f"{image} n99999999\n" for image in LABELS))
    Path("empty.tar").write_bytes(tar({"readme.txt": b"no image"}))
    Path("text.tar").write_bytes(b"no archive" * 200)
    Path("twice.tar").write_bytes(tar({"n01440764.tar": tar({"a.JPEG": jpeg(1), "b/a.JPEG": jpeg(2)})}))
    Path("outside.tar").write_bytes(tar({"...tar": class_archive(0)}))
    before = listed()
    assert run(["prepare", *arguments, "--out", "out"]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert listed() == before


def test_names_in_an_archive_never_lead_out_of_the_folder(archives: Path) -> None:
    Path("evil.tar").write_bytes(tar({"../../n01440764.tar": tar({"../../../evil.JPEG": jpeg(1)})}))
    labels = Path("own.txt")
    labels.write_text("".join(f"{image} n01440764\n" for image in LABELS))
    assert run(["prepare", "evil.tar", VAL, "--labels", str(labels), "--out", "out"]) == 0
    assert not list(archives.parent.glob("evil.JPEG"))
    assert Path("out/train/n01440764/evil.JPEG").read_bytes() == jpeg(1)


def test_a_full_drive_is_known_before_anything_is_written(
    archives: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from translution.distributed.data.prepare import imagenet

    usage = imagenet.shutil.disk_usage(".")
    monkeypatch.setattr(imagenet.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert run(["prepare", TRAIN, VAL, "--labels", LABELS_FILE, "--out", "new/out"]) == 2
    assert "bytes and the drive has 1,000 bytes free" in capsys.readouterr().err
    assert not Path("new").exists()
