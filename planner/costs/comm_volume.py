"""Bytes that a rank sends, receives and moves between tiers in one step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..config.model import ModelSpec
from ..deepspeed.config import NVME_BLOCK_BYTES
from .parameters import TABLES, parameter_groups


@dataclass(frozen=True, slots=True)
class Volumes:
    """How many tensors and elements of a model ZeRO moves."""

    elements: int
    share: int
    """Elements of a rank, every tensor padded to a multiple of the ranks."""
    tensors: int
    gathered: int
    """Elements that are gathered anew for every use."""
    gathers: int
    """Calls that gather them once."""
    persistent: int
    largest: int
    tiles: int
    """Calls of tiles in a forward pass."""
    small: tuple[int, int]
    """Elements of a rank in shares too small for a file on NVMe, in 2 bytes each and in 4."""


@lru_cache(maxsize=512)
def volumes(spec: ModelSpec, tile_relations: int | None, world_size: int, persistence: int) -> Volumes:
    """Sizes of a model's tensors.

    Args:
        spec: the model.
        tile_relations: relations per tile; None keeps tables whole.
        ranks: shares of a tensor.
        persistence: elements up to which a tensor stays whole.
    """
    both = len({"q", "k"} & set(spec.roles)) == 2
    elements = share = tensors = gathered = gathers = persistent = largest = tiles = half = full = 0
    for group in parameter_groups(spec, tile_relations):
        elements, tensors = elements + group.total, tensors + group.copies
        part = -(-group.numel // world_size)
        share += part * group.copies
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
    return Volumes(elements, share, tensors, gathered, gathers, persistent, largest, tiles, (half, full))
