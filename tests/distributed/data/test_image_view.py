"""What a model sees of an image: operations and crops equal torchvision's, random ones depend on the seed alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from translution.distributed.data.image_view import OPERATIONS, ImageView, rand_augment, random_box
from translution.planner.config.model import VitSpec, parse_model_spec

TORCHVISION = np.load(Path(__file__).parents[2] / "data" / "images" / "torchvision.npz")
"""Pictures and what torchvision 0.29.1 made of them with Pillow: RandAugment's operations at a magnitude, and
CenterCrop(14) after Resize(16). Made by torchvision's own functions; Pillow's rounding may differ by one level."""


def view(**fields: Any) -> ImageView:
    model = {"family": "vit", "image": (14, 14), "patch": 7, "classes": 3, "dim": 8, "depth": 1, "heads": 1}
    spec = parse_model_spec(model | fields.pop("model", {}))
    assert isinstance(spec, VitSpec)
    return ImageView(spec, **fields)


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, quality=95)
    return file.getvalue()


OPERATION_CASES = [name for name in TORCHVISION.files if name.count("/") == 2 and not name.startswith("held-out")]


@pytest.mark.parametrize("case", OPERATION_CASES)
def test_an_operation_is_torchvisions(case: str) -> None:
    mode, name, magnitude = case.split("/")
    picture = Image.fromarray(TORCHVISION[f"{mode}/picture"])
    made = np.asarray(OPERATIONS[name].apply(picture, int(magnitude) / 30), dtype=int)
    difference = np.abs(made - TORCHVISION[case])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.1
    # A gray picture has no colour to change.
    if name != "identity" and (mode, name) != ("L", "color"):
        assert (made != TORCHVISION[f"{mode}/picture"]).any()


def test_every_operation_has_a_case() -> None:
    assert {case.split("/")[1] for case in OPERATION_CASES} == set(OPERATIONS)
    for name, operation in OPERATIONS.items():
        signs = {case.split("/")[2][0] == "-" for case in OPERATION_CASES if case.split("/")[1] == name}
        assert signs == ({True, False} if operation.directed else {False})


@pytest.mark.parametrize("number", range(3))
def test_a_held_out_image_is_scaled_and_cropped_as_torchvision_does(number: int) -> None:
    content = encode(TORCHVISION[f"held-out/{number}/picture"])
    made = view(centre_crop=0.875).pixels(content, 0, 0)
    assert np.abs(made.astype(int) - TORCHVISION[f"held-out/{number}/crop"]).max() <= 1


def test_a_wide_model_sees_the_centre_of_an_image() -> None:
    """A ramp from left to right and from top to bottom: the crop keeps the middle half of the limiting side."""
    ramp = np.zeros((40, 60, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(60) * 4, np.arange(40)[:, None] * 6
    made = view(centre_crop=0.5, model={"image": (10, 20), "patch": 5}).pixels(encode(ramp), 0, 0).astype(int)
    assert made.shape == (10, 20, 3)
    # 60 pixels become 40, of which 20 are kept; 40 become 26, of which 10 are kept.
    assert made[0, 0, 0] == pytest.approx(15 * 4, abs=4)
    assert made[0, -1, 0] == pytest.approx(44 * 4, abs=4)
    assert made[0, 0, 1] == pytest.approx(12.3 * 6, abs=6)
    assert made[-1, 0, 1] == pytest.approx(26.6 * 6, abs=6)


def test_random_crops_have_the_wanted_areas_ratios_and_places() -> None:
    random = np.random.default_rng(0)
    boxes = np.array([random_box((200, 100), 0.08, random) for _ in range(4000)])
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = wide * high / 20_000, wide / high
    assert (boxes >= 0).all()
    assert boxes[:, 2].max() <= 200
    assert boxes[:, 3].max() <= 100
    assert area.min() == pytest.approx(0.08, abs=0.01)
    assert ratio.min() > 0.72
    assert ratio.max() < 1.38
    # Large areas fit a flat image rarely: the largest crop of ratio 4:3 has two thirds of the area.
    assert area.max() == pytest.approx(2 / 3, abs=0.02)
    assert np.median(boxes[:, 0] + wide / 2) == pytest.approx(100, abs=5)
    assert np.median(boxes[:, 1] + high / 2) == pytest.approx(50, abs=3)


def test_an_image_too_narrow_for_any_crop_gives_its_centre() -> None:
    random = np.random.default_rng(0)
    assert random_box((10, 1000), 0.99, random) == (0, 493, 10, 506)
    assert random_box((1000, 10), 0.99, random) == (493, 0, 506, 10)


def test_random_views_depend_on_seed_epoch_and_number_alone() -> None:
    content = encode(TORCHVISION["RGB/picture"])
    fields: dict[str, Any] = {"crop_scale": 0.3, "operations": 2, "magnitude": 9, "seed": 1}
    made = {key: view(**fields).pixels(content, *key) for key in ((0, 0), (1, 0), (0, 1))}
    assert all(pixels.shape == (14, 14, 3) and pixels.dtype == np.uint8 for pixels in made.values())
    assert np.array_equal(view(**fields).pixels(content, 0, 0), made[0, 0])
    assert not np.array_equal(made[0, 0], made[1, 0])
    assert not np.array_equal(made[0, 0], made[0, 1])
    assert not np.array_equal(view(**fields | {"seed": 2}).pixels(content, 0, 0), made[0, 0])


def test_a_crop_of_a_jpeg_decoded_at_reduced_size_is_the_same_crop() -> None:
    y, x = np.mgrid[:800, :1200]
    pixels = np.stack([x * 255 // 1199, y * 255 // 799, np.full_like(x, 60)], axis=-1).astype(np.uint8)
    contents = [encode(pixels, kind) for kind in ("JPEG", "PNG")]
    for number in range(20):
        reduced, full = (view(crop_scale=0.08, seed=3).pixels(content, number, 0).astype(int) for content in contents)
        assert np.abs(reduced - full).max() < 6


def test_rand_augment_draws_every_operation_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[str, float]] = []
    for name, operation in OPERATIONS.items():

        def apply(image: Any, strength: float, name: str = name) -> Any:
            used.append((name, strength))
            return image

        monkeypatch.setitem(OPERATIONS, name, operation._replace(apply=apply))
    random = np.random.default_rng(0)
    for _ in range(700):
        rand_augment(Image.new("L", (4, 4)), 2, 9, random)
    assert len(used) == 1400
    for name, operation in OPERATIONS.items():
        strengths = [strength for which, strength in used if which == name]
        assert 70 <= len(strengths) <= 130
        assert set(strengths) == ({0.3, -0.3} if operation.directed else {0.3})
