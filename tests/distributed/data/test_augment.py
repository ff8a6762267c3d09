"""Image augmentation: what it does, and that it depends only on the seed, the step and the rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from translution.distributed.data.augment import Augmenter, soft_targets
from translution.distributed.data.base import Samples
from translution.distributed.training.engine import smoothed_cross_entropy
from translution.planner.common.errors import InputError
from translution.planner.config.loading import preset
from translution.planner.config.model import parse_model_spec
from translution.planner.config.training import TrainingSpec
from translution.planner.plans.build import check_data

SPEC = parse_model_spec(
    {"family": "vit", "image": [6, 8], "patch": 2, "channels": 2, "classes": 10, "dim": 8, "depth": 1, "heads": 1}
)
EVERY: dict[str, Any] = {"crop_padding": 2, "flip": 0.5, "mixup": 0.4, "cutmix": 1.0}


def augmenter(rank: int = 0, world_size: int = 1, **training: Any) -> Augmenter:
    return Augmenter(SPEC, TrainingSpec(**training), rank, world_size)


def noise(count: int = 8) -> Samples:
    images = torch.randn(count, 2, 6, 8, generator=torch.Generator().manual_seed(3))
    return Samples(images, torch.arange(count))


def flat(count: int = 8) -> Samples:
    """Images that each have one value, which is their class."""
    return Samples(torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 2, 6, 8).clone(), torch.arange(count))


def same(one: list[Samples], other: list[Samples]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) for a, b in pairs)


@pytest.mark.parametrize("options", [EVERY, {"crop_scale": 0.3, "mixup": 1.0}], ids=["pad", "scale"])
def test_augmentation_of_a_step_does_not_depend_on_earlier_random_values(options: dict[str, Any]) -> None:
    batches = [noise(), noise()]
    first = augmenter(**options)(batches, 5)
    torch.manual_seed(77)
    again = augmenter(**options)
    before = torch.get_rng_state()
    for step in (1, 9):
        again(batches, step)
    assert same(again(batches, 5), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(batches, [noise(), noise()])
    for other in (again(batches, 6), augmenter(seed=1, **options)(batches, 5), augmenter(1, 2, **options)(batches, 5)):
        assert not torch.equal(other[0].inputs, first[0].inputs)
    assert not torch.equal(first[0].inputs, first[1].inputs)
    assert all(batch.inputs.shape == (8, 2, 6, 8) and batch.inputs.isfinite().all() for batch in first)


def test_without_augmentation_batches_are_unchanged() -> None:
    batches = [noise()]
    assert augmenter(label_smoothing=0.1)(batches, 0) is batches


def test_a_crop_is_a_window_of_the_padded_image() -> None:
    batch = noise(16)
    (cropped,) = augmenter(crop_padding=1)([batch], 2)
    assert torch.equal(cropped.targets, batch.targets)
    padded, positions = pad(batch.inputs, (1, 1, 1, 1)), set()
    for image, full in zip(cropped.inputs, padded, strict=True):
        windows = {(y, x): full[:, y : y + 6, x : x + 8] for y in range(3) for x in range(3)}
        positions |= {position for position, window in windows.items() if torch.equal(window, image)}
    assert len(positions) > 3


def test_a_scaled_crop_keeps_the_size_and_the_values() -> None:
    batch = noise(16)
    (cropped,) = augmenter(crop_scale=0.3)([batch], 2)
    assert cropped.inputs.shape == batch.inputs.shape
    assert not torch.equal(cropped.inputs, batch.inputs)
    (even,) = augmenter(crop_scale=0.3)([flat()], 2)
    torch.testing.assert_close(even.inputs, flat().inputs)


def test_a_flip_mirrors_left_to_right() -> None:
    batch = noise()
    (flipped,) = augmenter(flip=1.0)([batch], 0)
    assert torch.equal(flipped.inputs, batch.inputs.flip(3))
    (some,) = augmenter(flip=0.5)([noise(64)], 0)
    count = int((some.inputs != noise(64).inputs).flatten(1).any(1).sum())
    assert 16 < count < 48


def fractions_of(images: Tensor) -> Tensor:
    """Fraction of each image with each integer value, (B, 10)."""
    return torch.stack([(images == value).float().mean((1, 2, 3)) for value in range(10)], dim=1)


def test_targets_are_the_fractions_of_the_mixed_images() -> None:
    cut, mixed = augmenter(cutmix=1.0), augmenter(mixup=0.4)
    for step in range(5):
        (batch,) = cut([flat()], step)
        torch.testing.assert_close(batch.targets, fractions_of(batch.inputs))
        (batch,) = mixed([flat()], step)
        torch.testing.assert_close(batch.targets.sum(1), torch.ones(8))
        torch.testing.assert_close(batch.inputs[:, 0, 0, 0], batch.targets @ torch.arange(10.0))
        torch.testing.assert_close(batch.inputs, batch.inputs[:, :1, :1, :1].expand(-1, 2, 6, 8))
        assert (batch.targets.amax(1) < 1).any()


def test_mixup_weights_follow_the_beta_distribution() -> None:
    """Beta(0.1, 0.1) is concentrated at 0 and 1, Beta(50, 50) around 0.5: variances 0.208 and 0.00248."""
    for alpha, variance in ((0.1, 0.25 / 1.2), (50.0, 0.25 / 101)):
        (batch,) = augmenter(mixup=alpha)([Samples(torch.zeros(4000, 2, 6, 8), torch.arange(4000) % 10)], 0)
        two = (batch.targets > 0).sum(1) == 2
        own = batch.targets[two, (torch.arange(4000) % 10)[two]]
        assert len(own) > 100
        # A pair whose weight rounds to zero looks like one class; without such pairs the variance is a little smaller.
        assert float(((own - 0.5) ** 2).mean()) == pytest.approx(variance, rel=0.25)


def test_each_micro_batch_gets_mixup_or_cutmix_at_random() -> None:
    both = augmenter(mixup=1.0, cutmix=1.0)([flat()] * 40, 0)
    integer_values = [bool((batch.inputs == batch.inputs.round()).all()) for batch in both]
    assert 8 < sum(integer_values) < 32


def test_mixed_targets_weigh_two_smoothed_cross_entropies() -> None:
    logits, own, other = torch.randn(6, 10), torch.arange(6), torch.arange(6).flip(0)
    share = torch.rand(6)
    shares = soft_targets(torch.stack([own.float(), other.float(), share], dim=1), 10)
    one, two = (cross_entropy(logits, classes, label_smoothing=0.2, reduction="none") for classes in (own, other))
    expected = ((1 - share) * one + share * two).mean()
    torch.testing.assert_close(smoothed_cross_entropy(logits, shares, 0.2), expected)
    tokens = own.view(2, 3)
    torch.testing.assert_close(smoothed_cross_entropy(logits, tokens, 0.2), one.mean())
    plain = smoothed_cross_entropy(logits, tokens, 0.0)
    assert torch.equal(plain, cross_entropy(logits, own))
    assert plain != one.mean()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixup": 0.8}, "mixup: 0.8 is not allowed: must be 0.0 with a gpt model"),
        ({"crop_scale": 0.5}, "crop_scale: 0.5 is not allowed: must be 1.0 with a gpt model"),
        ({"crop_padding": 2}, "crop_padding: 2 is not allowed: must be 0 with a gpt model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_text_is_not_augmented(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        check_data(preset("gpt-tiny/160"), TrainingSpec(data="synthetic", **values), 8)
    assert str(raised.value) == message
    check_data(preset("gpt-tiny/160"), TrainingSpec(data="synthetic", label_smoothing=0.1), 8)


def test_padding_is_smaller_than_the_image() -> None:
    check_data(SPEC, TrainingSpec(crop_padding=5), 8)
    with pytest.raises(InputError, match="crop_padding: 6 is not allowed: must be below 6, the image's side"):
        check_data(SPEC, TrainingSpec(crop_padding=6), 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"flip": 1.5}, "flip"),
        ({"mixup": -0.1}, "mixup"),
        ({"crop_scale": 0.0}, "crop_scale"),
        ({"crop_scale": 0.5, "crop_padding": 2}, "crop_scale: 0.5 is not allowed: must be 1 with crop_padding"),
        ({"evaluation_steps": -1}, "evaluation_steps"),
        ({"monitor": "comet"}, "monitor"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_values_out_of_range_are_rejected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingSpec(**values)
