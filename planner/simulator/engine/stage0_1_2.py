"""Simulation of DeepSpeed's engine below ZeRO stage 3: stage 0, where every rank holds everything, and stages 1 and 2.

Sources: DeepSpeed 0.19.8, runtime/engine.py (`buffered_allreduce_fallback`), runtime/fp16/unfused_optimizer.py and
runtime/zero/stage_1_and_2.py, function by function, and traces of torch's allocator on CPU ranks.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from ...common.units import FP32_BYTES
from ..core import ModuleParams, RankMemory, Storage
from ..network.model import SimulatedNetwork
from .base import (
    BACKEND_COPIES,
    BUCKET,
    BUFFERS,
    CONSTRUCTION_TENSORS,
    LOADED,
    MASTER_PARAMETERS,
    NORM,
    NORM_BYTES,
    OFFLOAD_COPIES,
    OPTIMIZER_STATES,
    PARAMETERS,
    REDUCE_COPIES,
    SHARED_GRADIENTS,
    STAGING,
    STEP_GRADIENTS,
    EngineConfig,
    SimulatedEngine,
)
from .coordinator import ceil_div

START_ALIGNMENT = 2
"""The numel of flat buffers is a multiple of this times the world size (``nccl_start_alignment_factor``)."""


def make_full_model(engine: SimulatedEngine, elements: int) -> None:
    """Build the full model in fp32 on the host, cast it there, and move it to the device.

    Args:
        engine: the engine whose model is built.
        elements: elements of all parameters.
    """
    memory, width = engine.memory, engine.config.width
    memory.at("construction")
    engine.keep(memory.device, BUFFERS, engine.network.buffer_bytes)
    made = Storage(memory.host, CONSTRUCTION_TENSORS, elements * FP32_BYTES)
    cast = made if width == FP32_BYTES else Storage(memory.host, CONSTRUCTION_TENSORS, elements * width)
    del made
    moved = None if memory.on_cpu else Storage(memory.device, CONSTRUCTION_TENSORS, elements * width)
    del cast, moved


class Stage12Engine(SimulatedEngine):
    """Stages 1 and 2: optimizer states are partitioned as one flat buffer; at stage 2 gradients too.

    Args:
        memory, config, network: as in `SimulatedEngine`.
    """

    def __init__(self, memory: RankMemory, config: EngineConfig, network: SimulatedNetwork) -> None:
        super().__init__(memory, config, network)
        self.numels: list[int] = []
        self.first: dict[int, int] = {}
        """Index of the first parameter of each module, by the ``id`` of the module."""
        for weights in network.modules:
            self.first[id(weights)] = len(self.numels)
            self.numels += weights.numels
        unit = START_ALIGNMENT * config.replicas
        self.elements = sum(self.numels)
        self.flat = ceil_div(self.elements, unit) * unit
        self.partition_numel = self.flat // config.replicas
        self.partitions_gradients = config.zero.stage == 2
        self.home = memory.host if self.offloaded else memory.device
        self.bucket: Storage | None = None
        self.ends = list(accumulate(self.numels))
        self.in_bucket: list[int] = []
        """Indices of the parameters whose gradients are in the bucket."""
        self.part: Storage | None = None
        """The rank's part of the current micro-batch's gradients."""
        self.accumulated: Storage | None = None
        """The rank's part of the gradients, accumulated over micro-batches."""
        self.waiting: dict[int, list[Storage]] = {}
        """Full gradients by the ``id`` of their module, at stage 1."""

    def build(self) -> None:
        """Copy the model into a flat buffer; then copy the rank's partition of it to the master dtype."""
        memory, config = self.memory, self.config
        make_full_model(self, self.elements)
        memory.at("flat parameters")
        # The parameters stay on the host while the flat buffer is created there.
        parts = Storage(memory.host, CONSTRUCTION_TENSORS, self.elements * config.width)
        flat = Storage(memory.host, PARAMETERS if memory.on_cpu else STAGING, self.flat * config.width)
        self.resident.append(flat if memory.on_cpu else Storage(memory.device, PARAMETERS, self.flat * config.width))
        del parts, flat
        memory.at("master parameters")
        clone = Storage(memory.device, CONSTRUCTION_TENSORS, self.partition_numel * config.width)
        self._keep_pinned(MASTER_PARAMETERS, self.partition_numel * config.master_width)
        del clone
        memory.at("optimizer states")
        if self.offloaded:
            self._keep_pinned(STEP_GRADIENTS, self.partition_numel * config.master_width)
        else:
            memory.add_transient((memory.device, STEP_GRADIENTS, self.partition_numel * config.master_width))
        if self.offloaded:
            self._make_offload_copies()

    def _keep_pinned(self, what: str, size: int) -> None:
        pinned = self.offloaded and self.config.zero.offload_optimizer.pin_memory and not self.memory.on_cpu
        if pinned:
            plain = Storage(self.memory.host, STAGING, size)
            self.resident.append(self.memory.pin(what, size))
            del plain
        else:
            self.keep(self.home, what, size)

    def _make_offload_copies(self) -> None:
        """Allocate the transfer buffers: for the rank's partition, and for the gradient of the largest parameter."""
        memory, config = self.memory, self.config
        largest = max(self.numels)
        self.resident.append(memory.pin(OFFLOAD_COPIES, self.partition_numel * config.width))
        self.resident.append(memory.pin(OFFLOAD_COPIES, largest * config.width))
        self.keep(memory.device, OFFLOAD_COPIES, largest * config.width)

    # One training step.

    def gradients(self, weights: ModuleParams, grads: list[Storage]) -> None:
        """Reduce gradients bucket by bucket at stage 2; at stage 1 keep them until backward has ended."""
        if self.bucket is None:
            self.bucket = self.make_bucket(self.config.width)
        if not self.partitions_gradients:
            # Gradients of later micro-batches are added to the first ones.
            self.waiting.setdefault(id(weights), list(grads))
            grads.clear()
            return
        self._fill(weights, grads)

    def make_bucket(self, width: int) -> Storage:
        """Allocate the bucket, or with ``overlap_comm`` two: one is filled while another stream reduces the other one.

        Args:
            width: bytes of an element.
        """
        double = self.config.zero.overlap_comm and not self.memory.on_cpu
        return Storage(self.memory.device, BUCKET, self.config.zero.reduce_bucket_elements * width * (1 + double))

    def _fill(self, weights: ModuleParams, grads: list[Storage]) -> None:
        """Copy gradients into the bucket one by one; reduce the bucket when the next gradient does not fit.

        A bias comes before its weight, whose gradient autograd transposes first.
        """
        first, numels = self.first[id(weights)], weights.numels
        order = sorted(range(len(numels)), key=numels.__getitem__)
        waiting = [grads[offset] for offset in order]
        grads.clear()
        for offset in order:
            filled = sum(self.numels[number] for number in self.in_bucket)
            if filled + numels[offset] > self.config.zero.reduce_bucket_elements:
                self._reduce()
            self.in_bucket.append(first + offset)
            del waiting[0]

    def _reduce(self) -> None:
        """Reduce the bucket over ranks and copy the rank's own part out of it."""
        memory, config = self.memory, self.config
        owners = [owner for number in self.in_bucket for owner in self.owners(number)]
        if any(owner != following for owner, following in pairwise(owners)):
            # Each rank's slice of the bucket is a tensor, and the reduction joins them again.
            elements = sum(self.numels[number] for number in self.in_bucket)
            memory.add_transient((memory.device, REDUCE_COPIES, elements * config.width))
        self.note_norms(self.in_bucket)
        owns = config.replica is None or any(config.replica in self.owners(number) for number in self.in_bucket)
        self.in_bucket.clear()
        if self.part is None and owns and not self.offloaded:
            self.part = Storage(memory.device, SHARED_GRADIENTS, self.overlapping * config.width)

    def note_norms(self, numbers: list[int]) -> None:
        """Square each of these parameters' gradients in fp64 on its way to the host."""
        if self.offloaded:
            largest = max((self.numels[number] for number in numbers), default=0)
            self.memory.add_transient((self.memory.device, NORM, largest * NORM_BYTES))

    def owners(self, number: int) -> range:
        """Return the ranks whose partitions contain elements of a parameter."""
        end = self.ends[number]
        return range((end - self.numels[number]) // self.partition_numel, (end - 1) // self.partition_numel + 1)

    @property
    def overlapping(self) -> int:
        """Elements of all parameters that overlap the rank's partition; the maximum over ranks if the rank is None."""
        held = [0] * self.config.replicas
        for number, numel in enumerate(self.numels):
            for rank in self.owners(number):
                held[rank] += numel
        return max(held) if self.config.replica is None else held[self.config.replica]

    def finish(self) -> None:
        """Reduce what is left, and add the rank's part to that of earlier micro-batches.

        Stage 1 does so only after the last micro-batch.
        """
        if self.partitions_gradients or not self.accumulates:
            self.memory.at("reduction")
            if self.waiting and self.config.replica is None and self.part is None:
                # The first rank's part is allocated while all gradients are still held in full.
                self.in_bucket.append(0)
                self._reduce()
            for weights in self.network.modules:
                if id(weights) in self.waiting:
                    self._fill(weights, self.waiting.pop(id(weights)))
            self._reduce()
            self._add_part()
            self.bucket = None
        super().finish()

    def _add_part(self) -> None:
        if self.accumulated is None and self.config.accumulation_width == self.config.width:
            self.accumulated = self.part
        elif self.accumulated is None and self.part is not None:
            size = self.part.size // self.config.width * self.config.accumulation_width
            self.accumulated = Storage(self.memory.device, SHARED_GRADIENTS, size)
        self.part = None

    def start_training(self) -> None:
        """Allocate the host buffer that accumulates micro-batches."""
        if self.offloaded and self.config.training.gradient_accumulation_steps > 1:
            self._keep_pinned(SHARED_GRADIENTS, self.overlapping * self.config.width)

    # The optimizer step, and checkpoints.

    def step(self, *, first: bool = False) -> None:
        """Update the rank's partition of the flat buffer at once."""
        self.memory.at("optimizer step")
        self.passes = 0
        config = self.config
        if self.offloaded:
            self.update(self.partition_numel, offloaded=True)
            self._gather_parameters()
            return
        joined = Storage(self.memory.device, STEP_GRADIENTS, self.partition_numel * config.accumulation_width)
        grads = joined
        if config.accumulation_width != config.master_width:
            grads = Storage(self.memory.device, STEP_GRADIENTS, self.partition_numel * config.master_width)
        del joined
        self.accumulated = None
        self.update(self.partition_numel, offloaded=False)
        del grads
        self._gather_parameters()

    def _gather_parameters(self) -> None:
        """All-gather the updated partitions in place; gloo gathers into its own tensor.

        DeepSpeed gathers nothing without another replica.
        """
        if self.memory.uses_gloo and not self.config.owns_alone:
            self.memory.add_transient((self.memory.device, BACKEND_COPIES, self.flat * self.config.width))

    def save(self) -> None:
        """Copy tensors on a device to the host, one storage after the other."""
        self.memory.at("checkpoint save")
        if not self.memory.on_cpu and not self.offloaded:
            self.memory.add_transient((self.memory.host, STAGING, self.partition_numel * FP32_BYTES))

    def load(self) -> None:
        """Read the rank's full file and copy it into the engine's tensors."""
        self.memory.at("resume")
        config = self.config
        loaded = [Storage(self.memory.host, LOADED, self.partition_numel * config.master_width)]
        loaded += self.read_states(self.partition_numel, reused=self.home is self.memory.host)
        self.keep_codebooks()
        self.keep_states(self.home, self.partition_numel)
        if config.replica in (None, config.replicas - 1) and self.flat > self.elements:
            # The last rank's partition was saved without padding and is copied to add it.
            self.memory.add_transient((self.memory.host, LOADED, self.partition_numel * config.master_width))
        del loaded


class Stage0Engine(SimulatedEngine):
    """Stage 0: parameters, gradients and optimizer states in full; half precision adds an fp32 master copy.

    Args:
        memory, config, network: as in `SimulatedEngine`.
    """

    def __init__(self, memory: RankMemory, config: EngineConfig, network: SimulatedNetwork) -> None:
        super().__init__(memory, config, network)
        self.numels = [numel for weights in network.modules for numel in weights.numels]
        self.elements = sum(self.numels)
        self.half = config.width != config.master_width
        self.has_states = False

    def build(self) -> None:
        """Build the model; in half precision also the master copy and the optimizer states."""
        make_full_model(self, self.elements)
        self.keep(self.memory.device, PARAMETERS, self.elements * self.config.width)
        if self.half:
            self.memory.at("master parameters")
            self.keep(self.memory.device, MASTER_PARAMETERS, self.elements * self.config.master_width)
            self.memory.at("optimizer states")
            # A step with gradients of zero creates the optimizer states (unfused_optimizer.py).
            self._make_states()
            both = self.config.master_width + self.config.width
            zeros = Storage(self.memory.device, STEP_GRADIENTS, self.elements * both)
            self._update()
            del zeros

    def _update(self) -> None:
        self.update(max(self.numels), offloaded=False, one_by_one=True)

    def gradients(self, weights: ModuleParams, grads: list[Storage]) -> None:
        """Keep the full gradients until the step; those of later micro-batches are added to them."""
        if not weights.grads:
            weights.grads = list(grads)
        grads.clear()

    def finish(self) -> None:
        """Reduce all gradients in one flat copy after the last micro-batch."""
        if not self.accumulates:
            self.memory.at("reduction")
            flat = Storage(self.memory.device, REDUCE_COPIES, self.elements * self.config.width)
            del flat
        super().finish()

    def step(self, *, first: bool = False) -> None:
        """Update the parameters one by one; in half precision from flat fp32 gradients."""
        self.memory.at("optimizer step")
        self.passes = 0
        config = self.config
        wide = None
        if self.half:
            wide = Storage(self.memory.device, STEP_GRADIENTS, self.elements * config.master_width)
        self._update()
        del wide
        for weights in self.network.modules:
            weights.grads = []

    def save(self) -> None:
        """Copy tensors on a device to the host, one storage after the other."""
        self.memory.at("checkpoint save")
        if not self.memory.on_cpu:
            self.memory.add_transient((self.memory.host, STAGING, max(self.numels) * self.config.master_width))

    def load(self) -> None:
        """Read the full file and copy it into the engine's tensors."""
        config = self.config
        # In half precision the engine has states already, and the file has the parameters in both dtypes.
        width = config.master_width + (config.width if self.half else 0)
        loaded = [Storage(self.memory.host, LOADED, self.elements * width)]
        for numel in self.numels:
            loaded += self.read_states(numel, reused=self.memory.on_cpu and not self.half)
        if not self.has_states:
            self._make_states()
        del loaded

    def _make_states(self) -> None:
        self.has_states = True
        self.keep_codebooks()
        self.keep(self.memory.device, OPTIMIZER_STATES, sum(map(self.config.state_bytes, self.numels)))
