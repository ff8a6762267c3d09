"""`Searcher` ranks thousands of candidates by closed forms and simulates only those that it would choose.

`plan_search.search_plan` is the entry point. A candidate is a ZeRO stage with an offload mode (a strategy), a number
of nodes, a batch split, a tile size, a checkpointing mode and a knob set; `Capacity` is the memory that it must fit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from ..common.errors import InputError
from ..common.progress import OnProgress, ignore_progress
from ..config.model import ModelSpec
from ..config.parallel import ParallelSpec
from ..config.run_config import RunConfig
from ..config.training import TrainingSpec
from ..config.zero import ZeroSpec
from ..costs.workload import Volumes
from ..deepspeed.config import check_training_state
from ..hardware.cluster import ClusterSpec
from ..memory.bounds import BatchBound, MemoryUpperBound, WeightsBound, add_bounds
from ..memory.estimate import estimate_memory
from ..memory.upper_bound import bound_batch, bound_weights
from ..plans.build import check_data
from ..plans.defaults import override_zero
from ..timing.engine_time import PartTime, engine_parts, weight_uses
from ..timing.rates import Rates
from ..timing.step_time import model_parts, run_volumes, total_seconds
from .candidate import Candidate, Capacity, with_nodes, writes_to_nvme
from .conflicts import check_constraints
from .relation_space import check_group_size, group_sizes, search_strategies, suits_group
from .space import (
    Checkpointing,
    SearchConstraints,
    Strategy,
    batches,
    knob_sets,
    node_counts,
    resolve_global_batch,
    tiles,
)

REPLAY_TOLERANCE = 1.25
"""Highest utilization by the upper bound at which a simulation may still fit: bounds are at most 25% too high."""
REPLAYS = 4
"""Maximum number of simulations of candidates that the upper bound rejects; each takes some hundredths of a second."""


class Searcher:
    """One search: its candidates, and the closest candidate of every strategy.

    Args:
        spec: the model; its checkpointing is replaced unless the constraints fix it.
        cluster: all available nodes.
        training: precision, optimizer and data; the search chooses its batch.
        constraints: what the user fixes.
        on_progress: called while candidates are collected, which takes nearly all of the time.

    Raises:
        InputError: if the constraints contradict one another, or the cluster lacks a rate.
    """

    def __init__(
        self,
        spec: ModelSpec,
        cluster: ClusterSpec,
        training: TrainingSpec,
        constraints: SearchConstraints,
        on_progress: OnProgress = ignore_progress,
    ) -> None:
        self.spec, self.cluster, self.training, self.constraints = spec, cluster, training, constraints
        check_constraints(constraints)
        check_group_size(spec, cluster, training, constraints)
        self.strategies, self.infeasible = search_strategies(spec, cluster, constraints)
        self.global_batch = resolve_global_batch(constraints, cluster)
        self.capacities: dict[int, Capacity] = {}
        """Capacity of a rank by number of nodes."""
        self.candidates: list[Candidate] = []
        self.considered = 0
        self._refused: list[InputError] = []
        """Why strategies contradict the training or one another, whatever the memory is."""
        self._knobs: dict[object, list[_KnobCosts]] = {}
        self.closest: dict[Strategy, Candidate] = {}
        """The candidate of each strategy with the lowest utilization."""
        check_data(spec, training, self.global_batch)
        if constraints.engine == "fsdp2":
            RunConfig(self._models()[0], cluster, training, ZeroSpec(engine="fsdp2"))
        # A wrong name or value of a knob is an error of the input, whatever the strategy.
        override_zero(ZeroSpec(), constraints.zero_overrides)
        self._collect(on_progress)

    def _models(self) -> list[ModelSpec]:
        modes: tuple[Checkpointing, ...] = ("none", "block", "offload")
        if self.constraints.checkpointing is not None:
            modes = (self.constraints.checkpointing,)
        elif self.cluster.device == "cpu" or self.training.torch_autocast or self.constraints.engine == "fsdp2":
            # A CPU rank computes in host memory, so that offloading activations to the host saves nothing; and
            # fairscale recomputes outside of autocast and hides a block from FSDP2.
            modes = modes[:2]
        return [
            self.spec if self.spec.checkpointing == mode else self.spec.model_copy(update={"checkpointing": mode})
            for mode in modes
        ]

    def _collect(self, on_progress: OnProgress) -> None:
        parts: list[tuple[Strategy, RunConfig, Rates]] = []
        for nodes in node_counts(self.cluster, self.constraints):
            cluster = with_nodes(self.cluster, nodes)
            self.capacities[nodes] = Capacity.of(cluster, self.constraints.headroom)
            rates = Rates(cluster, self.training.compute_precision)
            rates.check()
            for micro_batch, steps in batches(self.constraints, self.global_batch, cluster.world_size):
                update = {"micro_batch": micro_batch, "gradient_accumulation_steps": steps}
                training = self.training.model_copy(update=update)
                for model in self._models():
                    run = RunConfig(model, cluster, training, ZeroSpec())
                    parts += [(strategy, run, rates) for strategy in self.strategies]
        if not parts and self.strategies:
            raise InputError(
                f"global_batch: {self.global_batch} is not allowed: must be a multiple of the "
                f"{self.cluster.world_size} ranks, and of micro_batch and accumulation where they are given"
            )
        for number, part in enumerate(parts):
            on_progress(number, len(parts))
            self._try_strategy(*part)
        self._vary_groups(parts)
        if self._refused and not self.considered:
            raise self._refused[0]

    def _vary_groups(self, parts: list[tuple[Strategy, RunConfig, Rates]]) -> None:
        """Evaluate other sizes of relation groups: with the batch of the best plan of the first size, or with all.

        A simulation for each size, batch and checkpointing would take most of a search.
        """
        fitting = [one for one in self.candidates if one.strategy.relation and one.peak_utilization <= 1]
        best = min(fitting, key=lambda one: one.cost(self.constraints.minimize), default=None)
        for strategy, base, rates in parts:
            same = best is None or (
                base.training.micro_batch == best.run.training.micro_batch
                and base.model.checkpointing == best.run.model.checkpointing
            )
            if strategy.relation and same:
                self._try_strategy(strategy, base, rates, first=False)

    def _try_strategy(self, strategy: Strategy, base: RunConfig, rates: Rates, *, first: bool = True) -> None:
        """Evaluate the first group size, or the others, with every tile size and knob set of a strategy.

        Args:
            strategy: stage and offload.
            base: gives the rest of the configuration.
            rates: those of its cluster.
            first: whether to try the first size of a relation group, or all others.
        """
        if strategy in self.infeasible or (strategy.hpz and base.cluster.nodes == 1):
            return
        model, cluster = base.model, base.cluster
        sizes = group_sizes(model, cluster, self.constraints) if strategy.relation else [1]
        for group in sizes[:1] if first else sizes[1:]:
            if not suits_group(strategy, cluster.world_size // group, model.checkpointing, self.constraints):
                continue
            for tile in tiles(model, cluster.world_size, strategy.stage, self.constraints, group):
                run = base.replace(tile_relations=tile, parallel=ParallelSpec(relation=group))
                if not writes_to_nvme(run, strategy):
                    continue
                try:
                    self._try_tile(strategy, run, rates)
                except InputError as error:
                    self.infeasible[strategy] = str(error)
                    self._refused.append(error)
                    return

    def _try_tile(self, strategy: Strategy, base: RunConfig, rates: Rates) -> None:
        """Evaluate every knob set of a tile size.

        Raises:
            InputError: if the strategy contradicts the training or the user's overrides, or the cluster lacks a rate.
        """
        batch: BatchBound | None = None
        computed: Collection[PartTime] = ()
        for costs in self._knobs_of(strategy, base):
            run = RunConfig(base.model, base.cluster, base.training, costs.zero, base.tile_relations, base.parallel)
            batch = batch or bound_batch(run)
            computed = computed or model_parts(run, costs.volumes.tiles, rates).values()
            bounds = add_bounds(costs.weights(run), batch)
            seconds = total_seconds((*computed, *costs.parts(run, rates)))
            utilization = self._add(strategy, run, bounds, seconds)
            if utilization > REPLAY_TOLERANCE and costs.minimal_memory:
                # Every other knob set of this tile needs more memory.
                return

    def _knobs_of(self, strategy: Strategy, base: RunConfig) -> list[_KnobCosts]:
        """Return the knob sets of a strategy and its sizes, which all batches and ways of checkpointing share."""
        group = base.parallel.relation
        key = (base.cluster.nodes, strategy, base.tile_relations, group)
        if key not in self._knobs:
            found = list(knob_sets(base.model, base.tile_relations, strategy, base.cluster, self.constraints, group))
            check_training_state(base.training, found[0].zero, base.cluster.device)
            self._knobs[key] = [
                _KnobCosts(each.zero, each.minimal_memory, run_volumes(base.replace(zero=each.zero))) for each in found
            ]
        return self._knobs[key]

    def _add(self, strategy: Strategy, run: RunConfig, bounds: MemoryUpperBound, seconds: float) -> float:
        """Add a candidate, and return its peak utilization."""
        self.considered += 1
        utilization = self.capacities[run.cluster.nodes].peak_utilization(bounds)
        candidate = Candidate(strategy, run, seconds, seconds / run.global_batch, bounds, utilization)
        known = self.closest.get(strategy)
        if known is None or utilization < known.peak_utilization:
            self.closest[strategy] = candidate
        if utilization <= REPLAY_TOLERANCE:
            self.candidates.append(candidate)
        return utilization

    def fits(self, candidate: Candidate) -> bool:
        """True if the simulated candidate leaves the headroom on every tier."""
        prediction = estimate_memory(candidate.run)
        return self.capacities[candidate.nodes].simulated_utilization(prediction) <= 1

    def best(self) -> Candidate | None:
        """The best candidate by the objective whose simulation fits; None if there is none."""
        objective = self.constraints.minimize
        # Plans with and without relation groups have replays of their own: what one kind fails must not cost the other.
        replays, failed = {True: REPLAYS, False: REPLAYS}, set()
        for candidate in sorted(self.candidates, key=lambda candidate: candidate.cost(objective)):
            if candidate.peak_utilization > 1:
                if not replays[candidate.strategy.relation] or candidate.footprint_key in failed:
                    continue
                replays[candidate.strategy.relation] -= 1
                if not self.fits(candidate):
                    failed.add(candidate.footprint_key)
                    continue
            elif not self.fits(candidate):
                continue
            return candidate
        # The upper bound rejects all that is left. Simulate those with the lowest utilization: of each strategy, then
        # of all, since the bound may be the same for tiles whose peaks differ.
        rejected = [
            sorted(
                (one for one in ones if 1 < one.peak_utilization <= REPLAY_TOLERANCE),
                key=lambda one: one.peak_utilization,
            )[:REPLAYS]
            for ones in (self.closest.values(), self.candidates)
        ]
        return next((one for ones in rejected for one in ones if self.fits(one)), None)

    def feasible(self) -> Iterator[Candidate]:
        """Candidates that fit by the upper bound."""
        return (candidate for candidate in self.candidates if candidate.peak_utilization <= 1)


@dataclass(frozen=True, slots=True)
class _KnobCosts:
    """A knob set, and what it costs whatever the micro-batch and the checkpointing are."""

    zero: ZeroSpec
    minimal_memory: bool
    volumes: Volumes
    _weights: dict[bool, WeightsBound] = field(default_factory=dict)
    _parts: dict[tuple[int, int], tuple[PartTime, ...]] = field(default_factory=dict)

    def weights(self, run: RunConfig) -> WeightsBound:
        """Memory of parameters, gradients and states of a run with these knobs."""
        several = run.training.gradient_accumulation_steps > 1
        if several not in self._weights:
            self._weights[several] = bound_weights(run)
        return self._weights[several]

    def parts(self, run: RunConfig, rates: Rates) -> tuple[PartTime, ...]:
        """Time that DeepSpeed adds to a step of a run with these knobs."""
        key = run.training.gradient_accumulation_steps, weight_uses(run.model)
        if key not in self._parts:
            self._parts[key] = tuple(engine_parts(run, self.volumes, rates).values())
        return self._parts[key]
