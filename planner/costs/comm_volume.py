"""Number of tensors and elements of a model that ZeRO gathers, reduces and moves between tiers in one step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..config.model import ModelSpec
from ..deepspeed.config import NVME_BLOCK_BYTES
from .parameters import TABLES, parameter_groups


@dataclass(frozen=True, slots=True)
class Volumes:
    """Tensors and elements of a model, by how ZeRO moves them."""

    elements: int
    """Elements of all tensors."""
    partition_numel: int
    """Elements of a rank's partitions, every tensor padded to a multiple of the world size."""
    tensors: int
    """Number of tensors."""
    gathered: int
    """Elements that are gathered again for every use."""
    gathers: int
    """Number of gathers that gather them once."""
    persistent: int
    """Elements that stay gathered."""
    largest: int
    """Elements of the largest tensor."""
    tiles: int
    """Tile modules called in one forward pass."""
    small: tuple[int, int]
    """Elements of a rank's partitions that are too small for a file on NVMe, at 2 and at 4 bytes per element."""


@lru_cache(maxsize=512)
def volumes(spec: ModelSpec, tile_relations: int | None, world_size: int, persistence: int) -> Volumes:
    """Count a model's tensors and elements.

    Args:
        spec: the model.
        tile_relations: relations per tile; None for one tile per table.
        world_size: number of partitions of a tensor.
        persistence: maximum elements of a tensor that stays gathered.
    """
    both = len({"q", "k"} & set(spec.roles)) == 2
    elements = partition_numel = tensors = gathered = gathers = persistent = largest = tiles = half = full = 0
    for group in parameter_groups(spec, tile_relations):
        elements, tensors = elements + group.total, tensors + group.copies
        part = -(-group.numel // world_size)
        partition_numel += part * group.copies
        half += part * group.copies * (part * 2 < NVME_BLOCK_BYTES)
        full += part * group.copies * (part * 4 < NVME_BLOCK_BYTES)
        largest = max(largest, group.numel)
        calls = group.copies
        if group.component == TABLES:
            # A tile of logits gathers the matrices of queries and keys in one call.
            calls = calls * (len(spec.roles) - both) // len(spec.roles)
            tiles += calls
        if group.numel <= persistence:
            persistent += group.total
        else:
            gathered, gathers = gathered + group.total, gathers + calls
    return Volumes(elements, partition_numel, tensors, gathered, gathers, persistent, largest, tiles, (half, full))
