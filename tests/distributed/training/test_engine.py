"""What the engine sets in torch."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed

from translution.distributed.training.engine import COLLECTIVE_LIMIT, wait_without_limit


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(minutes=1))
    yield
    distributed.destroy_process_group()


def timeout_of(group: distributed.ProcessGroup) -> timedelta:
    found: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return found


def test_collectives_of_every_group_may_wait_for_a_slow_rank(process_group: None) -> None:
    own = distributed.new_group([0])
    groups = [distributed.group.WORLD, own]
    assert all(timeout_of(group) < timedelta(hours=1) for group in groups)
    wait_without_limit()
    assert [timeout_of(group) for group in groups] == [COLLECTIVE_LIMIT] * 2
    distributed.barrier(own)
