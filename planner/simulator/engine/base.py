"""Base of the simulated DeepSpeed engines: configuration, category names and the phases of the lifecycle.

A simulated engine is the `ParameterHooks` of the training step, and simulates the phases around it: build, first step
(which allocates the optimizer states), later steps, checkpoint save and resume. It decides which tier holds what and
when. The ZeRO stages are in stage0_1_2.py and stage3.py.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from ...common.types import DTYPE_BYTES
from ...config.run_config import RunConfig
from ...config.training import TrainingSpec
from ...config.zero import ZeroSpec
from ...costs.optimizer import CODEBOOK_BYTES, state_bytes, temporary_tensors, widths
from ..core import BACKEND_COPIES as BACKEND_COPIES
from ..core import MemoryTracker, ParameterHooks, RankMemory, Storage
from ..network.model import SimulatedNetwork

PARAMETERS, PERSISTENT, BUFFERS = "parameters", "persistent parameters", "buffers"
MASTER_PARAMETERS, OPTIMIZER_STATES = "master parameters", "optimizer states"
SHARED_GRADIENTS, STEP_GRADIENTS = "gradients", "fp32 gradients"
BUCKET = "reduce bucket"
SECONDARY = "second copy of the parameters"
GATHERED, GATHER_COPIES = "gathered parameters", "copies of the gather"
REDUCE_COPIES = "copies of the reduction"
OPTIMIZER_TEMPORARIES, NORM = "optimizer temporaries", "gradient norm"
CONSTRUCTION_TENSORS, STAGING, LOADED = "construction", "host staging", "loaded checkpoint"
OPTIMIZER_SWAP_BUFFERS, PARAM_SWAP_BUFFERS = "optimizer swap buffers", "parameter swap buffers"
SUB_GROUP_BUFFER = "sub-group swap buffer"
STREAMS = "other streams"
OFFLOAD_COPIES, FIRST_COPIES = "offload copies", "first pinned copies"

NORM_BYTES = 8
"""Bytes of a gradient element while the norm is computed: gradients are squared in fp64."""
SIMULATED_MICRO_BATCHES = 2
"""Maximum number of accumulated micro-batches that are simulated: later ones allocate what the second does."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Configuration of an engine."""

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
    def replicas(self) -> int:
        """Ranks over which ZeRO partitions: all, or with relation parallelism those that own the same relations."""
        return self.run.replicas

    @property
    def replica(self) -> int | None:
        """Number of the rank among them; None is the one that holds the most."""
        return None if self.rank is None else self.rank // self.run.parallel.relation

    @property
    def owns_alone(self) -> bool:
        """Whether no other rank owns the relations of this one, so that ZeRO has nothing to partition over."""
        return self.run.parallel.relation > 1 and self.replicas == 1

    @property
    def width(self) -> int:
        """Bytes of a parameter element."""
        return self.training.dtype_bytes

    @property
    def accumulation_width(self) -> int:
        """Bytes of an accumulated gradient element."""
        return DTYPE_BYTES[self.training.accumulation_dtype]

    @property
    def widens_gradients(self) -> bool:
        """Whether gradients are accumulated in a wider dtype than that of the parameters."""
        return self.accumulation_width > self.width

    @property
    def sums_all_gradients(self) -> bool:
        """Whether each rank adds all gradients to a flat fp32 buffer: ZeRO-1 in bf16 without offload does.

        Source: DeepSpeed 0.19.8, `DeepSpeedEngine._do_optimizer_sanity_check` and runtime/bf16_optimizer.py.
        """
        in_place = self.zero.offload_optimizer.device == "none"
        return self.widens_gradients and self.zero.stage == 1 and self.training.precision == "bf16" and in_place

    @property
    def master_width(self) -> int:
        """Bytes of a master parameter element."""
        return widths(self.training)[0]

    def state_bytes(self, numel: int) -> int:
        """Return the bytes of the optimizer states of a tensor that is updated at once."""
        return state_bytes(self.training, numel)


class SimulatedEngine(ParameterHooks):
    """What the engines of all ZeRO stages share.

    Args:
        memory: the rank's memory.
        config: the engine's configuration.
        network: gives the parameters, module by module.
    """

    def __init__(self, memory: RankMemory, config: EngineConfig, network: SimulatedNetwork) -> None:
        self.memory, self.config, self.network = memory, config, network
        self.averages_over_group = config.run.parallel.relation > 1
        self.resident: list[Storage] = []
        """Storages that live as long as the engine."""
        self.passes = 0
        """Backward passes since the last optimizer step."""

    def keep(self, memory: MemoryTracker, what: str, size: int) -> Storage | None:
        """Allocate a storage that lives as long as the engine; None if ``size`` is 0."""
        if not size:
            return None
        storage = Storage(memory, what, size)
        self.resident.append(storage)
        return storage

    def keep_states(self, memory: MemoryTracker, numel: int) -> None:
        """Allocate the optimizer states of a tensor that is updated at once."""
        self.keep(memory, OPTIMIZER_STATES, self.config.state_bytes(numel))

    def keep_codebooks(self) -> None:
        """Allocate what all quantized states share."""
        if self.config.training.quantizes_states:
            self.keep(self.memory.device, OPTIMIZER_STATES, CODEBOOK_BYTES)

    def read_states(self, numel: int, *, reused: bool) -> list[Storage]:
        """Return what loading the states of a tensor takes on the host in addition to the states themselves.

        Args:
            numel: elements of the tensor.
            reused: whether the engine keeps the storages that were read, which count once.
        """
        size = self.config.state_bytes(numel)
        if self.config.training.quantizes_states:
            # bitsandbytes copies what was read, and keeps the copy where the engine has no states yet.
            return [Storage(self.memory.host, LOADED, size if reused else 2 * size)]
        return [] if reused else [Storage(self.memory.host, LOADED, size)]

    @property
    def offloaded(self) -> bool:
        """Whether the optimizer is offloaded: it updates on the host."""
        return self.config.zero.offload_optimizer.device != "none"

    def update(self, numel: int, *, offloaded: bool, one_by_one: bool = False) -> None:
        """Allocate and free the temporaries of one optimizer update of ``numel`` elements.

        Args:
            numel: elements of the update; of the largest parameter if parameters are updated one by one.
            offloaded: whether the host updates.
            one_by_one: whether parameters are updated in a loop.
        """
        backup = self.offloaded and not offloaded
        count = temporary_tensors(
            self.config.training,
            on_cpu=self.memory.on_cpu,
            offloaded=offloaded,
            one_by_one=one_by_one,
            backup=backup,
        )
        piece = (self.memory.device, OPTIMIZER_TEMPORARIES, numel * self.config.master_width)
        self.memory.add_transient(*[piece] * count)

    @abstractmethod
    def build(self) -> None:
        """Build the model and the engine."""

    def start_training(self) -> None:
        """Allocate what the first backward pass creates for the rest of the run."""

    creates_states_aside: bool = False
    """Whether the first step creates the optimizer states in a memory other than the one that keeps them."""

    @abstractmethod
    def step(self, *, first: bool = False) -> None:
        """Run the optimizer step, whose states exist; `first` adds what creates them aside, and keeps the gradients."""

    @abstractmethod
    def save(self) -> None:
        """Save a checkpoint."""

    @abstractmethod
    def load(self) -> None:
        """Load a checkpoint into the engine that was just built; this allocates the optimizer states."""

    def finish(self) -> None:
        """Count a finished backward pass."""
        self.passes += 1

    @property
    def accumulates(self) -> bool:
        """Whether another micro-batch follows the current one before the optimizer step."""
        return self.passes + 1 < min(self.config.training.gradient_accumulation_steps, SIMULATED_MICRO_BATCHES)
