"""Twin of DeepSpeed's engine at ZeRO stage 3: what it holds on which tier, and the copies it makes.

Source: DeepSpeed 0.19.8, runtime/zero/stage3.py, function by function; swapping to NVMe in
runtime/swap_tensor/. Seen in traces of torch's allocator on CPU ranks; what only a GPU does is read.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...common.units import FP32_BYTES
from ...deepspeed.config import NVME_BLOCK_BYTES
from ..core.autograd import ModuleParams
from ..core.storage import MemoryTracker, Storage
from ..core.tiers import RankMemory, next_power_of_two
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
from .coordinator import ParameterCoordinator
from .partition import ALIGNMENT_BYTES, Shard, SubGroup, align, make_shards, make_sub_groups

NORM_ELEMENTS = 250_000_000
"""Gradients are squared so many elements at a time (stage3.py:1960)."""


class Stage3Engine(SimulatedEngine):
    """Stage 3, with or without offload.

    Args:
        memory, setting, network: as in `SimulatedEngine`.
        order: as in `ParameterCoordinator`, by number of the parameter.
    """

    def __init__(
        self, memory: RankMemory, config: EngineConfig, network: SimulatedNetwork, order: Sequence[Sequence[int]] = ()
    ) -> None:
        super().__init__(memory, config, network)
        zero, world_size = config.zero, config.world_size
        self.zero, self.world_size, self.width = zero, world_size, config.width
        self.by_module = make_shards(network.modules, zero, world_size, self.width)
        self.shards = [shard for weights in network.modules for shard in self.by_module[id(weights)]]
        self.persistent = [shard for shard in self.shards if shard.persistent]
        self.groups = make_sub_groups(self.shards, zero, config.master_width)
        calls = [[self.shards[number] for number in call] for call in order]
        self.coordinator = ParameterCoordinator(memory, zero, world_size, self.width, calls)
        self.largest_group = max(group.numel for group in self.groups)
        self.elements = sum(shard.share for shard in self.shards)
        self.param_home = memory.host if zero.offload_param.device != "none" else memory.device
        self.state_home = memory.host if self.offloaded else memory.device
        self.group_of = {id(shard): group for group in self.groups for shard in group.shards}
        self.in_bucket: list[tuple[Shard, Storage | None]] = []
        self.bucket_elements = 0
        self.unswapped: list[Storage] = []
        self.parts: list[Storage] = []
        self.has_states = False

    # Building.

    def build(self) -> None:
        """`zero.Init` makes and cuts one module after the other; then the engine takes the shares over."""
        self.keep(self.memory.device, BUFFERS, self.network.buffer_bytes)
        if self.zero.offload_param.device == "nvme":
            self._lock_param_buffers()
        self._construct()
        self._flatten()
        self._make_master()
        self._make_step_gradients()
        self.keep(self.memory.device, BUCKET, self.zero.reduce_bucket_elements * self.width)
        if self.zero.overlap_comm and not self.memory.on_cpu:
            largest = max(shard.numel for shard in self.shards)
            self.keep(self.memory.device, STREAMS, 2 * (largest + self.zero.reduce_bucket_elements) * self.width)
        self.memory.at("gradients")
        self._keep_on_host_pinned(SHARED_GRADIENTS, self.elements * self.config.accumulation_width)
        self._gather_each()

    def _lock_param_buffers(self) -> None:
        param = self.zero.offload_param
        size = param.buffer_count * align(param.buffer_elements, self.width) * self.width
        storage = self.memory.lock(PARAM_SWAP_BUFFERS, size)
        self.kept.append(storage)

    def _construct(self) -> None:
        """Tensors are made in fp32 and cast; a module's are cut when it is complete.

        Of the modules only the one at whose making the device holds the most is replayed.
        """
        self.memory.at("construction")
        shares = [self._shares(weights) for weights in self.network.construction]
        device = self.memory.device
        held, worst, number = 0, -1, 0
        for index, (weights, own) in enumerate(zip(self.network.construction, shares, strict=True)):
            if held + self._making(weights) > worst:
                worst, number = held + self._making(weights), index
            held += sum(size for home, size in own if home is device)
        for index, part in enumerate((shares[:number], shares[number:])):
            for home in {id(home): home for own in part for home, _ in own}.values():
                size = sum(size for own in part for where, size in own if where is home)
                (self.kept if home is self.memory.nvme else self.parts).append(Storage(home, PARAMETERS, size))
            if index == 0:
                self.memory.add_transient(
                    (device, CONSTRUCTION_TENSORS, self._making(self.network.construction[number]))
                )

    def _shares(self, weights: ModuleParams) -> list[tuple[MemoryTracker, int]]:
        """Where a rank's shares of a module's parameters lie, and their bytes."""
        result = []
        for shard in self.by_module[id(weights)]:
            if shard.on_nvme:
                result.append((self.memory.nvme, align(shard.share, self.width) * self.width))
            else:
                home = self.memory.device if shard.persistent else self.param_home
                result.append((home, shard.share * self.width))
        return result

    def _making(self, weights: ModuleParams) -> int:
        """The most bytes of a module's tensors while it is made: the last one in fp32 beside all of its dtype."""
        made = most = 0
        for numel in weights.numels:
            made += numel * self.width
            most = max(most, made + (numel * FP32_BYTES if self.width != FP32_BYTES else 0))
        return most

    def _flatten(self) -> None:
        """Shares move into one buffer: through the host, or on it to stay."""
        self.memory.at("flat parameters")
        memory, zero = self.memory, self.zero
        inside = sum(shard.share for shard in self.shards if not shard.on_nvme) * self.width
        if zero.offload_param.device == "none":
            staged = Storage(memory.host, PARAMETERS if memory.on_cpu else STAGING, inside)
            self.parts.clear()
            self.kept.append(staged if memory.on_cpu else Storage(memory.device, PARAMETERS, inside))
        elif zero.offload_param.device == "cpu":
            pinned = zero.offload_param.pin_memory and not memory.on_cpu
            self.kept.append(memory.pin(PARAMETERS, inside))
            if pinned:
                # torch's pinned allocator keeps the blocks of the first copies.
                sizes = [next_power_of_two(shard.share * self.width) for shard in self.shards]
                self.kept.append(Storage(memory.pinned, FIRST_COPIES, sum(sizes)))
            self.parts.clear()
        elif any(shard.on_nvme for shard in self.shards):
            # The largest sub-group's whole tensors, not a rank's shares of them (stage3.py:1009).
            largest = max(self.groups, key=lambda group: group.numel)
            aligned = sum(align(shard.numel, self.width) for shard in largest.shards)
            self.kept.append(memory.lock(SUB_GROUP_BUFFER, aligned * self.width))

    def _make_master(self) -> None:
        self.memory.at("master parameters")
        width = self.config.master_width
        if any(group.swapped for group in self.groups):
            count = self.zero.offload_optimizer.buffer_count
            self.kept.append(
                self.memory.lock(OPTIMIZER_SWAP_BUFFERS, count * align(self.largest_group, FP32_BYTES) * FP32_BYTES)
            )
        for group in self.groups:
            home = self._home(group)
            if group.swapped:
                if any(shard.on_nvme for shard in group.shards):
                    self.memory.add_transient((self.state_home, STAGING, group.numel * width))
                self.keep(self.memory.nvme, MASTER_PARAMETERS, align(group.numel, width) * width)
                continue
            # The cast is cloned before it is dropped.
            cast = Storage(home, CONSTRUCTION_TENSORS, group.numel * width) if width != self.width else None
            self.keep(home, MASTER_PARAMETERS, group.numel * width)
            del cast

    def _home(self, group: SubGroup) -> MemoryTracker:
        return self.memory.host if group.on_host or group.swapped else self.memory.device

    def _make_step_gradients(self) -> None:
        """Offloaded sub-groups keep a gradient of the master's width; others pass through one buffer."""
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
        """For the engine's life: on the device, or on the host, where pinning is a copy."""
        if not self.offloaded:
            self.keep(self.memory.device, what, size)
        elif self.zero.offload_optimizer.pin_memory and not self.memory.on_cpu:
            plain = Storage(self.memory.host, STAGING, size)
            self.kept.append(self.memory.pin(what, size))
            del plain
        else:
            self.keep(self.memory.host, what, size)

    def _gather_each(self) -> None:
        """Hooks for gradients are set while each parameter is whole, one after the other (stage3.py:1501).

        What gloo still holds of the last one then is left out: init has never a rank's highest peak.
        """
        self.memory.at("gradient hooks")
        largest = max(self.shards, key=lambda shard: shard.numel)
        self.coordinator.gather([largest])
        self.coordinator.drop(largest)
        self.coordinator.settle()

    # One training step.

    def begin_step(self) -> None:
        """Persistent parameters are whole; nothing else is."""
        self.coordinator.begin()
        self.coordinator.gather([shard for shard in self.persistent if shard.full is None])
        for shard in self.persistent:
            self.coordinator.wait(shard)

    def fetch(self, weights: ModuleParams, *, backward: bool) -> None:
        """Gather a module's parameters."""
        self.coordinator.fetch(self.by_module[id(weights)])

    def release(self, weights: ModuleParams, *, backward: bool) -> None:
        """Drop them again."""
        self.coordinator.release(self.by_module[id(weights)])

    def gradients(self, weights: ModuleParams, grads: list[Storage]) -> None:
        """Each whole gradient waits in the bucket, which is reduced when the next one does not fit."""
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
        """What is left in the bucket is reduced."""
        if self.in_bucket:
            self._reduce()
        self.coordinator.settle()
        super().finish()

    def _reduce(self) -> None:
        memory, width = self.memory, self.width
        shards = [shard for shard, _ in self.in_bucket]
        padded = sum(shard.share for shard in shards) * self.world_size
        single = len(shards) == 1 and shards[0].numel % self.world_size == 0
        flat = None if single else Storage(memory.device, REDUCE_COPIES, padded * width)
        # gloo reduces a copy, and lets go of it some time before the shares have been taken over.
        copy = Storage(memory.device, BACKEND_COPIES, padded * width) if memory.uses_gloo else None
        accumulated = self.config.accumulation_width
        cast = None
        if accumulated != width:
            cast = Storage(memory.device, REDUCE_COPIES, padded // self.world_size * accumulated)
        copies: list[Storage] = []
        for shard in shards:
            self._take_over(shard, copies)
        self.in_bucket.clear()
        self.bucket_elements = 0
        del flat, cast, copies, copy

    def _take_over(self, shard: Shard, copies: list[Storage]) -> None:
        """A rank's share of a reduced gradient goes to where gradients are accumulated, and to the optimizer."""
        if not self.offloaded:
            return
        memory, group = self.memory, self.group_of[id(shard)]
        size = shard.share * self.config.accumulation_width
        on_device = None if memory.on_cpu else Storage(memory.device, REDUCE_COPIES, size)
        memory.add_transient((memory.device, NORM, min(shard.share, NORM_ELEMENTS) * NORM_BYTES))
        widened = self.config.master_width != self.config.accumulation_width
        size = shard.share * self.config.master_width
        if group.swapped:
            part = Storage(memory.device, STEP_GRADIENTS, size) if widened or not memory.on_cpu else None
            if part is not None and shard.share * FP32_BYTES < NVME_BLOCK_BYTES:
                self.unswapped.append(part)
            elif part is not None:
                copies.append(part)
        elif widened:
            memory.add_transient((memory.device, REDUCE_COPIES, size))
        del on_device

    # The optimizer step, and checkpoints.

    def step(self, *, first: bool = False) -> None:
        """Sub-groups are updated one after the other; persistent parameters are cut and gathered anew."""
        self.memory.at("optimizer step")
        self.passes = 0
        for shard in self.shards:
            if shard.full is not None or shard.in_flight is not None:
                self.coordinator.drop(shard)
        self.coordinator.settle()
        if not self.offloaded:
            largest = max(shard.share for shard in self.shards)
            self.memory.add_transient((self.memory.device, NORM, largest * NORM_BYTES))
        if self.config.training.precision == "fp16":
            # Each is asked whether it is finite (stage3.py:3012).
            self.memory.add_transient((self.state_home, NORM, self.elements))
        for group in self.groups:
            self._update_group(group)
            if first and group.swapped:
                # Moments are made in ordinary memory by the first update, then written out.
                self.memory.add_transient((self.memory.host, OPTIMIZER_STATES, group.numel * self.config.state_width))
        self.unswapped.clear()
        self.begin_step()

    def _make_states(self) -> None:
        self.has_states = True
        width = self.config.state_width
        for group in self.groups:
            if group.swapped:
                aligned = align(group.numel, FP32_BYTES) * width
                self.keep(self.memory.nvme, OPTIMIZER_STATES, aligned)
                self.keep(self.memory.nvme, SHARED_GRADIENTS, self._swapped_gradients(group) * FP32_BYTES)
            else:
                self.keep(self._home(group), OPTIMIZER_STATES, group.numel * width)

    def _swapped_gradients(self, group: SubGroup) -> int:
        """Elements of a sub-group's gradients that are large enough for files."""
        elements = ALIGNMENT_BYTES // FP32_BYTES
        return sum(
            shard.share // elements * elements for shard in group.shards if shard.share * FP32_BYTES >= NVME_BLOCK_BYTES
        )

    def _update_group(self, group: SubGroup) -> None:
        memory, training = self.memory, self.config
        if not self.offloaded:
            grads = self._flat_gradients(group)
            self.update(group.numel, offloaded=False)
            del grads
        elif not group.swapped:
            # On CPU ranks the part that would stay on the device is the host's optimizer's too.
            self.update(group.numel, offloaded=group.on_host or memory.on_cpu)
        if self.offloaded and not memory.on_cpu and self.zero.offload_param.device == "none":
            # A copy in the parameters' dtype is made on the host before it goes to the device.
            memory.add_transient((memory.host, STAGING, group.numel * training.width))

    def _flat_gradients(self, group: SubGroup) -> Storage | None:
        """A sub-group's gradients joined, and widened to the master's dtype."""
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
        """Tensors on a device are copied to the host storage by storage; on the host they are written as they are."""
        self.memory.at("checkpoint save")
        if not self.memory.on_cpu and not self.offloaded:
            self.memory.add_transient((self.memory.host, STAGING, self.largest_group * FP32_BYTES))

    def load(self) -> None:
        """A rank reads its own file whole, and copies it into what the engine has made."""
        self.memory.at("resume")
        loaded: list[Storage] = []
        config = self.config
        for group in self.groups:
            if not group.swapped:
                # Moments that stay on the host are those that were read.
                stay = self._home(group) is self.memory.host
                width = config.master_width + (0 if stay else config.state_width)
                loaded.append(Storage(self.memory.host, LOADED, group.numel * width))
        if not self.has_states:
            self._make_states()
        del loaded
