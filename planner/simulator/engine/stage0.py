"""Simulation of DeepSpeed's engine at ZeRO stage 0: every rank holds all parameters, gradients and states.

Source: DeepSpeed 0.19.8, runtime/engine.py (`buffered_allreduce_fallback`) and
runtime/fp16/unfused_optimizer.py, and traces of torch's allocator on CPU ranks.
"""

from __future__ import annotations

from ..core.autograd import ModuleParams
from ..core.storage import Storage
from ..core.tiers import RankMemory
from ..network.model import SimulatedNetwork
from .base import (
    LOADED,
    MASTER_PARAMETERS,
    OPTIMIZER_STATES,
    PARAMETERS,
    REDUCE_COPIES,
    STAGING,
    STEP_GRADIENTS,
    EngineConfig,
    SimulatedEngine,
)
from .stage1_2 import make_full_model


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
        # States on the host are the storages that were read, so they count once. In half precision the engine has
        # states already, and the file has the parameters in both dtypes.
        width = config.master_width + (0 if self.memory.on_cpu and not self.half else config.state_width)
        width += config.width if self.half else 0
        loaded = Storage(self.memory.host, LOADED, self.elements * width)
        if not self.has_states:
            self._make_states()
        del loaded

    def _make_states(self) -> None:
        self.has_states = True
        self.keep(self.memory.device, OPTIMIZER_STATES, self.elements * self.config.state_width)
