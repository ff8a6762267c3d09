"""`Candidate`: one way to train that the search compares; `Capacity`: the memory that it must fit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..common.phases import Tier
from ..config.model import ModelSpec
from ..costs.parameters import TABLES, parameter_groups
from ..deepspeed.config import NVME_BLOCK_BYTES
from ..hardware.cluster import ClusterSpec
from ..memory.estimate import BOOKKEEPING_BYTES, MemoryEstimate
from ..memory.upper_bound import MemoryUpperBound
from ..run_config import RunConfig
from .constraints import Objective
from .space import Strategy


@dataclass(frozen=True, slots=True)
class Candidate:
    """One run configuration with its predicted time and an upper bound of its memory."""

    strategy: Strategy
    run: RunConfig
    seconds: float
    """Likely seconds of an optimizer step."""
    bounds: MemoryUpperBound
    peak_utilization: float
    """Highest utilization over device, host and NVMe by the upper bound; above 1 it does not fit."""

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.run.cluster.nodes

    @property
    def sample_seconds(self) -> float:
        """Likely seconds per sample."""
        return self.seconds / self.run.global_batch

    def cost(self, objective: Objective) -> tuple[float, ...]:
        """Sort key: what the objective minimizes, then what decides between equals."""
        nodes, seconds, memory = float(self.nodes), self.sample_seconds, float(self.bounds.device)
        return {
            "time": (seconds, nodes, memory),
            "nodes": (nodes, seconds, memory),
            "cost": (nodes * seconds, seconds, memory),
            "memory": (memory, seconds, nodes),
        }[objective]

    @property
    def footprint_key(self) -> tuple[object, ...]:
        """Key shared by candidates with nearly the same footprint: one failed replay rules out the rest."""
        run = self.run
        return (self.strategy, self.nodes, run.training.micro_batch, run.model.checkpointing, run.zero)


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


@lru_cache(maxsize=1024)
def writes_to_nvme(spec: ModelSpec, tile: int | None, world_size: int, dtype_bytes: int, strategy: Strategy) -> bool:
    """True unless the strategy uses NVMe and every rank's partition of a tile is too small for a file.

    DeepSpeed writes no tensor below `NVME_BLOCK_BYTES` to NVMe.
    """
    if "nvme" not in strategy.offload:
        return True
    bytes_each = dtype_bytes if strategy.offload == "nvme" else 4
    sizes = [group.numel for group in parameter_groups(spec, tile) if group.component == TABLES]
    largest = max(sizes or [group.numel for group in parameter_groups(spec, tile)])
    return -(-largest // world_size) * bytes_each >= NVME_BLOCK_BYTES
