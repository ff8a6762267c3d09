"""A model's parameters under ZeRO-3: each one partitioned over the ranks, and joined into sub-groups.

Source: DeepSpeed 0.19.8, runtime/zero/partition_parameters.py and stage3.py (`_create_fp16_sub_groups`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...config.run_config import ZeroSpec
from ...costs.parameters import ParameterGroup
from ...deepspeed.config import NVME_BLOCK_BYTES
from ..core.autograd import ModuleParams
from ..core.storage import Storage

ALIGNMENT_BYTES = 1024
"""Alignment of lengths in DeepSpeed's I/O library with one thread per request (swap_tensor/utils.py)."""


@dataclass(slots=True, eq=False)
class Shard:
    """One parameter: its size, a rank's partition of it, and its full storage while it is gathered."""

    numel: int
    partition_numel: int
    """Elements of a rank's partition, padding included."""
    persistent: bool
    """Whether it stays gathered between modules: at most the persistence threshold; the optimizer step frees it."""
    on_nvme: bool
    full: Storage | None = None
    """The gathered parameter; None if only the partition is in memory."""
    in_flight: list[Shard] | None = None
    """The parameters of the gather that is in flight for it; None if there is none."""


@dataclass(frozen=True, slots=True)
class SubGroup:
    """Parameters that the optimizer updates together."""

    shards: tuple[Shard, ...]
    numel: int
    """Elements of the rank's partitions."""
    swapped: bool
    """Whether master parameters and optimizer states are on NVMe."""
    on_host: bool
    """Whether they are on the host between steps."""


def ceil_div(count: int, parts: int) -> int:
    """Return ``count / parts`` rounded up: the size of each of ``parts`` equal parts, the last one padded."""
    return -(-count // parts)


def partitioned_numel(groups: Sequence[ParameterGroup], world_size: int) -> int:
    """Return the elements per rank if every tensor is padded to a multiple of ``world_size`` and partitioned."""
    return sum(ceil_div(group.numel, world_size) * group.copies for group in groups)


def align(numel: int, width: int) -> int:
    """Return the aligned elements of the I/O library's buffer or file for ``numel`` elements of ``width`` bytes."""
    elements = ALIGNMENT_BYTES // width
    return ceil_div(numel, elements) * elements


def make_shards(modules: Sequence[ModuleParams], zero: ZeroSpec, world_size: int, width: int) -> dict[int, list[Shard]]:
    """Return the shards of each module's parameters, by the ``id`` of the module."""
    on_nvme = zero.offload_param.device == "nvme"
    result: dict[int, list[Shard]] = {}
    for weights in modules:
        result[id(weights)] = [
            Shard(
                numel,
                partition_numel := ceil_div(numel, world_size),
                persistent=numel <= zero.persistence_threshold_elements,
                on_nvme=on_nvme and partition_numel * width >= NVME_BLOCK_BYTES,
            )
            for numel in weights.numels
        ]
    return result


def make_sub_groups(shards: Sequence[Shard], zero: ZeroSpec, master_width: int) -> list[SubGroup]:
    """Join shards in order into sub-groups; a new one begins when a group has reached the sub-group size."""
    groups: list[list[Shard]] = [[]]
    size = 0
    for shard in shards:
        if size >= zero.sub_group_elements:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += shard.partition_numel
    offload = zero.offload_optimizer
    on_device = int((1 - offload.ratio) * len(groups)) if offload.device == "cpu" else 0
    result = []
    for number, group in enumerate(groups):
        numel = sum(shard.partition_numel for shard in group)
        swapped = offload.device == "nvme" and numel * master_width >= NVME_BLOCK_BYTES
        on_host = offload.device != "none" and not swapped and number >= on_device
        result.append(SubGroup(tuple(group), numel, swapped, on_host))
    return result
