"""Simulation of DeepSpeed's engine at ZeRO stage 3: what it holds on which tier, and the copies it makes.

Source: DeepSpeed 0.19.8, runtime/zero/stage3.py, function by function; swapping to NVMe in runtime/swap_tensor/.
Checked against traces of torch's allocator on CPU ranks; what only a GPU rank does comes from reading the code.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...common.units import FP32_BYTES
from ...deepspeed.config import NVME_BLOCK_BYTES
from ..core import MemoryTracker, ModuleParams, RankMemory, Storage, next_power_of_two
from ..network.model import SimulatedNetwork
from .base import (
    BACKEND_COPIES,
    BUCKET,
    BUFFERS,
    CONSTRUCTION_TENSORS,
    FIRST_COPIES,
    LOADED,
    MASTER_PARAMETERS,
    NORM,
    NORM_BYTES,
    OPTIMIZER_STATES,
    OPTIMIZER_SWAP_BUFFERS,
    PARAM_SWAP_BUFFERS,
    PARAMETERS,
    REDUCE_COPIES,
    SHARED_GRADIENTS,
    STAGING,
    STEP_GRADIENTS,
    STREAMS,
    SUB_GROUP_BUFFER,
    EngineConfig,
    SimulatedEngine,
)
from .coordinator import ALIGNMENT_BYTES, ParameterCoordinator, Shard, SubGroup, align, make_shards, make_sub_groups

NORM_ELEMENTS = 250_000_000
"""Maximum number of gradient elements that are squared at a time (stage3.py:1960)."""


class Stage3Engine(SimulatedEngine):
    """Stage 3, with or without offload.

    Args:
        memory, config, network: as in `SimulatedEngine`.
        order: as in `ParameterCoordinator`, with the index of each parameter.
    """

    def __init__(
        self, memory: RankMemory, config: EngineConfig, network: SimulatedNetwork, order: Sequence[Sequence[int]] = ()
    ) -> None:
        super().__init__(memory, config, network)
        zero, world_size = config.zero, config.replicas
        self.zero, self.world_size, self.width = zero, world_size, config.width
        self.by_module = make_shards(network.modules, zero, world_size, self.width)
        self.shards = [shard for weights in network.modules for shard in self.by_module[id(weights)]]
        self.persistent = [shard for shard in self.shards if shard.persistent]
        self.groups = make_sub_groups(self.shards, zero, config.master_width)
        calls = [[self.shards[number] for number in call] for call in order]
        on_device = memory.on_cpu or zero.offload_param.device == "none"
        whole = config.owns_alone and on_device
        self.coordinator = ParameterCoordinator(memory, zero, world_size, self.width, calls, keeps_whole=whole)
        self.largest_group = max(group.numel for group in self.groups)
        self.elements = sum(shard.partition_numel for shard in self.shards)
        self.param_home = memory.host if zero.offload_param.device != "none" else memory.device
        self.state_home = memory.host if self.offloaded else memory.device
        self.group_of = {id(shard): group for group in self.groups for shard in group.shards}
        self.in_bucket: list[tuple[Shard, Storage | None]] = []
        self.bucket_elements = 0
        self.unswapped: list[Storage] = []
        """Gradients of swapped sub-groups that are too small for files on NVMe."""
        self.parts: list[Storage] = []
        """Partitions that `zero.Init` made, until they move into the flat buffer."""
        self.has_states = False
        self.creates_states_aside = any(group.swapped for group in self.groups)

    # Building.
    def build(self) -> None:
        """Build and partition one module after the other, as `zero.Init` does; then build the engine."""
        self.keep(self.memory.device, BUFFERS, self.network.buffer_bytes)
        if self.zero.offload_param.device == "nvme":
            self._lock_param_buffers()
        self._construct()
        self._flatten()
        self._make_master()
        self._make_step_gradients()
        self.keep(self.memory.device, BUCKET, self.zero.reduce_bucket_elements * self.width)
        if self.zero.overlap_comm and not self.memory.on_cpu:
            waiting = max(shard.numel for shard in self.shards) + self.zero.reduce_bucket_elements
            self.keep(self.memory.device, STREAMS, 2 * waiting * self.width)
        self.memory.at("gradients")
        self._keep_on_host_pinned(SHARED_GRADIENTS, self.elements * self.config.accumulation_width)
        self._gather_each()

    def _lock_param_buffers(self) -> None:
        param = self.zero.offload_param
        size = param.buffer_count * align(param.buffer_elements, self.width) * self.width
        self.resident.append(self.memory.lock(PARAM_SWAP_BUFFERS, size))

    def _construct(self) -> None:
        """Create tensors in fp32 and cast them; partition a module's tensors when the module is complete.

        Only the module whose construction has the highest device memory is simulated.
        """
        self.memory.at("construction")
        partitions = [self._partitions(weights) for weights in self.network.construction]
        device = self.memory.device
        self.coordinator.copy_within_group(self.shards)
        held, worst, number = 0, -1, 0
        for index, (weights, own) in enumerate(zip(self.network.construction, partitions, strict=True)):
            if held + self._construction_bytes(weights) > worst:
                worst, number = held + self._construction_bytes(weights), index
            held += sum(size for home, size in own if home is device)
        for index, part in enumerate((partitions[:number], partitions[number:])):
            for home in {id(home): home for own in part for home, _ in own}.values():
                size = sum(size for own in part for where, size in own if where is home)
                (self.resident if home is self.memory.nvme else self.parts).append(Storage(home, PARAMETERS, size))
            if index == 0:
                self.memory.add_transient(
                    (device, CONSTRUCTION_TENSORS, self._construction_bytes(self.network.construction[number]))
                )

    def _partitions(self, weights: ModuleParams) -> list[tuple[MemoryTracker, int]]:
        """Return the memory and the bytes of the rank's partition of each parameter of a module."""
        result = []
        for shard in self.by_module[id(weights)]:
            if shard.on_nvme:
                result.append((self.memory.nvme, align(shard.partition_numel, self.width) * self.width))
            else:
                home = self.memory.device if shard.persistent else self.param_home
                result.append((home, shard.partition_numel * self.width))
        return result

    def _construction_bytes(self, weights: ModuleParams) -> int:
        """Return a module's peak bytes during construction: its tensors in the model's dtype, one also in fp32."""
        made = peak = 0
        for numel in weights.numels:
            made += numel * self.width
            peak = max(peak, made + (numel * FP32_BYTES if self.width != FP32_BYTES else 0))
        return peak

    def _flatten(self) -> None:
        """Move the partitions into one flat buffer, through the host or on the host."""
        self.memory.at("flat parameters")
        memory, zero = self.memory, self.zero
        inside = sum(shard.partition_numel for shard in self.shards if not shard.on_nvme) * self.width
        if zero.offload_param.device == "none":
            staged = Storage(memory.host, PARAMETERS if memory.on_cpu else STAGING, inside)
            self.parts.clear()
            self.resident.append(staged if memory.on_cpu else Storage(memory.device, PARAMETERS, inside))
        elif zero.offload_param.device == "cpu":
            pinned = zero.offload_param.pin_memory and not memory.on_cpu
            self.resident.append(memory.pin(PARAMETERS, inside))
            if pinned:
                # torch's pinned allocator caches the blocks of the first copies.
                sizes = [next_power_of_two(shard.partition_numel * self.width) for shard in self.shards]
                self.resident.append(Storage(memory.pinned, FIRST_COPIES, sum(sizes)))
            self.parts.clear()
        elif any(shard.on_nvme for shard in self.shards):
            # The full tensors of the largest sub-group, not only the rank's partitions of them (stage3.py:1009).
            largest = max(self.groups, key=lambda group: group.numel)
            aligned = sum(align(shard.numel, self.width) for shard in largest.shards)
            self.resident.append(memory.lock(SUB_GROUP_BUFFER, aligned * self.width))

    def _make_master(self) -> None:
        self.memory.at("master parameters")
        width = self.config.master_width
        if any(group.swapped for group in self.groups):
            count = self.zero.offload_optimizer.buffer_count
            self.resident.append(
                self.memory.lock(OPTIMIZER_SWAP_BUFFERS, count * align(self.largest_group, FP32_BYTES) * FP32_BYTES)
            )
        for group in self.groups:
            home = self._home(group)
            if group.swapped:
                if any(shard.on_nvme for shard in group.shards):
                    self.memory.add_transient((self.state_home, STAGING, group.numel * width))
                self.keep(self.memory.nvme, MASTER_PARAMETERS, align(group.numel, width) * width)
                continue
            # The cast is cloned before it is freed.
            cast = Storage(home, CONSTRUCTION_TENSORS, group.numel * width) if width != self.width else None
            self.keep(home, MASTER_PARAMETERS, group.numel * width)
            del cast

    def _home(self, group: SubGroup) -> MemoryTracker:
        return self.memory.host if group.on_host or group.swapped else self.memory.device

    def _make_step_gradients(self) -> None:
        """Allocate the gradients of offloaded sub-groups in the master dtype; the others share one transient buffer."""
        self.memory.at("optimizer states")
        width = self.config.master_width
        shared = Storage(self.state_home, STEP_GRADIENTS, self.largest_group * width)
        for group in self.groups:
            if self.offloaded and not group.swapped:
                if group.on_host:
                    self._keep_on_host_pinned(STEP_GRADIENTS, group.numel * width)
                else:
                    self.keep(self.memory.device, STEP_GRADIENTS, group.numel * width)
        if self.config.training.optimizer == "adagrad" and not self.offloaded:
            self._make_states()
        del shared

    def _keep_on_host_pinned(self, what: str, size: int) -> None:
        """Allocate for the engine's lifetime: on the device or, with offload, on the host, where pinning copies."""
        if not self.offloaded:
            self.keep(self.memory.device, what, size)
        elif self.zero.offload_optimizer.pin_memory and not self.memory.on_cpu:
            plain = Storage(self.memory.host, STAGING, size)
            self.resident.append(self.memory.pin(what, size))
            del plain
        else:
            self.keep(self.memory.host, what, size)

    def _gather_each(self) -> None:
        """Gather one parameter after the other to set its gradient hook (stage3.py:1501).

        The buffer that gloo still holds of the last one is left out, because init is never a rank's highest peak.
        """
        self.memory.at("gradient hooks")
        largest = max(self.shards, key=lambda shard: shard.numel)
        self.coordinator.gather([largest], always=True)
        self.coordinator.drop(largest)
        self.coordinator.settle()

    def start_training(self) -> None:
        """Begin a step as all but the first begin."""
        self.begin_step()

    def begin_step(self) -> None:
        """Gather the persistent parameters for the next training step."""
        self.coordinator.begin()
        self.coordinator.gather([shard for shard in self.persistent if shard.full is None])
        for shard in self.persistent:
            self.coordinator.wait(shard)
        self.coordinator.forget_copies(self.shards)

    def fetch(self, weights: ModuleParams, *, backward: bool) -> None:
        """Gather a module's parameters."""
        self.coordinator.fetch(self.by_module[id(weights)])

    def release(self, weights: ModuleParams, *, backward: bool) -> None:
        """Free a module's gathered parameters."""
        self.coordinator.release(self.by_module[id(weights)])

    def gathered(self, weights: ModuleParams) -> tuple[Storage, ...]:
        """Return what `release` frees."""
        return tuple(shard.full for shard in self.by_module[id(weights)] if shard.full and not shard.persistent)

    def gradients(self, weights: ModuleParams, grads: list[Storage]) -> None:
        """Put each full gradient into the bucket; reduce the bucket when the next gradient does not fit."""
        self.coordinator.settle()
        for shard in self.by_module[id(weights)]:
            if self.bucket_elements + shard.numel > self.zero.reduce_bucket_elements and self.in_bucket:
                self._reduce()
            grad: Storage | None = grads.pop(0)
            if self.bucket_elements + shard.numel <= self.zero.reduce_bucket_elements:
                grad = None  # Copied into the bucket.
            self.in_bucket.append((shard, grad))
            self.bucket_elements += shard.numel
            del grad

    def finish(self) -> None:
        """Reduce what is left in the bucket."""
        if self.in_bucket:
            self._reduce()
        self.coordinator.settle()
        super().finish()

    def _reduce(self) -> None:
        memory, width = self.memory, self.width
        shards = [shard for shard, _ in self.in_bucket]
        padded = sum(shard.partition_numel for shard in shards) * self.world_size
        single = len(shards) == 1 and shards[0].numel % self.world_size == 0
        flat = None if single else Storage(memory.device, REDUCE_COPIES, padded * width)
        if self.zero.quantized_gradients:
            # Integers of half a byte, sent and received.
            memory.add_transient((memory.device, REDUCE_COPIES, padded))
        # gloo reduces a copy and frees it at some time before the partitions have been copied.
        copy = Storage(memory.device, BACKEND_COPIES, padded * width) if memory.uses_gloo else None
        accumulated, cast = self.config.accumulation_width, None
        if accumulated != width:
            cast = Storage(memory.device, REDUCE_COPIES, padded // self.world_size * accumulated)
        copies: list[Storage] = []
        for shard in shards:
            self._copy_out(shard, copies)
        self.in_bucket.clear()
        self.bucket_elements = 0
        del flat, cast, copies, copy

    def _copy_out(self, shard: Shard, copies: list[Storage]) -> None:
        """Copy the rank's partition of a reduced gradient to the accumulated gradients and to the optimizer."""
        if not self.offloaded:
            return
        memory, group = self.memory, self.group_of[id(shard)]
        size = shard.partition_numel * self.config.accumulation_width
        on_device = None if memory.on_cpu else Storage(memory.device, REDUCE_COPIES, size)
        memory.add_transient((memory.device, NORM, min(shard.partition_numel, NORM_ELEMENTS) * NORM_BYTES))
        widened = self.config.master_width != self.config.accumulation_width
        size = shard.partition_numel * self.config.master_width
        if group.swapped:
            part = Storage(memory.device, STEP_GRADIENTS, size) if widened or not memory.on_cpu else None
            if part is not None and shard.partition_numel * FP32_BYTES < NVME_BLOCK_BYTES:
                self.unswapped.append(part)
            elif part is not None:
                copies.append(part)
        elif widened:
            memory.add_transient((memory.device, REDUCE_COPIES, size))
        del on_device

    # The optimizer step, and checkpoints.
    def step(self, *, first: bool = False) -> None:
        """Update one sub-group after the other; partition persistent parameters and gather them again."""
        self.memory.at("optimizer step")
        self.passes = 0
        for shard in self.shards:
            if shard.full is not None or shard.in_flight is not None:
                self.coordinator.drop(shard)
        self.coordinator.settle()
        if not self.offloaded:
            largest = max(shard.partition_numel for shard in self.shards)
            self.memory.add_transient((self.memory.device, NORM, largest * NORM_BYTES))
        if self.config.training.precision == "fp16":
            # Each gradient is checked for overflow (stage3.py:3012).
            self.memory.add_transient((self.state_home, NORM, self.elements))
        for group in self.groups:
            self._update_group(group)
            if first and group.swapped:
                # The first update creates the states in pageable memory; they are released when they are copied to
                # the buffers that are written (distributed/training/deepspeed_fixes.py).
                self.memory.add_transient((self.memory.host, OPTIMIZER_STATES, self.config.state_bytes(group.numel)))
        if not first:
            self.unswapped.clear()
        self.begin_step()

    def _make_states(self) -> None:
        self.has_states = True
        self.keep_codebooks()
        for group in self.groups:
            if group.swapped:
                self.keep_states(self.memory.nvme, align(group.numel, FP32_BYTES))
                self.keep(self.memory.nvme, SHARED_GRADIENTS, self._swapped_gradients(group) * FP32_BYTES)
            else:
                self.keep_states(self._home(group), group.numel)

    def _swapped_gradients(self, group: SubGroup) -> int:
        """Return the elements of a sub-group's gradients that are large enough for files on NVMe."""
        elements = ALIGNMENT_BYTES // FP32_BYTES
        return sum(
            shard.partition_numel // elements * elements
            for shard in group.shards
            if shard.partition_numel * FP32_BYTES >= NVME_BLOCK_BYTES
        )

    def _update_group(self, group: SubGroup) -> None:
        memory, training = self.memory, self.config
        if not self.offloaded:
            _ = self._flat_gradients(group)
            self.update(group.numel, offloaded=False)
        elif not group.swapped:
            # On CPU ranks the CPU optimizer also updates the sub-groups that stay on the device.
            self.update(group.numel, offloaded=group.on_host or memory.on_cpu)
        if self.offloaded and not memory.on_cpu and self.zero.offload_param.device == "none":
            # The host casts the result to the parameters' dtype before it is copied to the device.
            memory.add_transient((memory.host, STAGING, group.numel * training.width))

    def _flat_gradients(self, group: SubGroup) -> Storage | None:
        """Return a sub-group's gradients joined and cast to the master dtype."""
        width, wide = self.config.accumulation_width, self.config.master_width
        joined = None
        if len(group.shards) > 1:
            joined = Storage(self.memory.device, STEP_GRADIENTS, group.numel * width)
        if width == wide:
            return joined
        widened = Storage(self.memory.device, STEP_GRADIENTS, group.numel * wide)
        del joined
        return widened

    def save(self) -> None:
        """Copy device tensors to the host, one storage after the other; host tensors are written without a copy."""
        self.memory.at("checkpoint save")
        self.coordinator.copy_within_group(self.shards)  # As an evaluation does.
        if not self.memory.on_cpu and not self.offloaded:
            self.memory.add_transient((self.memory.host, STAGING, self.largest_group * FP32_BYTES))

    def load(self) -> None:
        """Read the rank's full file and copy it into the engine's tensors."""
        self.memory.at("resume")
        loaded, config = list[Storage](), self.config
        for group in self.groups:
            if not group.swapped:
                loaded.append(Storage(self.memory.host, LOADED, group.numel * config.master_width))
                loaded += self.read_states(group.numel, reused=self._home(group) is self.memory.host)
        if not self.has_states:
            self._make_states()
        del loaded
