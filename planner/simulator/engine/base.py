"""What every twin of a DeepSpeed engine shares: the setting, the names of what it holds, and its life.

A twin of an engine is the `ParameterHooks` of a replayed step, and has the phases around it: building,
the first step, which makes the optimizer's moments, later steps, saving and resuming. It says which tier
holds what and when; stage 3 is in zero3_twin.py, the others in zero_twin.py.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from ...config.training import DTYPE_BYTES, TrainingSpec
from ...config.zero import ZeroSpec
from ...costs.optimizer_state import moments, temporary_tensors, widths
from ...run_config import RunConfig
from ..core.autograd import ParameterHooks
from ..core.storage import MemoryTracker, Storage
from ..core.tiers import RankMemory
from ..network.model import SimulatedNetwork

PARAMETERS, PERSISTENT, BUFFERS = "parameters", "persistent parameters", "buffers"
MASTER_PARAMETERS, OPTIMIZER_STATES = "master parameters", "optimizer states"
SHARED_GRADIENTS, STEP_GRADIENTS = "gradients", "fp32 gradients"
BUCKET = "reduce bucket"
GATHERED, GATHER_COPIES = "gathered parameters", "copies of the gather"
REDUCE_COPIES, BACKEND_COPIES = "copies of the reduction", "copies of the CPU backend"
OPTIMIZER_TEMPORARIES, NORM = "optimizer temporaries", "gradient norm"
CONSTRUCTION_TENSORS, STAGING, LOADED = "construction", "host staging", "loaded checkpoint"
OPTIMIZER_SWAP_BUFFERS, PARAM_SWAP_BUFFERS = "optimizer swap buffers", "parameter swap buffers"
SUB_GROUP_BUFFER = "sub-group swap buffer"
STREAMS = "other streams"
OFFLOAD_COPIES, FIRST_COPIES = "offload copies", "first pinned copies"

NORM_BYTES = 8
"""Gradients are squared in fp64."""
SIMULATED_MICRO_BATCHES = 2
"""Of those that are accumulated: later ones do what the second does."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine runs under."""

    run: RunConfig
    rank: int | None = None
    """Number of the rank; None is the rank that holds the most."""

    @property
    def training(self) -> TrainingSpec:
        """Precision, batch and optimizer."""
        return self.run.training

    @property
    def zero(self) -> ZeroSpec:
        """ZeRO stage, offload and knobs."""
        return self.run.zero

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.run.world_size

    @property
    def width(self) -> int:
        """Bytes of a parameter."""
        return self.training.dtype_bytes

    @property
    def accumulation_width(self) -> int:
        """Bytes of an accumulated gradient."""
        return DTYPE_BYTES[self.training.accumulation_dtype]

    @property
    def master_width(self) -> int:
        """Bytes of an element of the master copy."""
        return widths(self.training)[0]

    @property
    def state_width(self) -> int:
        """Bytes of all moments of an element."""
        return widths(self.training)[1] * moments(self.training)


class SimulatedEngine(ParameterHooks):
    """The part that all stages have in common.

    Args:
        memory: the rank's.
        setting: what it runs under.
        network: the parameters, module by module.
    """

    def __init__(self, memory: RankMemory, config: EngineConfig, network: SimulatedNetwork) -> None:
        self.memory, self.config, self.network = memory, config, network
        self.kept: list[Storage] = []
        """What lives as long as the engine."""
        self.passes = 0
        """Backward passes since the last optimizer step."""

    def keep(self, memory: MemoryTracker, what: str, size: int) -> Storage | None:
        """Allocate for the engine's life; nothing for no bytes."""
        if not size:
            return None
        storage = Storage(memory, what, size)
        self.kept.append(storage)
        return storage

    @property
    def offloaded(self) -> bool:
        """Whether the host's own optimizer updates."""
        return self.config.zero.offload_optimizer.device != "none"

    def update(self, numel: int, *, offloaded: bool, one_by_one: bool = False) -> None:
        """The optimizer's update of so many elements, or of parameters with at most so many."""
        count = temporary_tensors(self.config.training, offloaded=offloaded, one_by_one=one_by_one)
        piece = (self.memory.device, OPTIMIZER_TEMPORARIES, numel * self.config.master_width)
        self.memory.add_transient(*[piece] * count)

    @abstractmethod
    def build(self) -> None:
        """The model and the engine are made."""

    @abstractmethod
    def step(self, *, first: bool = False) -> None:
        """The optimizer step, when the moments exist; the first one also passes through where it makes them."""

    @abstractmethod
    def save(self) -> None:
        """The checkpoint is written."""

    @abstractmethod
    def load(self) -> None:
        """A checkpoint is read into the engine that has just been built: it has moments then."""

    def finish(self) -> None:
        """A backward pass is over."""
        self.passes += 1

    @property
    def accumulates(self) -> bool:
        """Whether another micro-batch follows the one that runs before the optimizer step."""
        return self.passes + 1 < min(self.config.training.gradient_accumulation_steps, SIMULATED_MICRO_BATCHES)
