"""The memories of one rank: its device, its share of the host's pageable and pinned memory, its files on NVMe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ...common.phases import Tier
from .storage import MemoryTracker, Storage


def next_power_of_two(size: int) -> int:
    """The least power of two that is no smaller; torch's pinned allocator gives so much (CachingHostAllocator.h)."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


class RankMemory:
    """Live bytes and peaks on every tier.

    A CPU rank's device is the host: what DeepSpeed puts on either is one tier, "host", which is what
    torch's CPU allocator counts. Pinning does nothing there but for the locked buffers of the I/O
    library, which no allocator of torch counts.

    Args:
        device: "cpu" or "cuda".
        record: keep every event, for a timeline.
        alone: a CPU rank without others, whose process group copies nothing.
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
        """The tiers that this rank has."""
        shared = {Tier.HOST: self.host, Tier.PINNED: self.pinned, Tier.NVME: self.nvme}
        return shared if self.on_cpu else {Tier.DEVICE: self.device, **shared}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Let what happens in the block count for a phase, on every tier."""
        with ExitStack() as stack:
            for memory in self.tiers.values():
                memory.site = name
                stack.enter_context(memory.phase(name))
            yield

    def at(self, site: str) -> None:
        """Say where in the schedule what follows happens."""
        for memory in self.tiers.values():
            memory.site = site

    def pin(self, what: str, size: int) -> Storage:
        """A host tensor that ``pin_memory`` has locked: on a GPU as much as torch's allocator gives."""
        return Storage(self.host, what, size) if self.on_cpu else Storage(self.pinned, what, next_power_of_two(size))

    def lock(self, what: str, size: int) -> Storage:
        """A buffer of the I/O library, locked without rounding (csrc/aio)."""
        return Storage(self.pinned, what, size)

    def add_transient(self, *pieces: tuple[MemoryTracker, str, int]) -> None:
        """Allocate the pieces one beside the other and free them again."""
        held = [Storage(memory, what, size) for memory, what, size in pieces if size]
        held.clear()
