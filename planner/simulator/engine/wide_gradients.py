"""Simulation of DeepSpeed's ZeRO stages 1 and 2 in bf16 or fp16 with gradients that are accumulated in fp32.

Sources: DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py (`_use_compact_grad_partition_buffer` and the functions that
ask it), runtime/bf16_optimizer.py, and measurements of CPU ranks.
"""

from __future__ import annotations

from ..core import ModuleParams, Storage
from .base import (
    CONSTRUCTION_TENSORS,
    MASTER_PARAMETERS,
    PARAMETERS,
    REDUCE_COPIES,
    SHARED_GRADIENTS,
    STEP_GRADIENTS,
)
from .stage0_1_2 import Stage12Engine, make_full_model


class WideGradientsEngine(Stage12Engine):
    """Every reduction adds the rank's part of a bucket to one fp32 buffer as large as the rank's partition.

    The buffer is on the device also if the optimizer is offloaded. At stage 1 gradients wait for their reduction in
    fp32, and those of other ranks keep the last bucket until the next forward pass.

    Args:
        memory, config, network: as in `SimulatedEngine`.
    """

    def gradients(self, weights: ModuleParams, grads: list[Storage]) -> None:
        """At stage 1 convert each gradient; at stage 2 reduce gradients bucket by bucket."""
        if self.partitions_gradients:
            super().gradients(weights, grads)
            return
        device, wide = self.memory.device, self.config.accumulation_width
        if self.bucket is None:
            self.bucket = self.make_bucket(wide)
        waiting = self.waiting.setdefault(id(weights), [])
        for number, numel in enumerate(weights.numels):
            converted = Storage(device, grads[0].what, numel * wide)
            if number == len(waiting):
                waiting.append(converted)
            del converted
            grads.pop(0)

    def _reduce(self) -> None:
        memory, config = self.memory, self.config
        own = [number for number in self.in_bucket if config.replica is None or config.replica in self.owners(number)]
        if own and self.accumulated is None:
            size = self.partition_numel * config.accumulation_width
            self.accumulated = Storage(memory.device, SHARED_GRADIENTS, size)
        elements = sum(self.numels[number] for number in self.in_bucket)
        narrow, wide = config.width, config.accumulation_width
        joined = None
        if self._slices() > 1:
            joined = Storage(memory.device, REDUCE_COPIES, elements * (narrow if self.partitions_gradients else wide))
        if not self.partitions_gradients:
            # What ranks send has the parameters' dtype.
            joined = Storage(memory.device, REDUCE_COPIES, elements * narrow)
        largest = max((self.numels[number] for number in own), default=0)
        memory.add_transient((memory.device, REDUCE_COPIES, largest * wide))
        del joined
        self.note_norms(own)
        self.in_bucket.clear()

    def _slices(self) -> int:
        """Return into how many tensors the bucket is divided, which the reduction joins again.

        Each parameter that the rank owns has its own; others are together as long as the same rank owns them.
        """
        count, before = 0, None
        for owner in (owner for number in self.in_bucket for owner in self.owners(number)):
            own = self.config.replica is None or owner == self.config.replica
            count += own or owner != before
            before = owner
        return count

    def _add_part(self) -> None:
        """Every reduction has added it."""

    def start_training(self) -> None:
        """Accumulate nothing on the host."""

    def finish(self) -> None:
        """Reduce what is left; at stage 1 keep the bucket."""
        bucket = None if self.partitions_gradients else self.bucket
        super().finish()
        self.bucket = self.bucket or bucket

    def step(self, *, first: bool = False) -> None:
        """Update the rank's partition from the buffer, whose memory the host's copy of it does not replace."""
        self.memory.at("optimizer step")
        self.passes = 0
        config = self.config
        if self.offloaded:
            self.update(self.partition_numel, offloaded=True)
            self.accumulated = None
        else:
            grads = self.accumulated
            if config.accumulation_width != config.master_width:
                grads = Storage(self.memory.device, STEP_GRADIENTS, self.partition_numel * config.master_width)
            self.accumulated = None
            self.update(self.partition_numel, offloaded=False)
            del grads
        self._gather_parameters()
        self.bucket = None


class Bf16OptimizerEngine(Stage12Engine):
    """Stage 1 in bf16 without offload: every rank adds all gradients to a flat fp32 buffer of all parameters.

    Args:
        memory, config, network: as in `SimulatedEngine`.
    """

    def build(self) -> None:
        """Join the parameters on the device, copy the rank's partition to the master dtype, and allocate the buffer."""
        memory, config = self.memory, self.config
        make_full_model(self, self.elements)
        memory.at("flat parameters")
        parts = Storage(memory.device, CONSTRUCTION_TENSORS, self.elements * config.width)
        self.keep(memory.device, PARAMETERS, self.flat * config.width)
        del parts
        memory.at("master parameters")
        clone = Storage(memory.device, CONSTRUCTION_TENSORS, self.partition_numel * config.width)
        self.keep(memory.device, MASTER_PARAMETERS, self.partition_numel * config.master_width)
        del clone
        self.keep(memory.device, SHARED_GRADIENTS, self.flat * config.accumulation_width)

    def gradients(self, weights: ModuleParams, grads: list[Storage]) -> None:
        """Keep the full gradients until the step; those of later micro-batches are added to them."""
        if not weights.grads:
            weights.grads = list(grads)
        grads.clear()

    def finish(self) -> None:
        """Add the gradients to the buffer one by one; reduce it in the parameters' dtype after the last micro-batch."""
        memory, config = self.memory, self.config
        memory.at("reduction")
        memory.add_transient((memory.device, REDUCE_COPIES, max(self.numels) * config.accumulation_width))
        if not self.accumulates:
            memory.add_transient((memory.device, REDUCE_COPIES, self.flat * config.width))
        self.passes += 1

    def step(self, *, first: bool = False) -> None:
        """Update the rank's partition from its part of the buffer."""
        self.memory.at("optimizer step")
        self.passes = 0
        self.update(self.partition_numel, offloaded=False)
        self._gather_parameters()
        for weights in self.network.modules:
            weights.grads = []
