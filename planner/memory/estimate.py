"""The memory ledger of a rank: for each phase and tier what is live at the worst moment, entry by entry.

The figures come from a replay of the rank's life (simulation.py), the words from entry_texts.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from ..common.schema import Schema, stored_as
from ..common.units import format_bytes
from ..config.model import ModelSpec
from ..config.training import TrainingSpec
from ..config.zero import ZeroSpec
from ..costs.parameters import TABLES, parameter_groups
from ..hardware.cluster import ClusterSpec
from ..hardware.device_overhead import DeviceOverhead
from ..simulator.core.storage import Peak
from ..simulator.core.tiers import Tier
from ..simulator.engine.base import EngineConfig
from ..simulator.lifecycle import (
    BACKWARD,
    BETWEEN,
    FIRST_STEP,
    FORWARD,
    INIT,
    PHASES,
    RESUME,
    SAVE,
    STEP,
    Simulation,
    simulate,
)
from .breakdown_text import describe_item

BOOKKEEPING = "bookkeeping"
BOOKKEEPING_BYTES = 2**16
"""Scalars, counts of steps, the order of the samples: measured below this on CPU ranks of small runs."""
TRAINING_PHASES = (FORWARD, BACKWARD, STEP)
__all__ = [
    "BACKWARD",
    "BETWEEN",
    "FIRST_STEP",
    "FORWARD",
    "INIT",
    "PHASES",
    "RESUME",
    "SAVE",
    "STEP",
    "BreakdownItem",
    "MemoryEstimate",
    "PhasePeak",
    "estimate_memory",
    "gathered_floor_bytes",
]  # fmt: skip


class BreakdownItem(Schema):
    """One thing that takes memory at a moment."""

    name: str
    bytes: int
    formula: str
    """In words."""
    source: str


class PhasePeak(Schema):
    """A phase's worst moment on one tier; its entries add up to ``bytes``."""

    phase: str
    tier: Tier
    bytes: int
    site: str = stored_as("moment")
    """Where in the schedule it is."""
    breakdown: tuple[BreakdownItem, ...] = stored_as("entries")
    """Largest first."""

    def of(self, name: str) -> int:
        """Bytes of an entry, 0 if there is none."""
        return sum(entry.bytes for entry in self.breakdown if entry.name == name)


class MemoryEstimate(Schema):
    """Memory of one rank.

    A GPU rank has a device, pageable and pinned host memory and NVMe; a CPU rank computes in the host's
    memory, which is then one tier, "host", beside the buffers that the I/O library pins.
    """

    peaks: tuple[PhasePeak, ...]
    """One for each phase and each tier that holds anything."""
    saved_bytes: int = stored_as("kept_bytes")
    """What one micro-batch's forward pass keeps for backward on the device itself, parameters left out."""
    own_tier: Tier
    """Where the rank computes: "device", or "host" for a CPU rank."""
    device_interval_bytes: tuple[int, int] | None = None
    """The device at its worst moment, with every constant of the GPU at the low and at the high end."""

    def peak(self, phase: str, tier: Tier | None = None) -> PhasePeak | None:
        """The worst moment of a phase on a tier, or on the rank's own; None where nothing is held."""
        wanted = tier or self.own_tier
        return next((peak for peak in self.peaks if (peak.phase, peak.tier) == (phase, wanted)), None)

    def bytes_of(self, phase: str, tier: Tier | None = None) -> int:
        """Bytes at that moment."""
        peak = self.peak(phase, tier)
        return 0 if peak is None else peak.bytes

    def of(self, name: str, phase: str = BETWEEN, tier: Tier | None = None) -> int:
        """Bytes of an entry at a phase's worst moment, on the rank's own tier unless another is named."""
        peak = self.peak(phase, tier)
        return 0 if peak is None else peak.of(name)

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The tiers that hold anything."""
        return tuple(dict.fromkeys(peak.tier for peak in self.peaks))

    @property
    def resident_bytes(self) -> int:
        """Between two steps, on the rank's own tier."""
        return self.bytes_of(BETWEEN)

    @property
    def peak_bytes(self) -> int:
        """At the worst moment of the rank's life, on its own tier."""
        return self.highest(self.own_tier)

    def highest(self, tier: Tier) -> int:
        """At the worst moment of the rank's life on a tier."""
        return max((peak.bytes for peak in self.peaks if peak.tier == tier), default=0)

    @property
    def host_bytes(self) -> int:
        """Pageable and pinned host memory at the worst moments of the same phase."""
        return max(self.bytes_of(phase, "host") + self.bytes_of(phase, "pinned") for phase in PHASES)


def _entries(peak: Peak, config: EngineConfig) -> Iterator[BreakdownItem]:
    for name, size in sorted(peak.live_bytes.items(), key=lambda item: -item[1]):
        if size:
            formula, source = describe_item(name, config)
            yield BreakdownItem(name=name, bytes=size, formula=formula, source=source)


def _overhead_items(overhead: DeviceOverhead, tier: Tier, tensor_bytes: int) -> Iterator[BreakdownItem]:
    """What a GPU rank holds beside torch's tensors, at the likeliest figures of their intervals."""
    for entry in overhead.breakdown:
        if entry.tier == tier and entry.likely_bytes:
            interval = f"{format_bytes(entry.low_bytes)} to {format_bytes(entry.high_bytes)}"
            formula = f"{entry.formula}; {interval}"
            yield BreakdownItem(
                name=entry.name.replace("_", " "), bytes=entry.likely_bytes, formula=formula, source=entry.source
            )
    if tier == "device":
        allocated = tensor_bytes + overhead.total("likely", in_torch=True)
        waste = overhead.reserved_bytes(allocated) - allocated
        shares = overhead.fragmentation
        formula = f"{shares.likely:.0%} of what torch reserves; {shares.low:.0%} to {shares.high:.0%}"
        yield BreakdownItem(name="fragmentation", bytes=waste, formula=formula, source=shares.source)


def ledger(simulation: Simulation, config: EngineConfig, overhead: DeviceOverhead | None) -> MemoryEstimate:
    """The ledger of a replayed life.

    Args:
        simulation: the life.
        setting: what the engine ran under.
        constants: what a GPU's device holds beside tensors; None for CPU ranks.
    """
    own: Tier = "host" if simulation.memory.on_cpu else "device"
    text = "scalars, order of samples; an upper bound"
    extra = BreakdownItem(name=BOOKKEEPING, bytes=BOOKKEEPING_BYTES, formula=text, source="measured")
    peaks = []
    for phase in PHASES:
        for tier in simulation.memory.tiers:
            peak = simulation.peaks[phase, tier]
            entries = [*_entries(peak, config), *([extra] if tier == own else [])]
            if overhead is not None:
                entries += _overhead_items(overhead, tier, peak.total_bytes)
            size = sum(entry.bytes for entry in entries)
            if size:
                peaks.append(PhasePeak(phase=phase, tier=tier, bytes=size, site=peak.site, breakdown=tuple(entries)))
    worst = max(simulation.peaks[phase, own].total_bytes for phase in PHASES)
    interval = None
    if overhead is not None:
        interval = overhead.device_bytes(worst, "low"), overhead.device_bytes(worst, "high")
    return MemoryEstimate(
        peaks=tuple(peaks), saved_bytes=simulation.saved_bytes, own_tier=own, device_interval_bytes=interval
    )


@lru_cache(maxsize=32)
def estimate_memory(
    spec: ModelSpec,
    cluster: ClusterSpec,
    training: TrainingSpec,
    zero: ZeroSpec,
    tile_relations: int | None = None,
    rank: int | None = None,
) -> MemoryEstimate:
    """Memory of one rank.

    Args:
        spec: the model.
        cluster: gives the number of ranks and the device.
        training: precision, batch and optimizer.
        zero: stage, knobs and offload.
        tile_relations: relations per tile; None keeps tables whole.
        rank: which rank; None is the one that holds the most. They differ at stages 1 and 2 alone.
    """
    config = EngineConfig(training, zero, cluster.world_size, rank)
    return ledger(simulate(spec, cluster, training, zero, tile_relations, rank=rank), config, cluster.device_overhead())


def gathered_floor_bytes(spec: ModelSpec, training: TrainingSpec, tile_relations: int | None) -> int:
    """Bytes below which ZeRO-3 cannot go on a device, however many ranks share the model.

    The largest module is gathered whole, and its gradients are whole beside it. A tile of logits holds
    the matrices of queries and of keys.
    """
    both = 2 if {"q", "k"} <= set(spec.roles) and spec.operator != "absolute" else 1
    groups = parameter_groups(spec, tile_relations)
    largest = max(group.numel * (both if group.component == TABLES else 1) for group in groups)
    return 2 * largest * training.dtype_bytes
