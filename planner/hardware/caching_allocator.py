"""How torch's caching allocator rounds the size of a storage.

Source: torch 2.13, ``c10/core/AllocatorConfig.h`` and ``c10/cuda/CUDACachingAllocator.cpp``.
"""

from __future__ import annotations

MIN_BLOCK_BYTES = 512
"""kMinBlockSize: the size of every block is a multiple of it."""


def block_bytes(size: int) -> int:
    """Return the bytes that torch counts as allocated for a storage of ``size`` bytes."""
    return -(-size // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
