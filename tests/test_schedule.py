"""The peak of a training step as the replay says, against what torch's allocator counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from translution.distributed.measure import count_every_allocation
from translution.distributed.single import measure_passes
from translution.planner.model_spec import parse_model_spec
from translution.planner.schedule import MICRO_BATCHES, replay
from translution.planner.twins import Widths

SIZES: dict[str, Any] = {"dim": 64, "depth": 2, "heads": 4}
VIT: dict[str, Any] = {"family": "vit", "image": [48, 32], "patch": 8, "channels": 3, "classes": 10} | SIZES
GPT: dict[str, Any] = {"family": "gpt", "context": 48, "vocabulary": 211} | SIZES
WIDE: dict[str, Any] = VIT | {"image": 40, "classes": 100, "dim": 96, "depth": 2, "heads": 3}
LOW = {"operator": "alpha", "c1": 4, "c2": 6}
BOTH: list[dict[str, Any]] = [
    {"operator": "attention"},
    {"operator": "attention", "rotary": True},
    {"operator": "translution"},
    {"operator": "translution", "roles": "kv"},
    {"operator": "translution", "roles": "q"},
    {"operator": "translution", "roles": "v"},
    LOW,
    LOW | {"roles": "k"},
    {"operator": "translution", "relative_layers": "first:1"},
    {"operator": "bias"},
    {"operator": "bias", "window": 2},
    {"operator": "shaw"},
    {"operator": "absolute"},
    {"operator": "absolute", "roles": "kv"},
    {"operator": "attention", "checkpointing": "block"},
    {"operator": "translution", "checkpointing": "block"},
    LOW | {"checkpointing": "offload"},
    {"operator": "attention", "dropout": 0.2},
    {"operator": "translution", "dropout": 0.2},
    LOW | {"dropout": 0.1},
    {"operator": "shaw", "dropout": 0.1},
    {"operator": "absolute", "dropout": 0.1},
]
CASES: list[dict[str, Any]] = [
    *(base | operator for base in (VIT, GPT) for operator in BOTH),
    WIDE | {"operator": "alpha", "c1": 16, "c2": 8},
    WIDE | {"operator": "translution", "pool": "mean", "class_token": False},
    WIDE | {"operator": "translution", "heads": 1, "head_dim": 96},
    WIDE | {"operator": "translution", "window": 2},
    WIDE | LOW | {"rotary": True},
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch's CPU kernels work in one thread: each has blocks of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in CASES), *((case, torch.bfloat16) for case in CASES[: len(BOTH)])],
    ids=str,
)
def test_the_peak_of_forward_and_backward_is_predicted(case: dict[str, Any], dtype: torch.dtype) -> None:
    count_every_allocation()
    spec = parse_model_spec(case)
    packs = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    predicted = replay(spec, 16, Widths.of(dtype.itemsize, "cpu", packs=packs), 9).memory.peaks
    for phase, measured in measure_passes(spec, 16, dtype, 9).items():
        ours = predicted[phase].total_bytes - predicted[phase].live_bytes[MICRO_BATCHES]
        assert 0.998 * measured <= ours <= 1.02 * measured
