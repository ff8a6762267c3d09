"""Simulation of a rank's lifecycle: build the model and the engine, train a step, save a checkpoint, resume.

The simulated engine is the `ParameterHooks` of the simulated network: the network calls it before and after every
module, so DeepSpeed's allocations and the network's interleave as in a real run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..common.phases import Phase, Tier
from ..config.run_config import RunConfig
from .core import MemoryTracker, ModuleParams, ParameterHooks, Peak, RankMemory, Storage
from .engine.base import SIMULATED_MICRO_BATCHES, EngineConfig, SimulatedEngine
from .engine.fsdp2 import Fsdp2Engine
from .engine.stage0_1_2 import Stage0Engine, Stage12Engine
from .engine.stage3 import Stage3Engine
from .engine.wide_gradients import Bf16OptimizerEngine, WideGradientsEngine
from .network.group_share import GroupShare, largest_places
from .network.model import (
    MICRO_BATCHES,
    SimulatedNetwork,
    run_evaluation_pass,
    run_micro_batch,
    sample_bytes,
)
from .network.ops import DtypeSizes


@dataclass(frozen=True, slots=True)
class Simulation:
    """Result of a simulated lifecycle."""

    memory: RankMemory
    """The rank's tiers; with the events of a training step if they were recorded."""
    peaks: dict[tuple[Phase, Tier], Peak]
    """The peak of each phase on each tier."""
    saved_bytes: int
    """Bytes on the device that one micro-batch saves for backward."""


class _Order(ParameterHooks):
    """Record which parameters each module call of a training step needs."""

    def __init__(self, network: SimulatedNetwork) -> None:
        self.calls: list[tuple[int, ...]] = []
        self._numbers: dict[int, tuple[int, ...]] = {}
        first = 0
        for weights in network.modules:
            self._numbers[id(weights)] = tuple(range(first, first + len(weights.numels)))
            first += len(weights.numels)

    def fetch(self, weights: ModuleParams, *, backward: bool) -> None:
        self.calls.append(self._numbers[id(weights)])

    def gradients(self, weights: ModuleParams, grads: list[Storage]) -> None:
        grads.clear()


def _engine(memory: RankMemory, config: EngineConfig, network: SimulatedNetwork) -> SimulatedEngine:
    zero = config.zero
    if zero.uses_fsdp2:
        return Fsdp2Engine(memory, config, network)
    if zero.stage == 0:
        return Stage0Engine(memory, config, network)
    if zero.stage < 3:
        if config.sums_all_gradients:
            return Bf16OptimizerEngine(memory, config, network)
        return (WideGradientsEngine if config.widens_gradients else Stage12Engine)(memory, config, network)
    if not (zero.prefetch_bucket_elements or zero.max_reuse_distance_elements):
        return Stage3Engine(memory, config, network)
    order = _Order(network)
    scratch = MemoryTracker()
    run_micro_batch(network, scratch, order, scratch.phase)
    return Stage3Engine(memory, config, network, order.calls)


def _share(run: RunConfig, memory: RankMemory, rank: int | None, place: int | None) -> GroupShare | None:
    """Return the rank's part in its group; None without relation parallelism."""
    ranks, geometry = run.parallel.relation, run.model.geometry
    if ranks == 1:
        return None
    if place is None:
        place = largest_places(geometry, ranks)[0] if rank is None else rank % ranks
    return GroupShare(geometry, ranks, place, memory.uses_gloo)


def simulate(
    run: RunConfig,
    *,
    record: bool = False,
    threads: int = 1,
    rank: int | None = None,
    rehearsed: bool = False,
    place: int | None = None,
) -> Simulation:
    """Simulate the lifecycle of a rank.

    Args:
        run: what is trained, where and how.
        record: store every event of the training step.
        threads: CPU threads of a rank.
        rank: number of the rank; None is the rank that holds the most.
        rehearsed: the rank runs alone on a CPU instead of its own device, as in `translution rehearse`.
        place: the rank's place in a group that shares out the relations; None is that of the number or, without one,
            the first of `largest_places`.
    """
    training, cluster = run.training, run.cluster
    sizes = DtypeSizes.of_run(run, threads)
    if rehearsed:
        # Products that are not computed need no scratch; the operator runs as on the device that it stands for.
        own = DtypeSizes.of_training(training, "cpu", threads, packs=False, stage=run.zero.stage)
        sizes = replace(own, batched=sizes.batched, copies_products=sizes.copies_products)
    config = EngineConfig(run, rank)
    memory = RankMemory("cpu" if rehearsed else cluster.device, record=record, alone=rehearsed)
    share, loss = _share(run, memory, rank, place), training.loss_kind
    network = SimulatedNetwork(run.model, training.micro_batch, sizes, run.tile_relations, loss=loss, share=share)
    network.host = memory.host
    engine = _engine(memory, config, network)
    with memory.phase(Phase.INIT):
        engine.build()
    # Loading allocates the optimizer states, so every step finds them.
    with memory.phase(Phase.RESUME):
        engine.load()
    engine.start_training()
    samples = training.micro_batch * training.gradient_accumulation_steps * sample_bytes(run.model, training.loss_kind)
    batches = Storage(memory.host, MICRO_BATCHES, samples)
    with memory.phase(Phase.BETWEEN):
        pass
    saved_bytes = 0
    del batches
    others = Storage(memory.host, MICRO_BATCHES, samples - network.shared_batch_bytes)
    for _ in range(min(training.gradient_accumulation_steps, SIMULATED_MICRO_BATCHES)):
        saved_bytes = run_micro_batch(network, memory.device, engine, memory.phase)
    del others
    batches = Storage(memory.host, MICRO_BATCHES, samples)
    if engine.creates_states_aside:
        with memory.phase(Phase.FIRST_STEP):
            engine.step(first=True)
    with memory.phase(Phase.STEP):
        engine.step()
    del batches
    with memory.phase(Phase.SAVE):
        engine.save()
    peaks = {(Phase(phase), tier): peak for tier, m in memory.tiers.items() for phase, peak in m.peaks.items() if phase}
    for tier in memory.tiers:
        # A resumed run builds its engine too: its peak is the higher of the two. The first step is a step.
        for phase, included in ((Phase.RESUME, Phase.INIT), (Phase.FIRST_STEP, Phase.STEP)):
            both = [peaks[name, tier] for name in (included, phase) if (name, tier) in peaks]
            peaks[phase, tier] = max(both, key=lambda peak: peak.total_bytes)
    return Simulation(memory, peaks, saved_bytes)


def simulate_evaluation(run: RunConfig, batch: int, rank: int | None = None, *, place: int | None = None) -> Simulation:
    """Simulate the evaluation of one batch by a rank that has trained a step.

    Args:
        run: what is trained, where and how.
        batch: samples of the rank in one pass.
        rank: number of the rank; None is the rank that holds the most.
        place: as in `simulate`.
    """
    sizes = DtypeSizes.of_run(run)
    memory = RankMemory(run.cluster.device)
    share = _share(run, memory, rank, place)
    network = SimulatedNetwork(run.model, batch, sizes, run.tile_relations, loss=run.training.loss, share=share)
    network.host = memory.host
    engine = _engine(memory, EngineConfig(run, rank), network)
    engine.build()
    engine.load()
    engine.start_training()
    engine.step()
    with memory.phase(Phase.EVALUATION):
        others = batch * sample_bytes(run.model) - network.shared_batch_bytes
        samples = Storage(memory.host, MICRO_BATCHES, others)
        run_evaluation_pass(network, memory.device, engine)
        del samples
    peaks = {(Phase.EVALUATION, tier): tracker.peaks[Phase.EVALUATION] for tier, tracker in memory.tiers.items()}
    return Simulation(memory, peaks, 0)
