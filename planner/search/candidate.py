"""One candidate of the search, and the capacity that it must fit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..config.model import ModelSpec
from ..config.training import TrainingSpec
from ..config.zero import ZeroSpec
from ..costs.parameters import TABLES, parameter_groups
from ..deepspeed.config import NVME_BLOCK_BYTES
from ..hardware.cluster import ClusterSpec
from ..memory.estimate import BOOKKEEPING_BYTES, MemoryEstimate, estimate_memory
from ..memory.upper_bound import MemoryUpperBound
from ..plans.build import complete_plan
from ..plans.plan import Plan
from .constraints import Objective
from .space import Strategy


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to train."""

    strategy: Strategy
    spec: ModelSpec
    cluster: ClusterSpec
    training: TrainingSpec
    zero: ZeroSpec
    tile_relations: int | None
    seconds: float
    """Of an optimizer step, likely."""
    bounds: MemoryUpperBound
    peak_utilization: float
    """The most that any memory would be filled, of what may be."""

    @property
    def sample_seconds(self) -> float:
        """Of one sample."""
        return self.seconds / self.training.global_batch(self.cluster.world_size)

    def cost(self, objective: Objective) -> tuple[float, ...]:
        """What the objective makes small, then what decides between equals."""
        nodes, seconds, memory = float(self.cluster.nodes), self.sample_seconds, float(self.bounds.device)
        return {
            "time": (seconds, nodes, memory),
            "nodes": (nodes, seconds, memory),
            "cost": (nodes * seconds, seconds, memory),
            "memory": (memory, seconds, nodes),
        }[objective]

    @property
    def footprint_key(self) -> tuple[object, ...]:
        """What candidates of all but the same memory share."""
        return (self.strategy, self.cluster.nodes, self.training.micro_batch, self.spec.checkpointing, self.zero)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a rank may take of each memory of a cluster, and what of it tensors may."""

    device: int
    host: int
    """Pageable and pinned together."""
    nvme: int | None
    separate: bool
    """Whether the device is not the host itself."""
    fixed_device: int
    """What a GPU holds beside torch's tensors; likewise its host."""
    fixed_host: int
    fragmentation: float

    @classmethod
    def of(cls, cluster: ClusterSpec, headroom: float) -> Capacity:
        """With a share of every memory kept free."""

        def usable(size: int) -> int:
            return int(size * (1 - headroom))

        nvme = None if cluster.nvme_bytes is None else usable(cluster.nvme_bytes) // cluster.ranks_per_node
        host, overhead = usable(cluster.host_memory_bytes) // cluster.ranks_per_node, cluster.device_overhead()
        device = usable(cluster.device_memory_bytes)
        if overhead is None:
            return cls(device, host, nvme, False, 0, 0, 0.0)
        fixed = overhead.device_bytes(0), overhead.total(tier="host")
        return cls(device, host, nvme, True, *fixed, overhead.fragmentation.likely)

    def device_of(self, bounds: MemoryUpperBound) -> int:
        """A closed form's device, with what a GPU holds beside torch's tensors."""
        return self.fixed_device + int((bounds.device + BOOKKEEPING_BYTES) / (1 - self.fragmentation))

    def host_of(self, bounds: MemoryUpperBound) -> int:
        """Its host, pageable and pinned."""
        return self.fixed_host + bounds.host + bounds.pinned

    def peak_utilization(self, bounds: MemoryUpperBound) -> float:
        """The fullest memory's share of what it may hold, by a closed form."""
        return self._fullest(self.device_of(bounds), self.host_of(bounds), bounds.nvme)

    def replayed_utilization(self, prediction: MemoryEstimate) -> float:
        """The same of a ledger."""
        host = prediction.host_bytes if self.separate else 0
        return self._fullest(prediction.peak_bytes, host, prediction.highest("nvme"))

    def _fullest(self, device: float, host: int, nvme: int) -> float:
        shares = [device / self.device, host / self.host]
        if self.nvme is not None:
            shares.append(nvme / self.nvme)
        return max(shares)


def replay_memory(candidate: Candidate) -> MemoryEstimate:
    """The ledger of a candidate."""
    return estimate_memory(
        candidate.spec, candidate.cluster, candidate.training, candidate.zero, candidate.tile_relations
    )


@lru_cache(maxsize=64)
def with_nodes(cluster: ClusterSpec, nodes: int) -> ClusterSpec:
    """The same with another number of nodes."""
    if nodes == cluster.nodes:
        return cluster
    name = cluster.name.split("x", 1)[1] if cluster.name.startswith(f"{cluster.nodes}x") else cluster.name
    return cluster.model_copy(update={"nodes": nodes, "name": f"{nodes}x{name}"})


@lru_cache(maxsize=1024)
def writes_to_nvme(spec: ModelSpec, tile: int | None, world_size: int, width: int, strategy: Strategy) -> bool:
    """Whether a rank's share of a tile is large enough for a file, if the family writes any."""
    if "nvme" not in strategy.offload:
        return True
    bytes_each = width if strategy.offload == "nvme" else 4
    sizes = [group.numel for group in parameter_groups(spec, tile) if group.component == TABLES]
    largest = max(sizes or [group.numel for group in parameter_groups(spec, tile)])
    return -(-largest // world_size) * bytes_each >= NVME_BLOCK_BYTES


def to_plan(candidate: Candidate) -> Plan:
    """The plan of a candidate."""
    return complete_plan(
        candidate.spec, candidate.cluster, candidate.training, candidate.zero, candidate.tile_relations
    )
