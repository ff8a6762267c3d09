"""Twin of DeepSpeed's engine at ZeRO stages 1 and 2, with or without the optimizer on the host.

Source: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py, function by function, and traces of torch's
allocator on CPU ranks.
"""

from __future__ import annotations

from itertools import accumulate

from ...common.units import FP32_BYTES
from ..core.autograd import ModuleParams
from ..core.storage import Storage
from ..core.tiers import RankMemory
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
    SHARED_GRADIENTS,
    STAGING,
    STEP_GRADIENTS,
    EngineConfig,
    SimulatedEngine,
)
from .partition import ceil_div

START_ALIGNMENT = 2
"""Flat buffers hold a multiple of twice the ranks (stage_1_and_2.py, ``nccl_start_alignment_factor``)."""


def make_whole_model(twin: SimulatedEngine, elements: int) -> None:
    """Build the model whole in fp32 on the host, cast it there, and move it to the device."""
    memory, width = twin.memory, twin.config.width
    memory.at("construction")
    twin.keep(memory.device, BUFFERS, twin.network.buffer_bytes)
    made = Storage(memory.host, CONSTRUCTION_TENSORS, elements * FP32_BYTES)
    cast = made if width == FP32_BYTES else Storage(memory.host, CONSTRUCTION_TENSORS, elements * width)
    del made
    moved = None if memory.on_cpu else Storage(memory.device, CONSTRUCTION_TENSORS, elements * width)
    del cast, moved


class Stage12Engine(SimulatedEngine):
    """Stages 1 and 2: states are cut into shares of one flat buffer, at stage 2 gradients too.

    Args:
        memory, setting, network: as in `SimulatedEngine`.
    """

    def __init__(self, memory: RankMemory, config: EngineConfig, network: SimulatedNetwork) -> None:
        super().__init__(memory, config, network)
        self.numels: list[int] = []
        self.first: dict[int, int] = {}
        """Number of the first parameter of each module."""
        for weights in network.modules:
            self.first[id(weights)] = len(self.numels)
            self.numels += weights.numels
        unit = START_ALIGNMENT * config.world_size
        self.elements = sum(self.numels)
        self.flat = ceil_div(self.elements, unit) * unit
        self.share = self.flat // config.world_size
        self.cuts = config.zero.stage == 2
        self.home = memory.host if self.offloaded else memory.device
        self.bucket: Storage | None = None
        self.ends = list(accumulate(self.numels))
        self.in_bucket: list[int] = []
        """Numbers of the parameters whose gradients wait to be reduced."""
        self.part: Storage | None = None
        """What a rank has of the gradients of the micro-batch that runs."""
        self.averaged: Storage | None = None
        self.waiting: dict[int, list[Storage]] = {}
        """Whole gradients by module, at stage 1."""

    def build(self) -> None:
        """The flat copy is made beside the model; then the optimizer's share of it is widened."""
        memory, config = self.memory, self.config
        make_whole_model(self, self.elements)
        memory.at("flat parameters")
        # The parameters wait on the host while the flat buffer is made there.
        parts = Storage(memory.host, CONSTRUCTION_TENSORS, self.elements * config.width)
        flat = Storage(memory.host, PARAMETERS if memory.on_cpu else STAGING, self.flat * config.width)
        self.kept.append(flat if memory.on_cpu else Storage(memory.device, PARAMETERS, self.flat * config.width))
        del parts, flat
        memory.at("master parameters")
        clone = Storage(memory.device, CONSTRUCTION_TENSORS, self.share * config.width)
        self._keep_pinned(MASTER_PARAMETERS, self.share * config.master_width)
        del clone
        memory.at("optimizer states")
        if self.offloaded:
            self._keep_pinned(STEP_GRADIENTS, self.share * config.master_width)
        else:
            memory.add_transient((memory.device, STEP_GRADIENTS, self.share * config.master_width))
        if self.offloaded:
            self._make_offload_copies()

    def _keep_pinned(self, what: str, size: int) -> None:
        pinned = self.offloaded and self.config.zero.offload_optimizer.pin_memory and not self.memory.on_cpu
        if pinned:
            plain = Storage(self.memory.host, STAGING, size)
            self.kept.append(self.memory.pin(what, size))
            del plain
        else:
            self.keep(self.home, what, size)

    def _make_offload_copies(self) -> None:
        """Buffers through which gradients of the largest parameter and the share of parameters pass."""
        memory, config = self.memory, self.config
        largest = max(self.numels)
        self.kept.append(memory.pin(OFFLOAD_COPIES, self.share * config.width))
        self.kept.append(memory.pin(OFFLOAD_COPIES, largest * config.width))
        self.keep(memory.device, OFFLOAD_COPIES, largest * config.width)

    # One training step.

    def gradients(self, weights: ModuleParams, grads: list[Storage]) -> None:
        """Stage 2 reduces them bucket by bucket, stage 1 when backward is over."""
        if self.bucket is None:
            size = self.config.zero.reduce_bucket_elements * self.config.width
            # A second one is filled while the first is reduced on another stream.
            double = self.config.zero.overlap_comm and not self.memory.on_cpu
            self.bucket = Storage(self.memory.device, BUCKET, size * (1 + double))
        if not self.cuts:
            # Those of a later micro-batch are added to the first ones.
            self.waiting.setdefault(id(weights), list(grads))
            grads.clear()
            return
        self._fill(weights, grads)

    def _fill(self, weights: ModuleParams, grads: list[Storage]) -> None:
        """Copy gradients into the bucket, one by one, and reduce it when the next does not fit."""
        for offset, numel in enumerate(weights.numels):
            waiting = sum(self.numels[number] for number in self.in_bucket)
            if waiting + numel > self.config.zero.reduce_bucket_elements:
                self._reduce()
            self.in_bucket.append(self.first[id(weights)] + offset)
            grads.pop(0)

    def _reduce(self) -> None:
        """The bucket's sum over ranks; a rank's own part is copied from it."""
        memory, config = self.memory, self.config
        if self.offloaded:
            # Each gradient is squared in fp64 on its way to the host.
            largest = max((self.numels[number] for number in self.in_bucket), default=0)
            memory.add_transient((memory.device, NORM, largest * NORM_BYTES))
        owns = config.rank is None or any(config.rank in self.owners(number) for number in self.in_bucket)
        self.in_bucket.clear()
        if self.part is None and owns and not self.offloaded:
            self.part = Storage(memory.device, SHARED_GRADIENTS, self.overlapping * config.width)

    def owners(self, number: int) -> range:
        """The ranks that a parameter's elements belong to."""
        end = self.ends[number]
        return range((end - self.numels[number]) // self.share, (end - 1) // self.share + 1)

    @property
    def overlapping(self) -> int:
        """Elements of all parameters of which a part belongs to the rank, or to the rank with the most."""
        held = [0] * self.config.world_size
        for number, numel in enumerate(self.numels):
            for rank in self.owners(number):
                held[rank] += numel
        return max(held) if self.config.rank is None else held[self.config.rank]

    def finish(self) -> None:
        """Stage 2 adds its part to that of earlier micro-batches; stage 1 reduces when all are there."""
        if self.cuts or not self.accumulates:
            self.memory.at("reduction")
            if self.waiting and self.config.rank is None and self.part is None:
                # The first rank's part is made when all gradients are whole.
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
        if self.averaged is None and self.config.accumulation_width == self.config.width:
            self.averaged = self.part
        elif self.averaged is None and self.part is not None:
            size = self.part.size // self.config.width * self.config.accumulation_width
            self.averaged = Storage(self.memory.device, SHARED_GRADIENTS, size)
        self.part = None

    # The optimizer step, and checkpoints.

    def step(self, *, first: bool = False) -> None:
        """The share of the flat buffer is updated at once."""
        self.memory.at("optimizer step")
        self.passes = 0
        config = self.config
        if self.offloaded:
            if first and config.training.gradient_accumulation_steps > 1:
                # Made by the first backward pass: where the host adds micro-batches up.
                self._keep_pinned(SHARED_GRADIENTS, self.overlapping * config.width)
            self.update(self.share, offloaded=True)
            self._gather_parameters()
            return
        joined = Storage(self.memory.device, STEP_GRADIENTS, self.share * config.accumulation_width)
        grads = joined
        if config.accumulation_width != config.master_width:
            grads = Storage(self.memory.device, STEP_GRADIENTS, self.share * config.master_width)
        del joined
        self.averaged = None
        self.update(self.share, offloaded=False)
        del grads
        self._gather_parameters()

    def _gather_parameters(self) -> None:
        """Ranks exchange what each has updated, in place; gloo in a tensor of its own."""
        if self.memory.uses_gloo:
            self.memory.add_transient((self.memory.device, BACKEND_COPIES, self.flat * self.config.width))

    def save(self) -> None:
        """Tensors on a device are copied to the host storage by storage."""
        self.memory.at("checkpoint save")
        if not self.memory.on_cpu and not self.offloaded:
            self.memory.add_transient((self.memory.host, STAGING, self.share * FP32_BYTES))

    def load(self) -> None:
        """A rank reads its own file whole, and copies it into what the engine has made."""
        self.memory.at("resume")
        config = self.config
        # Moments that stay on the host are those that were read.
        width = config.master_width + (0 if self.home is self.memory.host else config.state_width)
        loaded = Storage(self.memory.host, LOADED, self.share * width)
        self.keep(self.home, OPTIMIZER_STATES, self.share * config.state_width)
        if config.rank in (None, config.world_size - 1) and self.flat > self.elements:
            # The last rank's share was saved without its padding, and is copied to be padded.
            self.memory.add_transient((self.memory.host, LOADED, self.share * config.master_width))
        del loaded
