"""Device overhead: what a rank's GPU holds in addition to torch's live tensors, as named items with an interval.

- *driver_reserve*: memory that the driver reserves, out of the total that nvidia-smi prints, before any process runs.
- *context*: the process's CUDA or HIP context and its kernels, each loaded when first used.
- *blas_workspace*: scratch memory of matrix products, which torch allocates and counts as its own.
- *nccl*, *nccl_host*: buffers of the communicators on the device and on the host.
- fragmentation: the fraction of the memory reserved by torch that no tensor can use, and rounding.

Figures that others measured are in ``data/device_overhead.yaml``. A source *estimate, not measured* marks a guess.
A machine's own figures replace any of them: `OverheadOverrides`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from pydantic import TypeAdapter

from ..common.errors import InputError
from ..common.phases import Tier
from ..common.schema import Schema, stored_as
from ..common.units import KIB, MIB
from .catalog import (
    ESTIMATE,
    Bytes,
    Entry,
    FractionInterval,
    Generation,
    GpuSpec,
    Level,
    OverheadItem,
    OverheadOverrides,
    find_gpu,
    load_catalog,
    read_data,
    read_overrides,
)
from .nccl import GUESSED_BASE, Base, Channels, alone, by_host_memory, by_nvlink, communicators_of, rccl

__all__ = ["DeviceOverhead", "OverheadItem", "OverheadOverrides", "estimate_overhead", "read_overrides"]

FRAGMENTATION = FractionInterval(
    low=0.006,
    likely=0.05,
    high=0.085,
    source="near the limit, of DeepSpeed: 0.6% to 2% at ZeRO-2 (OpenTau, pull request 273), 8.5% at ZeRO-3 (log of "
    "BigScience's 104B), 4.5% where memory ran out (tutorial)",
)
"""What decides whether a plan fits: near the limit, torch gives the blocks that it caches back and tries again."""
CACHED = FractionInterval(
    low=0.15,
    likely=0.20,
    high=0.33,
    source="far from the limit: 15% on average and up to 33% of the reserve, fine-tuning with ZeRO-3 (GMLake, arXiv "
    "2401.08156); 17% to 37% with FSDP (MPT's runs)",
)
"""What nvidia-smi shows of a plan with room to spare: torch keeps freed blocks that it may use again."""
FRAGMENTATION_EXPANDABLE = FractionInterval(low=0.0, likely=0.03, high=0.06, source=ESTIMATE)
"""With ``expandable_segments`` the pages of a stream and pool are contiguous: only rounding and gaps remain."""


class DeviceOverhead(Schema):
    """The overhead items of one rank, and the fragmentation of the memory that torch reserves."""

    gpu: str | None
    """Name of the GPU in the catalog; None if no GPU was named: each interval then spans those of all GPUs."""
    breakdown: tuple[OverheadItem, ...] = stored_as("entries")
    fragmentation: FractionInterval
    """Fraction of the bytes reserved by torch that is unused at the peak of allocated bytes, if memory is scarce."""
    cached: FractionInterval = CACHED
    """The same fraction if there is room to spare."""

    def item(self, name: str) -> OverheadItem:
        """Return the item with a name.

        Raises:
            KeyError: if there is no such item.
        """
        return {item.name: item for item in self.breakdown}[name]

    def total(self, level: Level = "likely", tier: Tier = Tier.DEVICE, *, in_torch: bool | None = None) -> int:
        """Return the sum of the items' bytes on a tier.

        Args:
            level: low, likely or high.
            tier: device or host.
            in_torch: True for items that torch counts as allocated, False for the others, None for all.
        """
        return sum(
            item.of(level)
            for item in self.breakdown
            if item.tier == tier and (in_torch is None or item.in_torch == in_torch)
        )

    def reserved_bytes(self, allocated_bytes: int, level: Level = "likely") -> int:
        """Return the bytes that torch has reserved from the driver at a peak of ``allocated_bytes``.

        When memory runs out, fragmentation is lower: torch frees unused segments and tries again.
        """
        fraction = self.fragmentation.of(level)
        return allocated_bytes + round(allocated_bytes * fraction / (1 - fraction))

    def shown_bytes(self, tensor_bytes: int, level: Level, capacity_bytes: int) -> int:
        """Return the bytes in use that the driver reports (nvidia-smi) at a peak of ``tensor_bytes`` of live tensors.

        Args:
            tensor_bytes: bytes of live tensors at their peak.
            level: low, likely or high.
            capacity_bytes: memory of the device, which bounds what is cached.
        """
        allocated = tensor_bytes + self.total(level, in_torch=True)
        shown = round(allocated / (1 - self.cached.of(level))) + self.total(level, in_torch=False)
        return min(shown, max(capacity_bytes, self.device_bytes(tensor_bytes, level)))

    def device_bytes(self, tensor_bytes: int, level: Level = "likely") -> int:
        """Return the bytes that a rank with ``tensor_bytes`` of live tensors uses of the driver's total."""
        allocated = tensor_bytes + self.total(level, in_torch=True)
        return self.reserved_bytes(allocated, level) + self.total(level, in_torch=False)


class _Interval(Entry):
    mib: tuple[Bytes, Bytes, Bytes]
    source: str


class _Count(Entry):
    count: tuple[Bytes, Bytes, Bytes]
    source: str


class _Observed(Entry):
    driver_reserve: dict[str, _Interval]
    context: dict[Generation, _Interval]
    nccl_kernels: dict[Generation, _Interval]
    channels: dict[str, _Count]


@functools.cache
def _observed() -> _Observed:
    return read_data("device_overhead.yaml", TypeAdapter(_Observed))


def _measured(name: str, interval: _Interval, formula: str) -> OverheadItem:
    low, likely, high = (value * MIB for value in interval.mib)
    return OverheadItem(
        name=name, low_bytes=low, likely_bytes=likely, high_bytes=high, formula=formula, source=interval.source
    )


def _blas(generation: Generation) -> OverheadItem:
    """Return the item for cuBLAS or rocBLAS: one workspace for each thread and stream that computes products."""
    if generation in ("cdna3", "cdna4"):
        first, one, text = 128 * MIB, (128 + 76) * MIB, "128 MiB of rocBLAS and 76 MiB of hipBLASLt"
    elif generation in ("hopper", "blackwell"):
        first, one, text = 32 * MIB, 32 * MIB, "32 MiB, shared with cuBLASLt"
    else:
        size = 2 * 4096 * KIB + 8 * 16 * KIB
        first, one, text = size, size, ":4096:2:16:8, shared with cuBLASLt"
    return OverheadItem(
        name="blas_workspace",
        in_torch=True,
        low_bytes=block_bytes(first),
        likely_bytes=2 * block_bytes(one),
        high_bytes=3 * block_bytes(one),
        formula=f"{text}: one for forward, one for backward's thread; high: one more for another stream",
        source="torch 2.13, CublasHandlePool.cpp: parseChosenWorkspaceSize, parseCUDABlasLtWorkspaceSize",
    )


def _nccl_base(generation: Generation) -> Base:
    """Return what communicators hold without connections: the kernels once, if they were measured."""
    interval = _observed().nccl_kernels.get(generation)
    if interval is None:
        return GUESSED_BASE
    low, likely, high = (value * MIB for value in interval.mib)
    return Base((low, likely, high), (0, 0, GUESSED_BASE.further[2]), interval.source)


def _nccl(gpu: str, spec: GpuSpec, world_size: int, nodes: int, relation_ranks: int) -> list[OverheadItem]:
    base = _nccl_base(spec.generation)
    if world_size == 1:
        return alone(base)
    communicators = communicators_of(world_size, relation_ranks)
    if spec.fabric == "xgmi":
        return rccl(communicators)
    observed = _observed().channels[gpu]
    channels, per_node = Channels(*observed.count, observed.source), -(-world_size // nodes)
    if spec.fabric == "pcie":
        return by_host_memory(channels, per_node, nodes, base, communicators=communicators)
    reduces = spec.fabric == "nvswitch" and spec.generation in ("hopper", "blackwell")
    return by_nvlink(channels, per_node, nodes, base, switches_reduce=reduces, communicators=communicators)


def _items_of_gpu(gpu: str, world_size: int, nodes: int, relation_ranks: int) -> list[OverheadItem]:
    _, spec = find_gpu(gpu)
    context = _observed().context[spec.generation]
    return [
        _measured("driver_reserve", _observed().driver_reserve[gpu], "the driver's total minus the total torch sees"),
        _measured("context", context, "context and kernels; high: all kernels loaded at once"),
        _blas(spec.generation),
        *_nccl(gpu, spec, world_size, nodes, relation_ranks),
    ]


def _span(breakdown: Sequence[OverheadItem]) -> OverheadItem:
    """Return one item whose interval spans those of all GPUs."""
    values = {
        "low_bytes": min(item.low_bytes for item in breakdown),
        "likely_bytes": max(item.likely_bytes for item in breakdown),
        "high_bytes": max(item.high_bytes for item in breakdown),
        "formula": "no GPU named: spans all GPUs of the catalog",
        "source": ESTIMATE,
    }
    return breakdown[0].model_copy(update=values)


def estimate_overhead(
    gpu: str | None,
    world_size: int,
    nodes: int,
    overrides: Mapping[str, object] | OverheadOverrides | None = None,
    *,
    expandable_segments: bool = False,
    relation_ranks: int = 1,
) -> DeviceOverhead:
    """Return the device overhead of one rank.

    Args:
        gpu: name of the GPU in the catalog; None for intervals that span all GPUs.
        world_size: number of ranks, one per GPU.
        nodes: number of nodes; all have equally many ranks.
        overrides: a machine's own figures.
        expandable_segments: whether torch runs with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.
        relation_ranks: ranks that share out the relations, G.

    Raises:
        InputError: if the GPU is unknown, there are fewer ranks than nodes, or an override is invalid.
    """
    if not 1 <= nodes <= world_size:
        raise InputError(f"nodes: {nodes} is not allowed: must be from 1 to {world_size}, the ranks")
    given = read_overrides(overrides)
    if gpu is None:
        items_by_gpu = [_items_of_gpu(name, world_size, nodes, relation_ranks) for name in load_catalog().gpus]
        breakdown = [_span(same) for same in zip(*items_by_gpu, strict=True)]
    else:
        gpu, _ = find_gpu(gpu)
        breakdown = _items_of_gpu(gpu, world_size, nodes, relation_ranks)
    replaced = []
    for item in breakdown:
        own = getattr(given, item.name)
        if own is not None:
            item = item.model_copy(update=own.model_dump() | {"formula": "given by the user"})
        replaced.append(item)
    scarce, spare = (FRAGMENTATION_EXPANDABLE,) * 2 if expandable_segments else (FRAGMENTATION, CACHED)
    return DeviceOverhead(
        gpu=gpu,
        breakdown=tuple(replaced),
        fragmentation=given.fragmentation or scarce,
        cached=given.fragmentation or spare,
    )


MIN_BLOCK_BYTES = 512
"""kMinBlockSize: torch's caching allocator rounds the size of every block up to a multiple of it.

Source: torch 2.13, ``c10/core/AllocatorConfig.h`` and ``c10/cuda/CUDACachingAllocator.cpp``.
"""


def block_bytes(size: int) -> int:
    """Return the bytes that torch counts as allocated for a storage of ``size`` bytes."""
    return -(-size // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
