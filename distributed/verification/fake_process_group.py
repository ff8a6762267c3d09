"""A process group whose other ranks do not exist, and what DeepSpeed must not do in it.

In torch's fake process group no data moves between ranks: a gather fills the other ranks' places with copies of this
rank's partition. DeepSpeed allocates as in a real group; the values are meaningless.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Give an attribute another value within the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def join_fake_process_group(rank: int, world_size: int) -> None:
    """Initialize torch's and DeepSpeed's communication for one rank of a world that has no other process."""
    import deepspeed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    # DeepSpeed's op for shared memory between ranks is of no use here and takes a minute to compile.
    with replaced(importlib.import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None):
        deepspeed.init_distributed(dist_backend="gloo")


@contextlib.contextmanager
def without_rank_comparison() -> Iterator[None]:
    """Within the block, keep DeepSpeed from comparing this rank's parameter counts with those of rank 0."""
    utils = importlib.import_module("deepspeed.runtime.zero.utils")
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(utils, "get_lst_from_rank0", lambda own: own))
        stack.enter_context(replaced(utils, "assert_lst_len_same_as_other_ranks", lambda _: None))
        yield


@contextlib.contextmanager
def zero_exchanges() -> Iterator[None]:
    """Within the block, let this rank receive zeros from the others in an all-to-all, which torch's fake leaves out."""

    def exchange(received: Tensor, sent: Tensor, *_: Any, **__: Any) -> None:
        received.zero_()

    with replaced(torch.distributed, "all_to_all_single", exchange):
        yield
