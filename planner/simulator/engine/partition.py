"""A model's parameters as ZeRO-3 sees them: each cut into a rank's share, and gathered into sub-groups.

Source: DeepSpeed 0.19.8, runtime/zero/partition_parameters.py and stage3.py (`_create_fp16_sub_groups`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...config.zero import ZeroSpec
from ...costs.parameters import ParameterGroup
from ...deepspeed.config import NVME_BLOCK_BYTES
from ..core.autograd import ModuleParams
from ..core.storage import Storage

ALIGNMENT_BYTES = 1024
"""What the I/O library aligns lengths to, with one thread per request (swap_tensor/utils.py)."""


@dataclass(slots=True, eq=False)
class Shard:
    """One parameter: its size, a rank's share of it, and the whole of it while it is gathered."""

    numel: int
    share: int
    persistent: bool
    """Stays whole once it has been gathered, but for the optimizer step."""
    on_nvme: bool
    full: Storage | None = None
    in_flight: list[Shard] | None = None
    """What was gathered with it and has not been waited for."""


@dataclass(frozen=True, slots=True)
class SubGroup:
    """Parameters that the optimizer updates together."""

    shards: tuple[Shard, ...]
    numel: int
    """Elements of a rank's share."""
    swapped: bool
    """Whether master copy and moments lie on NVMe."""
    on_host: bool
    """Whether they lie on the host between steps."""


def ceil_div(count: int, parts: int) -> int:
    """Size of each of so many equal parts, the last one padded."""
    return -(-count // parts)


def partitioned(groups: Sequence[ParameterGroup], world_size: int) -> int:
    """Elements per rank when every tensor is padded to a multiple of the ranks and cut."""
    return sum(ceil_div(group.numel, world_size) * group.copies for group in groups)


def align(numel: int, width: int) -> int:
    """Elements of a buffer or file for so many, as the I/O library aligns them."""
    elements = ALIGNMENT_BYTES // width
    return ceil_div(numel, elements) * elements


def make_shards(modules: Sequence[ModuleParams], zero: ZeroSpec, world_size: int, width: int) -> dict[int, list[Shard]]:
    """The shards of each module's parameters, by the identity of the module."""
    on_nvme = zero.offload_param.device == "nvme"
    result: dict[int, list[Shard]] = {}
    for weights in modules:
        result[id(weights)] = [
            Shard(
                numel,
                share := ceil_div(numel, world_size),
                persistent=numel <= zero.persistence_threshold_elements,
                on_nvme=on_nvme and share * width >= NVME_BLOCK_BYTES,
            )
            for numel in weights.numels
        ]
    return result


def make_sub_groups(shards: Sequence[Shard], zero: ZeroSpec, master_width: int) -> list[SubGroup]:
    """Shards in order, a new group when one has reached the sub-group size."""
    groups: list[list[Shard]] = [[]]
    size = 0
    for shard in shards:
        if size >= zero.sub_group_elements:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += shard.share
    offload = zero.offload_optimizer
    staying = int((1 - offload.ratio) * len(groups)) if offload.device == "cpu" else 0
    result = []
    for number, group in enumerate(groups):
        numel = sum(shard.share for shard in group)
        swapped = offload.device == "nvme" and numel * master_width >= NVME_BLOCK_BYTES
        on_host = offload.device != "none" and not swapped and number >= staying
        result.append(SubGroup(tuple(group), numel, swapped, on_host))
    return result
