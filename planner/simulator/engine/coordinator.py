"""Simulation of ZeRO-3's partitioned parameters: their partitions and sub-groups, and when each is gathered.

`ParameterCoordinator.gather` predicts the size of a gathered tile: its padded numel times bytes per element, plus the
copies that the gather makes.

Source: DeepSpeed 0.19.8, runtime/zero/partitioned_param_coordinator.py (`_fetch_sub_module_impl`,
`__params_to_release`), partition_parameters.py (`all_gather_coalesced`, `AllGatherCoalescedHandle.wait`) and stage3.py
(`_create_fp16_sub_groups`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ...config.zero import ZeroSpec
from ...costs.parameters import ParameterGroup
from ...deepspeed.config import NVME_BLOCK_BYTES
from ..core import ModuleParams, RankMemory, Storage
from .base import BACKEND_COPIES, GATHER_COPIES, GATHERED, PERSISTENT, SECONDARY


def _name(shard: Shard) -> str:
    return PERSISTENT if shard.persistent else GATHERED


class ParameterCoordinator:
    """Fetch, prefetch and release parameters as modules run.

    Args:
        memory: the rank's memory.
        zero: prefetch, reuse and live-element limits.
        world_size: number of partitions of a parameter.
        width: bytes of an element.
        order: the parameters of every module call of a step, forward and backward. Prefetch and reuse need it;
            DeepSpeed records it in the first step.
        keeps_whole: whether a rank's partition on the device is the parameter itself, since it has no other replica
            (`_no_gather_coalesced`).
    """

    def __init__(
        self,
        memory: RankMemory,
        zero: ZeroSpec,
        world_size: int,
        width: int,
        order: Sequence[Sequence[Shard]] = (),
        *,
        keeps_whole: bool = False,
    ) -> None:
        self.memory, self.zero, self.world_size, self.width = memory, zero, world_size, width
        self.order, self.keeps_whole = order, keeps_whole
        self.live_elements = 0
        self._late: Storage | None = None
        """Buffer of the last gather on a CPU: gloo's thread frees it only while the module runs (measured)."""
        self._held: dict[int, Storage] = {}
        """Common buffers of the gathers that are in flight."""
        self.begin()

    def begin(self) -> None:
        """Begin a training step: no module has been called yet."""
        self.call = 0
        self.queue = deque((shard, number) for number, shards in enumerate(self.order) for shard in shards)
        self.fetched_for: dict[int, int] = {}

    def fetch(self, shards: Sequence[Shard]) -> None:
        """Gather a module's parameters, wait for them, and prefetch the next ones."""
        self.gather([shard for shard in shards if shard.full is None and shard.in_flight is None])
        for shard in shards:
            self.wait(shard)
        if self.order and self.zero.prefetch_bucket_elements:
            self._forget(shards)
            self._prefetch()
        self.call += 1

    def settle(self) -> None:
        """Free the buffer that gloo holds of the last gather."""
        self._late = None

    def gather(self, shards: list[Shard], *, always: bool = False) -> None:
        """Start one gather of partitioned parameters; several share a buffer until `wait`.

        Args:
            shards: the parameters.
            always: gather also what has no other replica, as DeepSpeed does parameter by parameter.
        """
        if not shards:
            return
        self.settle()
        self.live_elements += sum(shard.numel for shard in shards)
        if self.keeps_whole and not always:
            for shard in shards:
                shard.full = Storage(self.memory.device, _name(shard), 0)
            return
        partition_bytes = sum(shard.partition_numel for shard in shards) * self.width
        full_bytes = partition_bytes * self.world_size
        buffer = Storage(self.memory.device, _name(shards[0]) if len(shards) == 1 else GATHERED, full_bytes)
        pieces = []
        if not self.memory.on_cpu and self.zero.offload_param.device != "none":
            pieces.append((self.memory.device, GATHER_COPIES, partition_bytes))
        if self.memory.uses_gloo:
            # gloo gathers into its own tensor.
            pieces.append((self.memory.device, BACKEND_COPIES, full_bytes))
        if self.zero.quantized_weights and shards[0].secondary is None:
            # Integers of one byte, of all ranks and of this one.
            pieces.append((self.memory.device, GATHER_COPIES, (full_bytes + partition_bytes) // self.width))
        self.memory.add_transient(*pieces)
        self._late = buffer if self.memory.uses_gloo else None
        if len(shards) == 1:
            shards[0].full = buffer
            return
        for shard in shards:
            shard.in_flight = shards
        self._held[id(shards)] = buffer

    def wait(self, shard: Shard) -> None:
        """Wait for a parameter's gather: copy all its parameters out of the common buffer and free the buffer."""
        if shard.in_flight is None:
            return
        gathered = shard.in_flight
        for each in gathered:
            each.full = Storage(self.memory.device, _name(each), each.numel * self.width)
            each.in_flight = None
        del self._held[id(gathered)]

    def _forget(self, shards: Sequence[Shard]) -> None:
        """Remove a module's own parameters from the head of the prefetch queue."""
        wanted = {id(shard) for shard in shards if self.fetched_for.get(id(shard), -1) < self.call}
        while self.queue and wanted:
            shard, used_at = self.queue.popleft()
            self.fetched_for[id(shard)] = used_at
            wanted.discard(id(shard))

    def _prefetch(self) -> None:
        limit = min(self.zero.max_live_elements - self.live_elements, self.zero.prefetch_bucket_elements)
        chosen: list[Shard] = []
        elements = 0
        while self.queue and elements < limit:
            shard, used_at = self.queue[0]
            if shard.on_nvme:
                break
            self.queue.popleft()
            self.fetched_for[id(shard)] = max(self.fetched_for.get(id(shard), -1), used_at)
            if shard.full is None and shard.in_flight is None and shard not in chosen:
                chosen.append(shard)
                elements += shard.numel
        self.gather(chosen)

    def release(self, shards: Sequence[Shard]) -> None:
        """Free a module's parameters, except persistent ones and those that are reused soon or were prefetched."""
        leaving = [shard for shard in shards if not shard.persistent]
        if self.order:
            leaving = [shard for shard in leaving if self.fetched_for.get(id(shard), -1) <= self.call]
            seen = 0
            for later in self.order[self.call :]:
                if seen >= self.zero.max_reuse_distance_elements:
                    break
                again = set(map(id, later))
                leaving = [shard for shard in leaving if id(shard) not in again]
                seen += sum(shard.numel for shard in later)
        for shard in leaving:
            self.drop(shard)

    def drop(self, shard: Shard) -> None:
        """Free a gathered parameter; the rank's partition remains."""
        self.wait(shard)
        if shard.full is not None:
            self.copy_within_group([shard])
            shard.full = None
            self.live_elements -= shard.numel

    def copy_within_group(self, shards: Sequence[Shard]) -> None:
        """Keep the rank's partition of parameters' second copies until `forget_copies` (`_partition_param_sec`)."""
        group = self.zero.hpz_ranks
        for shard in shards:
            if group > 1 and shard.secondary is None:
                size = shard.partition_numel * self.world_size // group * self.width
                shard.secondary = Storage(self.memory.device, SECONDARY, size)

    def forget_copies(self, shards: Sequence[Shard]) -> None:
        """Free the second copies: a step has changed the parameters."""
        for shard in shards:
            shard.secondary = None


ALIGNMENT_BYTES = 1024
"""Alignment of lengths in DeepSpeed's I/O library with one thread per request (swap_tensor/utils.py)."""


@dataclass(slots=True, eq=False)
class Shard:
    """One parameter: its size, a rank's partition of it, and its full storage while it is gathered."""

    numel: int
    partition_numel: int
    """Elements of a rank's partition, padding included."""
    persistent: bool
    """Whether it stays gathered from step to step, because its numel is at most the persistence threshold."""
    on_nvme: bool
    full: Storage | None = None
    """The gathered parameter; None if only the partition is in memory."""
    secondary: Storage | None = None
    """The rank's partition of the second copy, among the ranks of a group; None if there is none."""
    in_flight: list[Shard] | None = None
    """The parameters of the gather that is in flight for it; None if there is none."""


@dataclass(frozen=True, slots=True)
class SubGroup:
    """Parameters that the optimizer updates together."""

    shards: tuple[Shard, ...]
    numel: int
    """Elements of the rank's partitions."""
    swapped: bool
    """Whether master parameters and optimizer states are on NVMe."""
    on_host: bool
    """Whether they are on the host between steps."""


def ceil_div(count: int, parts: int) -> int:
    """Return ``count / parts`` rounded up: the size of each of ``parts`` equal parts, the last one padded."""
    return -(-count // parts)


def partitioned_numel(groups: Sequence[ParameterGroup], world_size: int) -> int:
    """Return the elements per rank if every tensor is padded to a multiple of ``world_size`` and partitioned."""
    return sum(ceil_div(group.numel, world_size) * group.copies for group in groups)


def align(numel: int, width: int) -> int:
    """Return the aligned elements of the I/O library's buffer or file for ``numel`` elements of ``width`` bytes."""
    elements = ALIGNMENT_BYTES // width
    return ceil_div(numel, elements) * elements


def make_shards(modules: Sequence[ModuleParams], zero: ZeroSpec, world_size: int, width: int) -> dict[int, list[Shard]]:
    """Return the shards of each module's parameters, by the ``id`` of the module."""
    on_nvme = zero.offload_param.device == "nvme"
    result: dict[int, list[Shard]] = {}
    for weights in modules:
        result[id(weights)] = [
            Shard(
                numel,
                partition_numel := ceil_div(numel, world_size),
                persistent=numel <= zero.persistence_threshold_elements,
                on_nvme=on_nvme and partition_numel * width >= NVME_BLOCK_BYTES,
            )
            for numel in weights.numels
        ]
    return result


def make_sub_groups(shards: Sequence[Shard], zero: ZeroSpec, master_width: int) -> list[SubGroup]:
    """Join shards in order into sub-groups; a new one begins when a group has reached the sub-group size."""
    groups: list[list[Shard]] = [[]]
    size = 0
    for shard in shards:
        if size >= zero.sub_group_elements:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += shard.partition_numel
    offload = zero.offload_optimizer
    on_device = int((1 - offload.ratio) * len(groups)) if offload.device == "cpu" else 0
    result = []
    for number, group in enumerate(groups):
        numel = sum(shard.partition_numel for shard in group)
        swapped = offload.device == "nvme" and numel * master_width >= NVME_BLOCK_BYTES
        on_host = offload.device != "none" and not swapped and number >= on_device
        result.append(SubGroup(tuple(group), numel, swapped, on_host))
    return result
