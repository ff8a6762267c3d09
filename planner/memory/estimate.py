"""Predicted memory of a rank: for each phase and tier, the peak and its breakdown into items.

`estimate_memory` simulates the rank's lifecycle (simulator/lifecycle.py), which gives the bytes; `describe_item` gives
each item's formula in words and its source. `saved_bytes` counts the activations of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from ..common.phases import Phase, Tier
from ..common.schema import Schema, stored_as
from ..common.types import Line
from ..common.units import format_bytes
from ..config.model import ModelSpec
from ..config.run_config import RunConfig
from ..config.training import TrainingSpec
from ..costs.optimizer import state_name
from ..costs.parameters import TABLES, parameter_groups
from ..hardware.device_overhead import DeviceOverhead
from ..simulator.core import MemoryTracker, Peak
from ..simulator.engine import base as names
from ..simulator.engine.base import EngineConfig
from ..simulator.lifecycle import Simulation, simulate, simulate_evaluation
from ..simulator.network.model import MICRO_BATCHES, OFFLOADED, Replay, forward_saved_bytes, replay
from ..simulator.network.ops import (
    ACTIVATIONS,
    ATTENTION_WEIGHTS,
    CASTS,
    GRADIENTS,
    TEMPORARY,
    WEIGHT_GRADIENTS,
    DtypeSizes,
)
from ..simulator.network.relation_ops import WORKSPACE
from ..simulator.network.relation_shape import Implementation
from .fsdp2_items import FSDP2_ITEMS

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


@lru_cache(maxsize=32)
def estimate_memory(run: RunConfig, rank: int | None = None) -> MemoryEstimate:
    """Predict the memory of one rank.

    Args:
        run: what is trained, where and how.
        rank: number of the rank; None is the rank that holds the most. Ranks differ only at ZeRO stages 1 and 2.
    """
    config = EngineConfig(run, rank)
    return summarize_simulation(simulate(run, rank=rank), config, run.cluster.device_overhead())


@lru_cache(maxsize=32)
def evaluation_peaks(run: RunConfig, batch: int, rank: int | None = None) -> tuple[PhasePeak, ...]:
    """Predict the peak of an evaluation on each tier.

    Args:
        run: what is trained, where and how.
        batch: samples of the rank in one pass.
        rank: number of the rank; None is the rank that holds the most.
    """
    simulation = simulate_evaluation(run, batch, rank)
    return summarize_simulation(simulation, EngineConfig(run, rank), run.cluster.device_overhead()).peaks


def gathered_floor_bytes(spec: ModelSpec, training: TrainingSpec, tile_relations: int | None) -> int:
    """Lower bound of the device bytes of a ZeRO-3 rank, independent of the world size.

    The largest module is gathered in full, with its full gradients. A tile of logits holds the matrices of queries
    and of keys.

    Args:
        spec: the model.
        training: gives the dtype.
        tile_relations: relations per tile; None keeps tables whole.
    """
    both = 2 if {"q", "k"} <= set(spec.roles) and spec.operator != "absolute" else 1
    groups = parameter_groups(spec, tile_relations)
    largest = max(group.numel * (both if group.component == TABLES else 1) for group in groups)
    return 2 * largest * training.dtype_bytes


_ZERO3, _ZERO12 = "runtime/zero/stage3.py", "runtime/zero/stage_1_and_2.py"
_PARTITION, _SWAP = "runtime/zero/partition_parameters.py", "runtime/swap_tensor"
_FIXED: dict[str, tuple[str, str]] = {
    ACTIVATIONS: (
        "outputs that are in use or saved for backward, layer by layer",
        "planner/simulator/network/block.py",
    ),
    GRADIENTS: ("gradients of activations during backward", "planner/simulator/core.py"),
    ATTENTION_WEIGHTS: ("weights of every pair of tokens, B·h·N² a layer, and their logits", "models/ops/grouped.py"),
    WORKSPACE: ("rows of one relation's pairs and their products, bounded by workspace_bytes", "models/ops/context.py"),
    TEMPORARY: ("tensors that live during one operation only", "planner/simulator/network/ops.py"),
    CASTS: ("parameters as products take them, held by autocast or saved for backward", "torch.autocast"),
    MICRO_BATCHES: ("inputs and targets of the step's micro-batches", "distributed/data/batching.py"),
    OFFLOADED: ("inputs of checkpointed blocks, saved on the host", "fairscale nn/checkpoint"),
    "random states": ("states of torch's generator, saved by each checkpointed block", "torch/utils/checkpoint.py"),
    names.BUFFERS: ("cosines and sines of rotary layers; index lists of pairs on a GPU", "models/ops/rotary.py"),
    names.GATHERED: ("full parameters of the modules that run", f"{_PARTITION}:1329"),
    names.GATHER_COPIES: ("a rank's partitions, copied before the gather, or quantized", f"{_PARTITION}:1329"),
    names.SECONDARY: (
        "hpZ: 1/hpz_ranks of each tensor, from its first use in a step to the update",
        f"{_PARTITION}:1900",
    ),
    names.BACKEND_COPIES: (
        "gloo reduces and gathers in tensors of its own; nothing on a GPU",
        "c10d, ProcessGroupGloo",
    ),
    names.NORM: ("a partition of a gradient in fp64, to be squared", f"{_ZERO3}:1960"),
    names.STAGING: ("copies between host and device", "runtime/zero/utils.py:205"),
    names.OPTIMIZER_SWAP_BUFFERS: (
        "buffer_count · the largest sub-group in fp32, aligned",
        f"{_SWAP}/optimizer_utils.py:185",
    ),
    names.PARAM_SWAP_BUFFERS: ("buffer_count · buffer_size, aligned", f"{_SWAP}/partitioned_param_swapper.py:104"),
    names.SUB_GROUP_BUFFER: ("the full tensors of the largest sub-group, all ranks' partitions", f"{_ZERO3}:1009"),
    names.STREAMS: ("two gathers and two reductions that wait for another stream; an upper bound", f"{_ZERO3}:462"),
    names.FIRST_COPIES: ("pinned partitions that the flat buffer replaced, held by the allocator", f"{_ZERO3}:906"),
    names.LOADED: ("the complete file of a rank", "runtime/engine.py:4816"),
}


def describe_item(name: str, config: EngineConfig) -> tuple[str, str]:
    """Return the formula in words and the source of a breakdown item.

    Args:
        name: name of the item.
        config: stage, dtypes and knobs, which formulas mention.
    """
    training, zero = config.training, config.zero
    if zero.uses_fsdp2 and name in FSDP2_ITEMS:
        return FSDP2_ITEMS[name]
    if name in _FIXED:
        return _FIXED[name]
    optimizer = _ZERO3 if zero.stage == 3 else _ZERO12

    def shared(stage: int) -> str:
        return "1/ranks of each tensor, padded" if zero.stage >= stage else "full"

    texts = {
        names.PARAMETERS: (f"{training.precision}, {shared(3)}", f"{_ZERO3}:906"),
        names.PERSISTENT: ("tensors up to the persistence threshold stay full", _PARTITION),
        names.MASTER_PARAMETERS: (f"{training.master_dtype} copy, {shared(1)}", f"{optimizer}:1162"),
        names.OPTIMIZER_STATES: (
            f"{training.states_dtype} {state_name(training)} of {training.optimizer}, {shared(1)}",
            "torch/optim, ops/adam",
        ),
        names.SHARED_GRADIENTS: (f"{training.accumulation_dtype} accumulator, {shared(2)}", f"{_ZERO3}:791"),
        names.STEP_GRADIENTS: (f"a sub-group's gradients in {training.master_dtype} for the update", f"{_ZERO3}:2683"),
        names.BUCKET: (f"reduce_bucket_size in {training.precision}", f"{optimizer}:780"),
        WEIGHT_GRADIENTS: (f"{training.precision} gradients of parameters that are not yet reduced", "torch autograd"),
        names.REDUCE_COPIES: (
            "contiguous copies of gradients while they are reduced, and casts",
            "runtime/comm/coalesced_collectives.py:102",
        ),
        names.OPTIMIZER_TEMPORARIES: (f"tensors that {training.optimizer} makes to update a sub-group", "torch/optim"),
        names.CONSTRUCTION_TENSORS: (
            "tensors in fp32 while the model is built, and copies that become states",
            f"{_PARTITION}:266",
        ),
        names.OFFLOAD_COPIES: ("the share of parameters, and the largest gradient twice", f"{_ZERO12}:700"),
    }
    return texts.get(name, (name, "planner/simulator"))


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
