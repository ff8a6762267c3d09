"""What an upper bound of a rank's memory consists of (upper_bound.py, fsdp2_bound.py), and how its parts are joined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class MemoryUpperBound(NamedTuple):
    """Upper bound of one rank's memory in bytes, per tier; the device of a CPU rank is the host."""

    device: int
    host: int
    pinned: int
    nvme: int
    states: int
    """Device bytes that stay allocated between steps."""
    activations: int
    """Device bytes of activations while a micro-batch runs."""


@dataclass(slots=True)
class WeightsBound:
    """The part of an upper bound that depends neither on the micro-batch nor on checkpointing."""

    on_cpu: bool
    device: int = 0
    """Device bytes that stay allocated between steps."""
    host: int = 0
    pinned: int = 0
    nvme: int = 0
    transient: int = 0
    """Largest transient host allocation in bytes."""
    running: int = 0
    """Device bytes in addition to activations while a micro-batch runs."""
    recomputing: int = 0
    """Further device bytes if blocks are recomputed."""
    elsewhere: int = 0
    """Most device bytes of a phase without activations, in addition to those that stay."""
    least: int = 0
    """Device bytes of a phase in which nothing else is allocated."""

    def add_transient(self, size: int) -> None:
        """Record a transient host allocation; transients never overlap, so only the largest counts."""
        self.transient = max(self.transient, size)


class BatchBound(NamedTuple):
    """The part of an upper bound that depends on the micro-batch and on checkpointing, not on ZeRO's knobs."""

    activations: int
    """Device bytes of a micro-batch's activations."""
    host: int
    """Bytes of activations and samples on the host."""
    buffers: int
    """Device bytes of the network's buffers, which are there in every phase."""
    recomputes: bool
    """Whether blocks are recomputed."""


def add_bounds(weights: WeightsBound, batch: BatchBound) -> MemoryUpperBound:
    """Join both parts; on a CPU rank all but pinned buffers and files is one tier."""
    device, host = weights.device + batch.buffers, weights.host + batch.host
    states = device + (host if weights.on_cpu else 0)
    running = batch.activations + weights.running + (weights.recomputing if batch.recomputes else 0)
    device += max(running, weights.elsewhere)
    host += weights.transient
    if weights.on_cpu:
        device, host = max(device + host, weights.least), 0
    return MemoryUpperBound(device, host, weights.pinned, weights.nvme, states, batch.activations)
