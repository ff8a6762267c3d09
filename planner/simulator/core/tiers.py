"""The memory tiers of one rank: its device, its pageable and pinned host memory, its files on NVMe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ...common.phases import Tier
from .storage import MemoryTracker, Storage


def next_power_of_two(size: int) -> int:
    """Return the smallest power of two not below ``size``: what torch's pinned allocator allocates.

    Source: torch 2.13, CachingHostAllocator.h.
    """
    return 1 << (size - 1).bit_length() if size > 0 else 0


class RankMemory:
    """Live bytes and peaks of one rank on every tier.

    The device of a CPU rank is the host: what DeepSpeed allocates on either is one tier, "host", which torch's CPU
    allocator counts. A CPU rank pins no tensors; only the locked buffers of the I/O library are on the tier
    "pinned", and torch's allocator does not count them.

    Args:
        device: "cpu" or "cuda".
        record: store every event, for a timeline.
        alone: True for a CPU rank without peers: its process group makes no copies.
    """

    def __init__(self, device: str, *, record: bool = False, alone: bool = False) -> None:
        self.on_cpu = device == "cpu"
        self.uses_gloo = self.on_cpu and not alone
        self.host = MemoryTracker(record=record)
        self.device = self.host if self.on_cpu else MemoryTracker(record=record)
        self.pinned = MemoryTracker(record=record)
        self.nvme = MemoryTracker(record=record)

    @property
    def tiers(self) -> dict[Tier, MemoryTracker]:
        """The memory of each tier that this rank has."""
        shared = {Tier.HOST: self.host, Tier.PINNED: self.pinned, Tier.NVME: self.nvme}
        return shared if self.on_cpu else {Tier.DEVICE: self.device, **shared}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the events of the block to a phase on every tier."""
        with ExitStack() as stack:
            for memory in self.tiers.values():
                memory.site = name
                stack.enter_context(memory.phase(name))
            yield

    def at(self, site: str) -> None:
        """Set the site in the schedule to which the following events belong."""
        for memory in self.tiers.values():
            memory.site = site

    def pin(self, what: str, size: int) -> Storage:
        """Allocate a host tensor with ``pin_memory``; a GPU rank's is rounded up by torch's pinned allocator."""
        return Storage(self.host, what, size) if self.on_cpu else Storage(self.pinned, what, next_power_of_two(size))

    def lock(self, what: str, size: int) -> Storage:
        """Allocate a locked buffer of the I/O library, which is not rounded (DeepSpeed, csrc/aio)."""
        return Storage(self.pinned, what, size)

    def add_transient(self, *pieces: tuple[MemoryTracker, str, int]) -> None:
        """Allocate the pieces (memory, category, bytes) together and free them again."""
        held = [Storage(memory, what, size) for memory, what, size in pieces if size]
        held.clear()
