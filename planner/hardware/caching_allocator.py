"""How torch's caching allocator rounds: blocks for tensors, segments from the driver.

Source: torch 2.13, ``c10/core/AllocatorConfig.h`` and ``c10/cuda/CUDACachingAllocator.cpp``.
"""

from __future__ import annotations

from ..common.units import MIB

MIN_BLOCK_BYTES = 512
"""kMinBlockSize: every storage is a multiple of it."""
SMALL_BYTES = MIB
"""kSmallSize: up to here blocks share small segments."""
SMALL_SEGMENT_BYTES = 2 * MIB
"""kSmallBuffer."""
LARGE_SEGMENT_BYTES = 20 * MIB
"""large_segment_size: taken whole for blocks under `MIN_LARGE_BYTES`, and the page of expandable segments."""
MIN_LARGE_BYTES = 10 * MIB
"""kMinLargeAlloc: from here a block has a segment of its own size."""
ROUND_LARGE_BYTES = 2 * MIB
"""kRoundLarge: to a multiple of this."""


def block_bytes(size: int) -> int:
    """Bytes that torch counts as allocated for a storage of so many."""
    return -(-size // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES


def segment_bytes(size: int, *, expandable: bool = False) -> int:
    """Bytes that torch asks of the driver when no cached block can hold a storage.

    Args:
        size: bytes of the storage.
        expandable: with ``expandable_segments``, which grow by pages.
    """
    size = block_bytes(size)
    if expandable:
        page = SMALL_SEGMENT_BYTES if size <= SMALL_BYTES else LARGE_SEGMENT_BYTES
        return -(-size // page) * page
    if size == 0:
        return 0
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
