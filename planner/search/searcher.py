"""`Searcher`: ranks thousands of candidates by closed forms and simulates only those that it would choose.

`plan_search.search_plan` is the entry point. A candidate is a ZeRO stage with an offload mode (a strategy), a number
of nodes, a batch split, a tile size, a checkpointing mode and a knob set.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..common.errors import InputError
from ..config.model import ModelSpec
from ..config.training import TrainingSpec
from ..config.zero import ZeroSpec
from ..deepspeed.config import check_training_state
from ..hardware.cluster import ClusterSpec
from ..memory.estimate import estimate_memory
from ..memory.upper_bound import bound_memory
from ..plans.defaults import override_zero
from ..plans.validation import check_data
from ..run_config import RunConfig
from ..timing.rates import Rates
from ..timing.step_time import step_parts, total_seconds
from .candidate import Candidate, Capacity, with_nodes, writes_to_nvme
from .constraints import Checkpointing, SearchConstraints, resolve_global_batch
from .space import Strategy, batches, knob_sets, list_strategies, node_counts, tiles

REPLAY_TOLERANCE = 1.25
"""Highest utilization by the upper bound at which a simulation may still fit: bounds are at most 25% too high."""
REPLAYS = 4
"""Simulations of candidates that the upper bound rejects; each takes up to some hundredths of a second."""


class Searcher:
    """One search: its candidates, and the closest candidate of every strategy.

    Args:
        spec: the model; its checkpointing is replaced unless the constraints fix it.
        cluster: all available nodes.
        training: precision, optimizer and data; the search chooses its batch.
        constraints: what the user fixes.

    Raises:
        InputError: if the constraints contradict one another, or the cluster lacks a rate.
    """

    def __init__(
        self, spec: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, constraints: SearchConstraints
    ) -> None:
        self.spec, self.cluster, self.training, self.constraints = spec, cluster, training, constraints
        self.strategies, self.infeasible = list_strategies(constraints, cluster)
        self.global_batch = resolve_global_batch(constraints, cluster)
        self.capacities: dict[int, Capacity] = {}
        """Capacity of a rank by number of nodes."""
        self.candidates: list[Candidate] = []
        self.considered = 0
        self.closest: dict[Strategy, Candidate] = {}
        """The candidate of each strategy with the lowest utilization."""
        check_data(spec, training, self.global_batch)
        # A wrong name or value of a knob is an error of the input, whatever the strategy.
        override_zero(ZeroSpec(), constraints.zero_overrides)
        self._collect()

    def _models(self) -> list[ModelSpec]:
        modes: tuple[Checkpointing, ...] = ("none", "block", "offload")
        if self.constraints.checkpointing is not None:
            modes = (self.constraints.checkpointing,)
        elif self.cluster.device == "cpu":
            # A CPU rank computes in host memory, so that offloading activations to the host saves nothing.
            modes = modes[:2]
        return [
            self.spec if self.spec.checkpointing == mode else self.spec.model_copy(update={"checkpointing": mode})
            for mode in modes
        ]

    def _collect(self) -> None:
        divides = False
        for nodes in node_counts(self.cluster, self.constraints):
            cluster = with_nodes(self.cluster, nodes)
            pairs = batches(self.constraints, self.global_batch, cluster.world_size)
            divides = divides or bool(pairs)
            self.capacities[nodes] = Capacity.of(cluster, self.constraints.headroom)
            rates = Rates(cluster, self.training.precision)
            rates.check()
            for micro_batch, steps in pairs:
                update = {"micro_batch": micro_batch, "gradient_accumulation_steps": steps}
                training = self.training.model_copy(update=update)
                for model in self._models():
                    for strategy in self.strategies:
                        self._try_strategy(strategy, RunConfig(model, cluster, training, ZeroSpec()), rates)
        if not divides:
            raise InputError(
                f"global_batch: {self.global_batch} is not allowed: must be a multiple of the "
                f"{self.cluster.world_size} ranks, and of micro_batch and accumulation where they are given"
            )

    def _try_strategy(self, strategy: Strategy, base: RunConfig, rates: Rates) -> None:
        """Evaluate every tile size and knob set of a strategy; ``base`` gives the rest of the configuration."""
        if strategy in self.infeasible:
            return
        model, cluster, training = base.model, base.cluster, base.training
        for tile in tiles(model, cluster.world_size, strategy.stage, self.constraints):
            if not writes_to_nvme(model, tile, cluster.world_size, training.dtype_bytes, strategy):
                continue
            try:
                for knob_set in knob_sets(model, tile, strategy, cluster, self.constraints):
                    if knob_set.minimal_memory:
                        check_training_state(training, knob_set.zero, cluster.device)
                    run = RunConfig(model, cluster, training, knob_set.zero, tile)
                    utilization = self._evaluate(strategy, run, rates)
                    if utilization > REPLAY_TOLERANCE and knob_set.minimal_memory:
                        # Every other knob set of this tile needs more memory.
                        break
            except InputError as error:
                self.infeasible[strategy] = str(error)
                return

    def _evaluate(self, strategy: Strategy, run: RunConfig, rates: Rates) -> float:
        """Add a candidate, and return its peak utilization."""
        self.considered += 1
        bounds = bound_memory(run)
        utilization = self.capacities[run.cluster.nodes].peak_utilization(bounds)
        seconds = total_seconds(step_parts(run, rates).values())
        candidate = Candidate(strategy, run, seconds, bounds, utilization)
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
        replays, failed = REPLAYS, set()
        for candidate in sorted(self.candidates, key=lambda candidate: candidate.cost(objective)):
            if candidate.peak_utilization > 1:
                if not replays or candidate.footprint_key in failed:
                    continue
                replays -= 1
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
