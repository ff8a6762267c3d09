"""Data sources and batching: global batches do not depend on the number of ranks."""

from __future__ import annotations

import gc
import json
import weakref
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers.runs import write_plan
from pydantic import TypeAdapter

from translution.cli.main import run
from translution.distributed.checkpoint.resume import check_same_training
from translution.distributed.data.base import DataSource, Samples
from translution.distributed.data.batching import micro_batches
from translution.distributed.data.digits import load_digits
from translution.distributed.data.loaders import load_samples
from translution.distributed.data.synthetic import make_synthetic
from translution.distributed.training.lr_schedule import learning_rate_factor
from translution.planner.common.errors import InputError
from translution.planner.common.schema import validate
from translution.planner.config.datasets import DIGITS_TRAINING_SAMPLES
from translution.planner.config.loading import preset
from translution.planner.config.model import ModelSpec, VitSpec, parse_model_spec
from translution.planner.config.training import TrainingSpec
from translution.planner.plans.plan import Plan, load_plan

DIGITS = {"family": "vit", "image": 16, "patch": 4, "classes": 10, "dim": 8, "depth": 1, "heads": 1}
CLIP: dict[str, object] = {"family": "video", "frames": 5, "image": [24, 16], "tubelet": [5, 8, 8], "channels": 2}
CLIP |= {"classes": 10, "dim": 8, "depth": 1, "heads": 1}


def numbered(count: int) -> Samples:
    return Samples(torch.arange(count), torch.arange(count))


def steps(ranks: int, micro_batch: int, gradient_accumulation_steps: int, count: int = 7) -> list[set[int]]:
    """Return the samples of each global batch, collected from all ranks."""
    streams = [
        micro_batches(
            numbered(50),
            micro_batch=micro_batch,
            gradient_accumulation_steps=gradient_accumulation_steps,
            rank=rank,
            world_size=ranks,
            seed=3,
        )
        for rank in range(ranks)
    ]
    batches = []
    for shares in islice(zip(*streams, strict=True), count):
        taken = [int(n) for share in shares for batch in share for n in batch.inputs]
        assert len(taken) == len(set(taken)) == micro_batch * gradient_accumulation_steps * ranks
        batches.append(set(taken))
    return batches


def test_the_global_batch_does_not_depend_on_how_it_is_split() -> None:
    assert steps(1, 8, 1) == steps(2, 4, 1) == steps(4, 2, 1) == steps(2, 2, 2) == steps(1, 1, 8)


def test_an_epoch_has_every_sample_once_and_the_next_another_order() -> None:
    first, second = steps(1, 25, 1, 2), steps(1, 25, 1, 4)[2:]
    assert first[0] | first[1] == second[0] | second[1] == set(range(50))
    assert first != second


def test_a_global_batch_larger_than_the_data_is_rejected() -> None:
    with pytest.raises(InputError, match="global batch: 64 is not allowed: must be at most 50"):
        next(micro_batches(numbered(50), micro_batch=32, gradient_accumulation_steps=1, rank=0, world_size=2, seed=0))


def test_digits_are_split_evenly_and_without_overlap() -> None:
    training, held_out = load_digits(parse_model_spec(DIGITS | {"channels": 1}))
    assert len(training) + len(held_out) == 1797
    assert torch.bincount(held_out.targets).min() >= 35
    assert training.inputs.shape[1:] == (1, 16, 16)
    flat = {tuple(image.flatten().tolist()) for image in held_out.inputs}
    assert not flat & {tuple(image.flatten().tolist()) for image in training.inputs}


def test_the_planner_knows_how_many_digits_there_are() -> None:
    training, _ = load_digits(parse_model_spec(DIGITS))
    assert len(training) == DIGITS_TRAINING_SAMPLES


@pytest.mark.parametrize("spec", [parse_model_spec(DIGITS), preset("gpt-tiny/160")], ids=["vit", "gpt"])
def test_synthetic_data_suffices_for_any_global_batch_and_takes_little_memory(spec: ModelSpec) -> None:
    training, held_out = make_synthetic(spec, seed=0, global_batch=1_000_000)
    assert len(training) >= 1_000_000
    assert len(held_out) > 0
    assert sum(tensor.untyped_storage().nbytes() for tensor in training.resident) < 40e6
    micro_batch = training.select(torch.tensor([5, 999_999]))
    assert micro_batch.inputs.shape == ((2, 3, 16, 16) if isinstance(spec, VitSpec) else (2, 160))


def placed(kind: str, image: object = 24, seed: int = 3, **training: object) -> tuple[DataSource, DataSource]:
    spec = parse_model_spec(DIGITS | {"image": image, "channels": 2})
    return load_samples(spec, TrainingSpec(data=kind, seed=seed, **training))


def corners(batch: Samples, size: int) -> list[tuple[int, int]]:
    """Return the upper left corner of each digit: that of the bounding box of all pixels except background."""
    found = []
    for image in batch.inputs[:, 0]:
        rows, columns = torch.nonzero(image > image.min(), as_tuple=True)
        assert rows.max() - rows.min() < size
        assert columns.max() - columns.min() < size
        found.append((int(rows.min()), int(columns.min())))
    return found


def test_a_static_digit_is_in_the_center_of_a_larger_image() -> None:
    training, held_out = placed("digits-static", image=(24, 16), digit_pixels=8)
    assert len(training) == DIGITS_TRAINING_SAMPLES
    filling, filling_held_out = load_digits(parse_model_spec(DIGITS | {"image": 8, "channels": 2}))
    for source, digits in ((training, filling), (held_out, filling_held_out)):
        batch = source.select(torch.tensor([0, 7, 300]))
        assert batch.inputs.shape == (3, 2, 24, 16)
        assert torch.equal(batch.inputs[:, :, 8:16, 4:12], digits.inputs[[0, 7, 300]])
        outside = batch.inputs.clone()
        outside[:, :, 8:16, 4:12] = outside[0, 0, 0, 0]
        assert outside.unique().numel() == 1
        assert torch.equal(batch.targets, digits.targets[[0, 7, 300]])


def test_a_shifted_digit_moves_in_every_epoch_and_a_held_out_one_stays() -> None:
    training, held_out = placed("digits-shifted")
    index = torch.arange(200)
    first, second = (corners(training.select(index, epoch), 12) for epoch in (0, 1))
    assert first != second
    assert len(set(first)) > 50
    assert {row for row, _ in first} >= set(range(2, 12))
    assert torch.equal(training.select(index, 1).inputs, placed("digits-shifted")[0].select(index, 1).inputs)
    assert not torch.equal(training.select(index).inputs, placed("digits-shifted", seed=4)[0].select(index).inputs)
    assert torch.equal(held_out.select(index).inputs, placed("digits-shifted")[1].select(index).inputs)


def test_a_digit_moved_by_patches_keeps_its_patches() -> None:
    moved, centered = placed("digits-patches")[0], placed("digits-static")[0]
    index = torch.arange(200)

    def patches(source: DataSource) -> torch.Tensor:
        cut = source.select(index).inputs[:, 0].unfold(1, 4, 4).unfold(2, 4, 4)
        return cut.reshape(len(index), -1, 16)

    assert torch.equal(patches(moved).sum(2).sort(1).values, patches(centered).sum(2).sort(1).values)
    away = (patches(moved) != patches(centered)).flatten(1).any(1)
    assert 0.7 < away.float().mean() < 1  # One of nine positions is the center.
    assert {(row - center) % 4 for (row, _), (center, _) in zip(
        corners(moved.select(index), 12), corners(centered.select(index), 12), strict=True
    )} == {0}  # fmt: skip


def test_the_position_of_a_shifted_digit_does_not_depend_on_its_batch() -> None:
    training, _ = placed("digits-shifted")
    together = training.select(torch.tensor([4, 900, 17]), 2)
    alone = training.select(torch.tensor([900]), 2)
    assert torch.equal(together.inputs[1:2], alone.inputs)


def moving(seed: int = 3, **fields: object) -> tuple[DataSource, DataSource]:
    spec = parse_model_spec(CLIP | fields)
    return load_samples(spec, TrainingSpec(data="digits-moving", seed=seed, digit_pixels=8))


def test_a_moving_digit_crosses_its_clip_in_a_straight_line() -> None:
    training, held_out = moving()
    filling, filling_held_out = load_digits(parse_model_spec(DIGITS | {"image": 8, "channels": 2}))
    for source, digits in ((training, filling), (held_out, filling_held_out)):
        batch = source.select(torch.arange(0, 300, 3))
        assert batch.inputs.shape == (100, 2, 5, 24, 16)
        assert torch.equal(batch.targets, digits.targets[:300:3])
        paths = torch.tensor([corners(Samples(clip.transpose(0, 1), clip), 8) for clip in batch.inputs])
        # A digit whose outermost pixels are background appears a little further in.
        steps = paths.diff(dim=1).float()
        assert (steps - steps.mean(1, keepdim=True)).abs().max() < 1.01
        assert (steps.abs().sum((1, 2)) > 0).float().mean() > 0.9
        assert paths[..., 0].max() >= 14
        for clip, image, path in zip(batch.inputs, digits.inputs[:300:3], paths, strict=True):
            top, left = corners(Samples(image[None], image), 8)[0]
            for frame, (row, column) in zip(clip.transpose(0, 1), path - torch.tensor([top, left]), strict=True):
                assert torch.equal(frame[:, row : row + 8, column : column + 8], image)
                assert (frame == frame.min()).sum() == (image == image.min()).sum() + 2 * (24 * 16 - 64)


def test_the_paths_of_moving_digits_change_with_epoch_and_seed_only() -> None:
    training, held_out = moving()
    index = torch.arange(20)
    assert not torch.equal(training.select(index, 0).inputs, training.select(index, 1).inputs)
    assert torch.equal(training.select(index, 1).inputs, moving()[0].select(index, 1).inputs)
    assert not torch.equal(training.select(index).inputs, moving(seed=4)[0].select(index).inputs)
    assert torch.equal(training.select(index, 2).inputs[7:8], training.select(index[7:8], 2).inputs)
    assert torch.equal(held_out.select(index).inputs, moving()[1].select(index).inputs)


def test_evaluation_data_may_be_another_kind() -> None:
    training, held_out = placed("digits-static", evaluation_data="digits-shifted")
    index = torch.arange(50)
    assert torch.equal(training.select(index).inputs, placed("digits-static")[0].select(index).inputs)
    assert torch.equal(held_out.select(index).inputs, placed("digits-shifted")[1].select(index).inputs)


@pytest.mark.parametrize("kind", ["digits", "digits-shifted", "synthetic"])
def test_ranks_share_one_global_batch_also_after_an_interruption(kind: str) -> None:
    """Compare bit by bit, across the end of an epoch: 1,433 digits are 14 steps of 96."""
    spec = parse_model_spec(DIGITS)
    training, _ = load_samples(spec, TrainingSpec(data=kind))

    def global_batches(ranks: int, first: int, count: int) -> list[torch.Tensor]:
        streams = [
            micro_batches(
                training,
                micro_batch=96 // ranks,
                gradient_accumulation_steps=1,
                rank=rank,
                world_size=ranks,
                seed=5,
                first_step=first,
            )
            for rank in range(ranks)
        ]
        shares = islice(zip(*streams, strict=True), count)
        return [torch.cat([share[0].inputs for share in step]) for step in shares]

    expected = global_batches(1, 0, 17)
    for ranks in (2, 3):
        for one, other in zip(expected, global_batches(ranks, 0, 17), strict=True):
            assert torch.equal(one, other)
    for one, other in zip(expected[9:], global_batches(2, 9, 8), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "tokens"}, "data_path: is required with data tokens"),
        ({"evaluation_data": "images"}, "data_path: is required with data digits and images"),
        ({"data_path": "/data"}, "data_path: '/data' is not allowed: must be null with data digits"),
        ({"digit_pixels": 8}, "digit_pixels: 8 is not allowed: must be null with data digits"),
        ({"data": "faces"}, "data: 'faces' is not allowed: input should be 'digits'"),
        ({"corrupt_limit": -1}, "corrupt_limit: -1 is not allowed"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_contradicting_data_settings_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        validate(TypeAdapter(TrainingSpec), values, "plan", ())
    assert message in str(error.value)


def test_an_older_plan_loads_and_its_run_resumes_with_another_limit(tmp_path: Path) -> None:
    folder = write_plan(tmp_path / "plan", 1)
    plan = load_plan(folder)
    document = json.loads((folder / "plan.json").read_text())
    for name in ("evaluation_data", "data_path", "digit_pixels", "corrupt_limit"):
        del document["training"][name]
    del document["digest"]
    (folder / "plan.json").write_text(json.dumps(document))
    before = load_plan(folder)
    assert before == plan

    def changed(**values: object) -> Plan:
        return plan.model_copy(update={"training": plan.training.model_copy(update=values)})

    check_same_training(changed(corrupt_limit=5, evaluation_data="digits-static"), before)
    with pytest.raises(InputError, match=r"training.data_path: '/b' is not allowed: must be None"):
        check_same_training(changed(data_path="/b"), before)


GPT = {"family": "gpt", "context": 8, "vocabulary": 200, "dim": 8, "depth": 1, "heads": 1}


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (
            CLIP,
            ["data=digits"],
            "data: 'digits' is not allowed: must be used with a vit model of at least 10 classes; use digits-moving",
        ),
        (DIGITS, ["data=digits-moving"], "data: 'digits-moving' is not allowed: must be used with a video model"),
        (CLIP, ["data=digits-moving", "flip=0.5"], "flip: 0.5 is not allowed: must be 0.0 with a video model"),
        (GPT, ["data=digits-shifted"], "data: 'digits-shifted' is not allowed: must be used with a vit model"),
        (GPT, ["data=images", "data_path=x"], "data: 'images' is not allowed: must be used with a vit model"),
        (GPT, ["data=stdlib"], "data: 'stdlib' is not allowed: must be used with a gpt model of vocabulary 256"),
        (DIGITS, ["data=tokens", "data_path=x"], "data: 'tokens' is not allowed: must be used with a gpt model"),
        (DIGITS, ["data=digits-static", "digit_pixels=17"], "digit_pixels: 17 is not allowed: must be at most 16"),
        (DIGITS, ["evaluation_data=stdlib"], "evaluation_data: 'stdlib' is not allowed"),
        (
            DIGITS | {"classes": 9},
            ["data=digits"],
            "data: 'digits' is not allowed: must be used with a vit model of at least 10",
        ),
        (DIGITS, ["data=images"], "data_path: is required with data images"),
    ],
)
def test_plan_rejects_data_that_does_not_fit_the_model(
    model: dict[str, object],
    settings: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "model.json").write_text(json.dumps(model))
    flags = [part for setting in settings for part in ("--train", setting)]
    command = ["plan", str(tmp_path / "model.json"), "--cluster", "cpu:1", "--out", str(tmp_path / "plan"), *flags]
    assert run(command) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "plan").exists()


def test_a_step_does_not_keep_the_samples_that_it_was_given() -> None:
    """Augmented ones replace them: both would lie in memory."""
    stream = micro_batches(numbered(50), micro_batch=4, gradient_accumulation_steps=2, rank=0, world_size=1, seed=0)
    given = [weakref.ref(batch) for batch in next(stream)]
    gc.collect()
    assert [reference() for reference in given] == [None, None]


def test_synthetic_text_predicts_the_next_token() -> None:
    training, _ = make_synthetic(preset("gpt-tiny/160"), seed=0)
    assert torch.equal(training.inputs[0, 1:], training.targets[0, :-1])


def test_the_schedule_warms_up_and_ends_near_zero() -> None:
    factors = [learning_rate_factor(step, 4, 20) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.02


@pytest.mark.parametrize("epochs", [1, 3, 10])
def test_a_schedule_by_epochs_is_torchs(epochs: int) -> None:
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for epoch in range(epochs):
        factors = {learning_rate_factor(5 * epoch + step, 0, 5 * epochs, 5) for step in range(5)}
        assert len(factors) == 1
        assert factors.pop() == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_a_schedule_by_epochs_counts_them_from_the_end_of_the_warm_up() -> None:
    factors = [learning_rate_factor(step, 2, 9, 3) for step in range(9)]
    # Two steps of warm-up, then epochs of 3, 3 and 1 steps.
    assert factors == [0.5, *[1.0] * 4, *[pytest.approx(0.75)] * 3, pytest.approx(0.25)]


def test_the_digits_are_those_that_scikit_learn_loads() -> None:
    from sklearn.datasets import load_digits as load

    bunch = load()
    spec = parse_model_spec({"family": "vit", "image": 8, "patch": 4, "channels": 1, "classes": 10, "dim": 8,
                             "depth": 1, "heads": 1})  # fmt: skip
    training, held_out = load_digits(spec)
    assert len(training) + len(held_out) == len(bunch.target) == 1797
    every = torch.cat([training.inputs, held_out.inputs]) * 0.38 + 0.3
    pairs = {(*image.flatten().mul(16).round().int().tolist(), label) for image, label in
             zip(every, [*training.targets.tolist(), *held_out.targets.tolist()], strict=True)}  # fmt: skip
    assert pairs == {(*image.flatten().astype(int).tolist(), int(label)) for image, label in
                     zip(bunch.images, bunch.target, strict=True)}  # fmt: skip
