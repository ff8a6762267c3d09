"""Samples: the same global batches whatever the number of ranks."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from translution.distributed.data import Samples, make_synthetic, micro_batches
from translution.distributed.digits import load_digits
from translution.distributed.train import learning_rate_factor
from translution.planner.data_kinds import DIGITS_TRAINING_SAMPLES
from translution.planner.errors import InputError
from translution.planner.model_spec import parse_model_spec
from translution.planner.presets import preset

DIGITS = {"family": "vit", "image": 16, "patch": 4, "classes": 10, "dim": 8, "depth": 1, "heads": 1}


def numbered(count: int) -> Samples:
    return Samples(torch.arange(count), torch.arange(count))


def steps(ranks: int, micro_batch: int, accumulation: int, count: int = 7) -> list[set[int]]:
    """The samples of each global batch, put together from all ranks."""
    streams = [
        micro_batches(numbered(50), micro_batch=micro_batch, accumulation=accumulation, rank=rank, ranks=ranks, seed=3)
        for rank in range(ranks)
    ]
    batches = []
    for shares in islice(zip(*streams, strict=True), count):
        taken = [int(n) for share in shares for batch in share for n in batch.inputs]
        assert len(taken) == len(set(taken)) == micro_batch * accumulation * ranks
        batches.append(set(taken))
    return batches


def test_the_global_batch_does_not_depend_on_how_it_is_shared() -> None:
    assert steps(1, 8, 1) == steps(2, 4, 1) == steps(4, 2, 1) == steps(2, 2, 2) == steps(1, 1, 8)


def test_an_epoch_gives_every_sample_once_and_the_next_another_order() -> None:
    first, second = steps(1, 25, 1, 2), steps(1, 25, 1, 4)[2:]
    assert first[0] | first[1] == second[0] | second[1] == set(range(50))
    assert first != second


def test_too_large_a_step_is_named() -> None:
    with pytest.raises(InputError, match="global batch: 64 is not allowed: must be at most 50"):
        next(micro_batches(numbered(50), micro_batch=32, accumulation=1, rank=0, ranks=2, seed=0))


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


def test_synthetic_data_suffices_for_any_step() -> None:
    training, held_out = make_synthetic(parse_model_spec(DIGITS), seed=0, step=10_000)
    assert len(training) >= 10_000
    assert len(held_out) > 0


def test_synthetic_text_predicts_the_next_token() -> None:
    training, _ = make_synthetic(preset("gpt-tiny/160"), seed=0)
    assert torch.equal(training.inputs[0, 1:], training.targets[0, :-1])


def test_the_schedule_warms_up_and_ends_near_nought() -> None:
    factors = [learning_rate_factor(step, 4, 20) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.02
