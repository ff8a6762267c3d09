"""Predicted memory of a rank: for each phase and tier, the peak and its breakdown into items.

`estimate_memory` simulates the rank's lifecycle (simulator/lifecycle.py), which gives the bytes; items.py gives each
item's formula in words and its source. `saved_bytes` counts the activations of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from ..common.phases import Phase, Tier
from ..common.schema import Schema, stored_as
from ..common.types import Line
from ..common.units import format_bytes
from ..config.model import ModelSpec
from ..config.run_config import RunConfig
from ..config.training import TrainingSpec
from ..costs.parameters import TABLES, owned_parameter_groups
from ..hardware.device_overhead import DeviceOverhead
from ..simulator.core import MemoryTracker, Peak
from ..simulator.engine import base as names
from ..simulator.engine.base import EngineConfig
from ..simulator.lifecycle import Simulation, simulate, simulate_evaluation
from ..simulator.network.group_share import largest_places
from ..simulator.network.model import MICRO_BATCHES, Replay, forward_saved_bytes, replay
from ..simulator.network.ops import WEIGHT_GRADIENTS, DtypeSizes
from ..simulator.network.relation_shape import Implementation
from .items import describe_item

BOOKKEEPING = "bookkeeping"
BOOKKEEPING_BYTES = 2**16
"""Upper bound of scalars, step counters and the sample order, measured on CPU ranks of small runs."""


OUTSIDE_TORCH = ("driver reserve", "context", "nccl")
"""Items of a GPU's memory that torch's allocator does not hold."""
FRAGMENTED = "fragmentation"
NOT_ALLOCATED = (*OUTSIDE_TORCH, FRAGMENTED, names.STREAMS)
"""Items of a GPU's memory that torch does not count as allocated."""


class BreakdownItem(Schema):
    """One item of a memory breakdown."""

    name: Line
    bytes: int
    formula: Line
    """How the bytes are counted, in words."""
    source: Line


class PhasePeak(Schema):
    """The peak of one phase on one tier; the items of its breakdown add up to ``bytes``."""

    phase: Phase
    tier: Tier
    bytes: int
    site: Line = stored_as("moment")
    """Where in the schedule the peak occurs."""
    breakdown: tuple[BreakdownItem, ...] = stored_as("entries")
    """Largest first."""

    def of(self, name: str) -> int:
        """Bytes of the item called ``name``, 0 if there is none."""
        return sum(item.bytes for item in self.breakdown if item.name == name)

    @property
    def reserved_bytes(self) -> int:
        """Bytes that torch has reserved on a GPU; without what the driver and NCCL hold."""
        return self.bytes - sum(self.of(name) for name in OUTSIDE_TORCH)

    @property
    def allocated_bytes(self) -> int:
        """Bytes that torch counts as allocated: without what the driver and NCCL hold, and without fragmentation.

        Torch does not count blocks that are freed while another stream still uses them.
        """
        return self.bytes - sum(self.of(name) for name in NOT_ALLOCATED)


class MemoryEstimate(Schema):
    """Predicted memory of one rank.

    A GPU rank has four tiers: device, pageable host, pinned host and NVMe. A CPU rank computes in host memory, so
    its device and host are one tier, "host"; only the I/O library's buffers are pinned.
    """

    peaks: tuple[PhasePeak, ...]
    """One peak for each phase and each tier that holds anything."""
    saved_bytes: int = stored_as("kept_bytes")
    """Bytes on the device that one micro-batch's forward pass saves for backward, without parameters."""
    own_tier: Tier
    """The tier on which the rank computes: "device", or "host" for a CPU rank."""
    device_interval_bytes: tuple[int, int] | None = None
    """Device peak with every item of the device overhead at its low end, and at its high end: whether the plan fits."""
    shown_interval_bytes: tuple[int, int] | None = None
    """What the driver reports as in use (nvidia-smi) at that peak if there is room for what torch caches: low, high."""

    def peak(self, phase: str, tier: Tier | None = None) -> PhasePeak | None:
        """The peak of a phase on a tier (by default the rank's own tier); None if the tier is empty then."""
        wanted = tier or self.own_tier
        return next((peak for peak in self.peaks if (peak.phase, peak.tier) == (phase, wanted)), None)

    def bytes_of(self, phase: str, tier: Tier | None = None) -> int:
        """Peak bytes of a phase on a tier, 0 if the tier is empty then."""
        peak = self.peak(phase, tier)
        return 0 if peak is None else peak.bytes

    def allocated_bytes_of(self, phase: str) -> int:
        """Peak bytes of a phase on the rank's own tier that torch counts as allocated, as a run measures them."""
        peak = self.peak(phase)
        return 0 if peak is None else peak.allocated_bytes

    def of(self, name: str, phase: str = Phase.BETWEEN, tier: Tier | None = None) -> int:
        """Bytes of the item called ``name`` at the peak of a phase, by default on the rank's own tier."""
        peak = self.peak(phase, tier)
        return 0 if peak is None else peak.of(name)

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Tiers that hold anything."""
        return tuple(dict.fromkeys(peak.tier for peak in self.peaks))

    @property
    def resident_bytes(self) -> int:
        """Bytes held between two steps on the rank's own tier."""
        return self.bytes_of(Phase.BETWEEN)

    @property
    def peak_bytes(self) -> int:
        """Highest peak of all phases on the rank's own tier."""
        return self.highest(self.own_tier)

    def worst(self, tier: Tier) -> PhasePeak | None:
        """The highest peak of all phases on a tier; None if the tier never holds anything."""
        return max((peak for peak in self.peaks if peak.tier == tier), key=lambda peak: peak.bytes, default=None)

    def highest(self, tier: Tier) -> int:
        """Bytes of the highest peak of all phases on a tier, 0 if the tier never holds anything."""
        peak = self.worst(tier)
        return 0 if peak is None else peak.bytes

    @property
    def host_bytes(self) -> int:
        """Highest sum over phases of the pageable and the pinned host peak of that phase."""
        return max(self.bytes_of(phase, Tier.HOST) + self.bytes_of(phase, Tier.PINNED) for phase in Phase)


def _tensor_items(peak: Peak, config: EngineConfig) -> Iterator[BreakdownItem]:
    for name, size in sorted(peak.live_bytes.items(), key=lambda item: -item[1]):
        if size:
            formula, source = describe_item(name, config)
            yield BreakdownItem(name=name, bytes=size, formula=formula, source=source)


def _overhead_items(overhead: DeviceOverhead, tier: Tier, tensor_bytes: int) -> Iterator[BreakdownItem]:
    """What a GPU rank holds in addition to torch's tensors, at the likely value of each interval."""
    for entry in overhead.breakdown:
        if entry.tier == tier and entry.likely_bytes:
            interval = f"{format_bytes(entry.low_bytes)} to {format_bytes(entry.high_bytes)}"
            formula = f"{entry.formula}; {interval}"
            yield BreakdownItem(
                name=entry.name.replace("_", " "), bytes=entry.likely_bytes, formula=formula, source=entry.source
            )
    if tier == Tier.DEVICE:
        allocated = tensor_bytes + overhead.total("likely", in_torch=True)
        waste = overhead.reserved_bytes(allocated) - allocated
        shares = overhead.fragmentation
        formula = f"{shares.likely:.0%} of what torch reserves; {shares.low:.0%} to {shares.high:.0%}"
        yield BreakdownItem(name=FRAGMENTED, bytes=waste, formula=formula, source=shares.source)


def summarize_simulation(
    simulation: Simulation, config: EngineConfig, overhead: DeviceOverhead | None
) -> MemoryEstimate:
    """Turn a simulated lifecycle into a memory estimate.

    Args:
        simulation: the simulated lifecycle.
        config: the engine's configuration, which the formulas mention.
        overhead: what a GPU holds in addition to tensors; None for CPU ranks.
    """
    own = Tier.HOST if simulation.memory.on_cpu else Tier.DEVICE
    text = "scalars, order of samples; an upper bound"
    extra = BreakdownItem(name=BOOKKEEPING, bytes=BOOKKEEPING_BYTES, formula=text, source="measured")
    peaks = []
    for phase in Phase:
        for tier in simulation.memory.tiers:
            if (phase, tier) not in simulation.peaks:
                continue
            peak = simulation.peaks[phase, tier]
            entries = [*_tensor_items(peak, config), *([extra] if tier == own else [])]
            if overhead is not None:
                entries += _overhead_items(overhead, tier, peak.total_bytes)
            size = sum(entry.bytes for entry in entries)
            if size:
                peaks.append(PhasePeak(phase=phase, tier=tier, bytes=size, site=peak.site, breakdown=tuple(entries)))
    worst = max(peak.total_bytes for (_, tier), peak in simulation.peaks.items() if tier == own)
    interval = shown = None
    if overhead is not None:
        interval = overhead.device_bytes(worst, "low"), overhead.device_bytes(worst, "high")
        capacity = config.run.cluster.device_memory_bytes
        shown = overhead.shown_bytes(worst, "low", capacity), overhead.shown_bytes(worst, "high", capacity)
    return MemoryEstimate(
        peaks=tuple(peaks),
        saved_bytes=simulation.saved_bytes,
        own_tier=own,
        device_interval_bytes=interval,
        shown_interval_bytes=shown,
    )


def _overhead(run: RunConfig) -> DeviceOverhead | None:
    return run.cluster.device_overhead(relation_ranks=run.parallel.relation)


def _places(run: RunConfig, rank: int | None) -> tuple[int | None, ...]:
    """Return the places in a relation group to simulate: None if the rank's number decides."""
    ranks = run.parallel.relation
    return (None,) if rank is not None or ranks == 1 else largest_places(run.model.geometry, ranks)


def _highest_peaks(estimates: Sequence[MemoryEstimate]) -> tuple[PhasePeak, ...]:
    """Return the highest peak of each phase on each tier."""
    found: dict[tuple[Phase, Tier], PhasePeak] = {}
    for peak in (peak for estimate in estimates for peak in estimate.peaks):
        key = peak.phase, peak.tier
        if key not in found or found[key].bytes < peak.bytes:
            found[key] = peak
    return tuple(found.values())


@lru_cache(maxsize=32)
def estimate_memory(run: RunConfig, rank: int | None = None) -> MemoryEstimate:
    """Predict the memory of one rank.

    Ranks differ only at ZeRO stages 1 and 2 and, with relation parallelism, by their relations and pairs.

    Args:
        run: what is trained, where and how.
        rank: number of the rank; None is the rank that holds the most. If the rank with the most relations is not that
            with the most pairs, the higher peak of the two is taken for each phase.
    """
    config, overhead = EngineConfig(run, rank), _overhead(run)
    estimates = [
        summarize_simulation(simulate(run, rank=rank, place=place), config, overhead) for place in _places(run, rank)
    ]
    if len(estimates) == 1:
        return estimates[0]
    highest = max(estimates, key=lambda estimate: estimate.peak_bytes)
    saved = max(estimate.saved_bytes for estimate in estimates)
    return highest.model_copy(update={"peaks": _highest_peaks(estimates), "saved_bytes": saved})


@lru_cache(maxsize=32)
def evaluation_peaks(run: RunConfig, batch: int, rank: int | None = None) -> tuple[PhasePeak, ...]:
    """Predict the peak of an evaluation on each tier.

    Args:
        run: what is trained, where and how.
        batch: samples of the rank in one pass.
        rank: as in `estimate_memory`.
    """
    config, overhead = EngineConfig(run, rank), _overhead(run)
    simulations = [simulate_evaluation(run, batch, rank, place=place) for place in _places(run, rank)]
    return _highest_peaks([summarize_simulation(simulation, config, overhead) for simulation in simulations])


def gathered_floor_bytes(
    spec: ModelSpec, training: TrainingSpec, tile_relations: int | None, relation_ranks: int = 1
) -> int:
    """Lower bound of the device bytes of a ZeRO-3 rank, independent of the number of replicas.

    The largest module is gathered in full, with its full gradients. A tile of logits holds the matrices of queries
    and of keys.

    Args:
        spec: the model.
        training: gives the dtype.
        tile_relations: relations per tile; None keeps tables whole.
        relation_ranks: ranks that share out the relations, G.
    """
    both = 2 if {"q", "k"} <= set(spec.roles) and spec.operator != "absolute" else 1
    groups = owned_parameter_groups(spec, tile_relations, relation_ranks)
    largest = max(group.numel * (both if group.component == TABLES else 1) for group in groups)
    return 2 * largest * training.dtype_bytes


_SHALLOW = 3
"""Depth of the deeper of the two networks from which other depths are extrapolated."""


def _replay(spec: ModelSpec, batch: int, sizes: DtypeSizes, implementation: Implementation) -> Replay:
    tables = {"translution", "alpha"} & set(spec.layer_operators)
    return _replay_tables(spec, batch, sizes, implementation if tables else "grouped")


@lru_cache(maxsize=64)
def _replay_tables(spec: ModelSpec, batch: int, sizes: DtypeSizes, implementation: Implementation) -> Replay:
    # Full tables: tiles would change only the gradients, which are excluded.
    memory = MemoryTracker(ignored=frozenset({WEIGHT_GRADIENTS, MICRO_BATCHES}))
    return replay(spec, batch, sizes, memory=memory, implementation=implementation)


@lru_cache(maxsize=64)
def _forward(spec: ModelSpec, batch: int, sizes: DtypeSizes, implementation: Implementation) -> int:
    tables = {"translution", "alpha"} & set(spec.layer_operators)
    return forward_saved_bytes(spec, batch, sizes, implementation if tables else "grouped")


def saved_bytes(spec: ModelSpec, batch: int, sizes: DtypeSizes, implementation: Implementation = "grouped") -> int:
    """Bytes that one forward pass keeps for backward on the device, parameters left out.

    Args:
        spec: the model.
        batch: samples of one micro-batch.
        sizes: bytes per value.
        implementation: "grouped", or "gather" for the published code.
    """
    if spec.depth <= _SHALLOW or spec.relative_layers != "all":
        return _replay(spec, batch, sizes, implementation).saved_bytes
    # Equal layers save equal bytes, so that two depths determine all others.
    low, high = (
        _forward(spec.model_copy(update={"depth": depth}), batch, sizes, implementation)
        for depth in (_SHALLOW - 1, _SHALLOW)
    )
    return high + (high - low) * (spec.depth - _SHALLOW)


def peak_bytes(spec: ModelSpec, batch: int, sizes: DtypeSizes, implementation: Implementation = "grouped") -> int:
    """Peak bytes of activations, their gradients and scratch in one forward and backward pass.

    Args:
        spec, batch, sizes, implementation: as in `saved_bytes`.
    """
    peaks = _replay(spec, batch, sizes, implementation).memory.peaks
    return max(peaks[phase].total_bytes for phase in ("forward", "backward"))
