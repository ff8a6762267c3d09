"""A candidate of the search, with its memory and time, and the capacity of a rank that it must fit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..common.phases import Tier
from ..config.model import ModelSpec
from ..config.run_config import RunConfig
from ..config.zero import OffloadMode
from ..costs.parameters import TABLES, owned_parameter_groups
from ..deepspeed.config import NVME_BLOCK_BYTES
from ..hardware.cluster import ClusterSpec
from ..memory.bounds import MemoryUpperBound
from ..memory.estimate import BOOKKEEPING_BYTES, MemoryEstimate
from .space import (
    SWAP_KNOBS,
    ZERO_PLUS_PLUS,
    Objective,
    Strategy,
)

_BUCKETS = ("prefetch_bucket_elements", "max_live_elements", "reduce_bucket_elements", "sub_group_elements")
_VARIED: dict[int, tuple[str, ...]] = {
    0: (),
    1: ("overlap_comm",),
    2: ("overlap_comm",),
    3: ("overlap_comm", *_BUCKETS),
}
"""Knobs of each stage for which `knob_sets` tries several values."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One run configuration with its predicted time and an upper bound of its memory."""

    strategy: Strategy
    run: RunConfig
    seconds: float
    """Likely seconds of an optimizer step."""
    sample_seconds: float
    """Likely seconds per sample."""
    bounds: MemoryUpperBound
    peak_utilization: float
    """Highest utilization over device, host and NVMe by the upper bound; above 1 it does not fit."""

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.run.cluster.nodes

    def cost(self, objective: Objective) -> tuple[float, ...]:
        """Sort key: what the objective minimizes, then what decides between equals."""
        nodes, memory = float(self.nodes), float(self.bounds.device)
        # A difference below the fourth digit is no reason for a plan with more features.
        seconds, extras = float(f"{self.sample_seconds:.4g}"), float(self.features)
        match objective:
            case "time":
                return seconds, nodes, extras, memory
            case "nodes":
                return nodes, seconds, extras, memory
            case "cost":
                return nodes * seconds, seconds, extras, memory
            case "memory":
                return memory, seconds, nodes, extras

    @property
    def settings(self) -> dict[str, object]:
        """What `SearchConstraints` must fix so that a search on this candidate's nodes finds it and no other."""
        zero, strategy = self.run.zero, self.strategy
        fixed: dict[str, object] = {
            "stage": strategy.stage,
            "offload": strategy.offload.value,
            "offload_ratio": strategy.ratio if (strategy.stage, strategy.offload) == (3, "cpu-optimizer") else None,
            "checkpointing": self.run.model.checkpointing,
            "tile_relations": self.run.tile_relations,
            "micro_batch": self.run.training.micro_batch,
            "accumulation": self.run.training.gradient_accumulation_steps,
        }
        several = self.nodes > 1 and (strategy.stage, strategy.offload) == (3, "none")
        knobs = _VARIED[strategy.stage] + ZERO_PLUS_PLUS * several
        overrides: dict[str, object] = {name: getattr(zero, name) for name in knobs}
        if strategy.offload.uses_nvme:
            overrides |= {f"offload_optimizer.{name}": getattr(zero.offload_optimizer, name) for name in SWAP_KNOBS}
        if strategy.relation:
            fixed["relation_parallel"] = self.run.parallel.relation
        return {name: value for name, value in fixed.items() if value is not None} | {"zero_overrides": overrides}

    @property
    def features(self) -> int:
        """Number of features beyond ZeRO: checkpointing, offload, the parts of ZeRO++, relation parallelism."""
        strategy, offloads = self.strategy, self.strategy.offload is not OffloadMode.NONE
        checkpoints = self.run.model.checkpointing != "none"
        return checkpoints + offloads + (strategy.ratio < 1) + strategy.hpz + strategy.quantized + strategy.relation

    @property
    def footprint_key(self) -> tuple[object, ...]:
        """Key shared by candidates with nearly the same footprint: one failed replay rules out the rest."""
        run = self.run
        batch = run.training.micro_batch
        return (self.strategy, self.nodes, batch, run.model.checkpointing, run.zero, run.parallel)


@dataclass(frozen=True, slots=True)
class Capacity:
    """Bytes that one rank may use of each memory of a cluster."""

    device: int
    host: int
    """Pageable and pinned host memory together."""
    nvme: int | None
    separate: bool
    """True if the device's memory is not host memory."""
    fixed_device: int
    """Device bytes that a GPU rank holds in addition to torch's tensors."""
    fixed_host: int
    """Host bytes that a GPU rank holds in addition to torch's tensors."""
    fragmentation: float

    @classmethod
    def of(cls, cluster: ClusterSpec, headroom: float) -> Capacity:
        """Capacity of a rank of a cluster.

        Args:
            cluster: the cluster.
            headroom: fraction of every memory that stays free.
        """

        def usable(size: int) -> int:
            return int(size * (1 - headroom))

        nvme = None if cluster.nvme_bytes is None else usable(cluster.nvme_bytes) // cluster.ranks_per_node
        host, overhead = usable(cluster.host_memory_bytes) // cluster.ranks_per_node, cluster.device_overhead()
        device = usable(cluster.device_memory_bytes)
        if overhead is None:
            return cls(device, host, nvme, False, 0, 0, 0.0)
        fixed = overhead.device_bytes(0), overhead.total(tier=Tier.HOST)
        return cls(device, host, nvme, True, *fixed, overhead.fragmentation.likely)

    def device_of(self, bounds: MemoryUpperBound) -> int:
        """Device bytes of an upper bound, with what a GPU holds in addition to torch's tensors."""
        return self.fixed_device + int((bounds.device + BOOKKEEPING_BYTES) / (1 - self.fragmentation))

    def host_of(self, bounds: MemoryUpperBound) -> int:
        """Pageable and pinned host bytes of an upper bound."""
        return self.fixed_host + bounds.host + bounds.pinned

    def peak_utilization(self, bounds: MemoryUpperBound) -> float:
        """Highest utilization over device, host and NVMe of an upper bound; above 1 it does not fit."""
        return self._highest(self.device_of(bounds), self.host_of(bounds), bounds.nvme)

    def simulated_utilization(self, prediction: MemoryEstimate) -> float:
        """Highest utilization over device, host and NVMe of a simulated estimate; above 1 it does not fit."""
        host = prediction.host_bytes if self.separate else 0
        return self._highest(prediction.peak_bytes, host, prediction.highest(Tier.NVME))

    def _highest(self, device: float, host: int, nvme: int) -> float:
        shares = [device / self.device, host / self.host]
        if self.nvme is not None:
            shares.append(nvme / self.nvme)
        return max(shares)


@lru_cache(maxsize=64)
def with_nodes(cluster: ClusterSpec, nodes: int) -> ClusterSpec:
    """Return the cluster with another number of nodes, and a name that says so."""
    if nodes == cluster.nodes:
        return cluster
    name = cluster.name.split("x", 1)[1] if cluster.name.startswith(f"{cluster.nodes}x") else cluster.name
    return cluster.model_copy(update={"nodes": nodes, "name": f"{nodes}x{name}"})


def writes_to_nvme(run: RunConfig, strategy: Strategy) -> bool:
    """True unless the strategy uses NVMe and every rank's partition of a tile is too small for a file.

    DeepSpeed writes no tensor below `NVME_BLOCK_BYTES` to NVMe.
    """
    if not strategy.offload.uses_nvme:
        return True
    bytes_each = run.training.dtype_bytes if strategy.offload is OffloadMode.NVME else 4
    largest = _largest_tile(run.model, run.tile_relations, run.parallel.relation)
    return -(-largest // run.replicas) * bytes_each >= NVME_BLOCK_BYTES


@lru_cache(maxsize=1024)
def _largest_tile(spec: ModelSpec, tile: int | None, relation_ranks: int) -> int:
    groups = owned_parameter_groups(spec, tile, relation_ranks)
    sizes = [group.numel for group in groups if group.component == TABLES]
    return max(sizes or [group.numel for group in groups])
