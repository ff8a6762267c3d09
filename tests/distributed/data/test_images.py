"""Image data: two layouts, decoding on demand; unreadable images are reported and replaced, up to a limit."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from translution.distributed.data.base import DataSource
from translution.distributed.data.batching import micro_batches
from translution.distributed.data.images import Images
from translution.distributed.data.loaders import load_samples
from translution.planner.common.errors import InputError
from translution.planner.config.model import parse_model_spec
from translution.planner.config.training import TrainingSpec

MODEL = {"family": "vit", "image": (16, 16), "patch": 8, "classes": 3, "dim": 8, "depth": 1, "heads": 1}
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def load(path: Path, limit: int = 100, **model: object) -> tuple[DataSource, DataSource]:
    training = TrainingSpec(data="images", data_path=str(path), corrupt_limit=limit)
    return load_samples(parse_model_spec(MODEL | model), training)


def picture(shade: int) -> Image.Image:
    """An image of 20 x 40 pixels: its center square in one color, the rest black."""
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 10:30] = (shade, 255 - shade, 40)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine training images, three per class, and three held-out images."""
    for part, each in (("train", 3), ("val", 1)):
        for label in range(3):
            (tmp_path / part / f"class{label}").mkdir(parents=True)
            for number in range(each):
                picture(60 * label + 10 * number).save(tmp_path / part / f"class{label}" / f"{number}.png")
    (tmp_path / "train" / "class0" / "notes.txt").write_text("no image")
    return tmp_path


def damage(folder: Path, label: int, number: int) -> Path:
    path = folder / "train" / f"class{label}" / f"{number}.png"
    path.write_bytes(path.read_bytes()[:60])
    return path


def test_images_are_scaled_cropped_and_normalized(folder: Path) -> None:
    training, held_out = load(folder)
    assert (len(training), len(held_out)) == (9, 3)
    batch = training.select(torch.tensor([4, 0]))
    assert batch.targets.tolist() == [1, 0]
    assert batch.inputs.shape == (2, 3, 16, 16)
    for image, shade in zip(batch.inputs, (70, 0), strict=True):
        expected = (np.array([shade, 255 - shade, 40]) / 255 - MEAN) / DEVIATION
        center = torch.tensor(expected, dtype=torch.float32)[:, None, None].expand(3, 16, 14)
        torch.testing.assert_close(image[:, :, 1:15], center, rtol=0, atol=0.02)
    assert held_out.select(torch.arange(3)).targets.tolist() == [0, 1, 2]


def test_one_channel_is_gray(folder: Path) -> None:
    training, _ = load(folder, channels=1, image=(8, 16))
    image = training.select(torch.tensor([8])).inputs
    assert image.shape == (1, 1, 8, 16)
    gray = np.array(picture(140).convert("L"))[10, 20]
    assert float(image[0, 0, 4, 8]) == pytest.approx((gray / 255 - 0.449) / 0.226, abs=0.02)


def test_a_large_jpeg_decoded_at_reduced_size_is_the_same_image(tmp_path: Path) -> None:
    gradient = np.linspace(0, 255, 512, dtype=np.uint8)
    pixels = np.stack([np.tile(gradient, (512, 1)), np.tile(gradient, (512, 1)).T, np.full((512, 512), 99)], axis=-1)
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / part / "a" / "x.JPEG", quality=98)
    training, _ = load(tmp_path)
    image = training.select(torch.tensor([0])).inputs[0].numpy().transpose(1, 2, 0) * DEVIATION + MEAN
    expected = pixels.reshape(16, 32, 16, 32, 3).mean(axis=(1, 3)) / 255
    np.testing.assert_allclose(image[2:-2, 2:-2], expected[2:-2, 2:-2], atol=0.03)


def test_a_damaged_image_is_named_once_and_replaced_by_the_next(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undamaged = load(folder)[0].select(torch.arange(9))
    first, second = damage(folder, 0, 1), damage(folder, 0, 2)
    training, _ = load(folder)
    for _ in range(2):
        batch = training.select(torch.arange(9))
        assert torch.equal(batch.inputs, undamaged.inputs[[0, 3, 3, 3, 4, 5, 6, 7, 8]])
        assert batch.targets.tolist() == [0, 1, 1, 1, 1, 1, 2, 2, 2]
    printed = capsys.readouterr().err
    assert printed.count("\n") == 2
    assert printed.count(f"warning: {first} is skipped: ") == printed.count(f"warning: {second} is skipped: ") == 1


def test_one_damaged_image_more_than_allowed_ends_the_run(folder: Path) -> None:
    damage(folder, 0, 0)
    second = damage(folder, 2, 2)
    training, _ = load(folder, limit=1)
    training.select(torch.tensor([0, 1]))
    with pytest.raises(InputError) as error:
        training.select(torch.tensor([8]))
    assert str(error.value).startswith(f"{second}: cannot be read as an image (")
    assert str(error.value).endswith("), which is one more than corrupt_limit 1 allows")


def test_only_damaged_images_end_the_run(folder: Path) -> None:
    for label in range(3):
        for number in range(3):
            damage(folder, label, number)
    with pytest.raises(InputError, match="nor can any other"):
        load(folder)[0].select(torch.tensor([4]))


def test_prefetched_images_are_read_before_they_are_selected(folder: Path) -> None:
    training, _ = load(folder)
    undamaged = training.select(torch.arange(9))
    training.prefetch(torch.tensor([2, 5]))
    training.prefetch(torch.tensor([5, 7, 7]))
    wait_for_prefetch(training)
    for path in folder.glob("train/*/*.png"):
        path.unlink()
    assert torch.equal(training.select(torch.tensor([7, 5])).inputs, undamaged.inputs[[7, 5]])
    with pytest.raises(InputError, match=r"2.png: cannot be read as an image"):
        training.select(torch.tensor([2]))


def wait_for_prefetch(source: DataSource) -> None:
    """Wait until all prefetched images are decoded."""
    assert isinstance(source, Images)
    for future in source._prefetched.values():
        future.result()


def test_images_of_an_epoch_are_shared_without_overlap(folder: Path) -> None:
    training, _ = load(folder)
    every = training.select(torch.arange(9)).inputs.flatten(1).sum(1)
    streams = [
        micro_batches(
            training, micro_batch=1, gradient_accumulation_steps=1, rank=rank, world_size=3, seed=0, first_step=3
        )
        for rank in range(3)
    ]
    epoch = torch.cat([next(stream)[0].inputs for _ in range(3) for stream in streams]).flatten(1).sum(1)
    assert sorted(epoch.tolist()) == sorted(every.tolist())


def save_data_set(folder: Path, path: Path, label: object = None, absent: bool = False) -> None:
    """Save images of the folder as a data set with three rows per split; training row 1 is damaged or absent."""
    features = datasets.Features({"label": label or datasets.ClassLabel(3), "image": datasets.Image()})
    splits = {}
    for part, name in (("train", "train"), ("val", "validation")):
        contents = [(folder / part / f"class{n}" / "0.png").read_bytes() for n in range(3)]
        contents[1] = contents[1] if part == "val" else contents[1][:50]
        images = [{"bytes": content, "path": None} for content in contents]
        if absent and part == "train":
            images[1] = None
        rows = {"label": [0, 1, 2], "image": images}
        splits[name] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(str(path))


@pytest.mark.parametrize("absent", [False, True], ids=["damaged", "absent"])
def test_a_saved_data_set_is_read_like_folders(folder: Path, absent: bool, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "saved"
    save_data_set(folder, path, absent=absent)
    (training, held_out), (plain, _) = load(path), load(folder)
    assert (len(training), len(held_out)) == (3, 3)
    batch = training.select(torch.arange(3))
    assert torch.equal(batch.inputs, plain.select(torch.tensor([0, 6, 6])).inputs)
    assert batch.targets.tolist() == [0, 2, 2]
    assert f"warning: {path} train row 1 is skipped" in capsys.readouterr().err
    assert held_out.select(torch.arange(3)).targets.tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="classes: 2 is not allowed: must be at least 3, the classes of"):
        load(path, classes=2)


def test_a_data_set_that_cannot_be_used_is_named(folder: Path) -> None:
    save_data_set(folder, folder / "numbers", label=datasets.Value("int64"))
    with pytest.raises(InputError, match=r"columns label, image: must include an Image and a ClassLabel"):
        load(folder / "numbers")
    save_data_set(folder, folder / "cut")
    arrow = next((folder / "cut" / "train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(InputError, match="cut: cannot be read as a data set: "):
        load(folder / "cut")
    datasets.Dataset.from_dict({"label": [1]}).save_to_disk(str(folder / "single"))
    with pytest.raises(InputError, match="single: must hold splits train, and val, validation or test"):
        load(folder / "single")


def test_a_folder_that_cannot_be_used_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"data_path: .* must be a folder with train/CLASS"):
        load(folder / "train")
    with pytest.raises(InputError, match=r"data_path: .* must be a folder with train/CLASS"):
        load(folder / "absent")
    with pytest.raises(InputError, match="classes: 2 is not allowed: must be at least 3, the classes of"):
        load(folder, classes=2)
    with pytest.raises(InputError, match="channels: 2 is not allowed: must be 1 or 3"):
        load(folder, channels=2)
    (folder / "val" / "other").mkdir()
    with pytest.raises(InputError, match="val/other: is not allowed: must be a class of the training images"):
        load(folder)
    (folder / "val" / "other").rmdir()
    for path in (folder / "val").glob("*/*.png"):
        path.unlink()
    with pytest.raises(InputError, match="val: holds no image"):
        load(folder)


def test_a_fingerprint_tells_whether_images_were_exchanged(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = load(folder)[0].fingerprint()
    moved = tmp_path_factory.mktemp("moved") / "data"
    shutil.copytree(folder, moved)
    assert load(moved)[0].fingerprint() == first
    (moved / "train" / "class1" / "0.png").rename(moved / "train" / "class1" / "7.png")
    assert load(moved)[0].fingerprint() != first
    (moved / "train" / "class1" / "7.png").rename(moved / "train" / "class1" / "0.png")
    assert load(moved)[0].fingerprint() == first
    picture(99).save(moved / "train" / "class1" / "0.png")
    assert load(moved)[0].fingerprint() != first
