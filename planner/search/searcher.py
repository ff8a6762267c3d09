"""The search for the best plan: thousands of candidates by closed forms, the chosen one by a replay.

`choose.choose` is the way in: which stage, offload, batch, tile and knobs to run on how many nodes, why, and why
not otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..common.errors import InputError
from ..config.model import ModelSpec
from ..config.training import TrainingSpec
from ..config.zero import ZeroSpec
from ..deepspeed.config import check_training_state
from ..hardware.cluster import ClusterSpec
from ..memory.upper_bound import bound_memory
from ..plans.defaults import override_zero
from ..plans.validation import check_data
from ..timing.rates import Rates
from ..timing.step_time import step_parts, total_seconds
from .candidate import Candidate, Capacity, replay_memory, with_nodes, writes_to_nvme
from .constraints import SAMPLES_PER_RANK, Checkpointing, SearchConstraints
from .space import KnobSet, Strategy, batches, knob_sets, node_counts, strategies, tiles

REPLAY_TOLERANCE = 1.25
"""Closed forms are above the replayed peaks by at most about so much; beyond it a candidate is not replayed."""
REPLAYS = 4
"""Replays of candidates that the closed forms reject; each takes up to some hundredths of a second."""


def resolve_global_batch(constraints: SearchConstraints, cluster: ClusterSpec) -> int:
    """Samples of an optimizer step: as asked, or what batch and accumulation make, or 8 per rank."""
    if constraints.global_batch is not None:
        return constraints.global_batch
    return (
        (constraints.micro_batch or SAMPLES_PER_RANK)
        * (constraints.gradient_accumulation_steps or 1)
        * cluster.world_size
    )


class Searcher:
    """One search: candidates, and what was found of each family.

    Args:
        spec: the model; its checkpointing stays where the user chose it.
        cluster: the nodes there are.
        training: precision and optimizer; its batch is chosen.
        wishes: what is decided already.

    Raises:
        InputError: if wishes contradict one another, or the cluster lacks a rate.
    """

    def __init__(
        self, spec: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, constraints: SearchConstraints
    ) -> None:
        self.spec, self.cluster, self.training, self.constraints = spec, cluster, training, constraints
        self.strategies, self.infeasible = strategies(constraints, cluster)
        self.global_batch = resolve_global_batch(constraints, cluster)
        self.capacities: dict[int, Capacity] = {}
        self.candidates: list[Candidate] = []
        self.considered = 0
        self.closest: dict[Strategy, Candidate] = {}
        """Of each family what fills the memories least."""
        check_data(spec, training, self.global_batch)
        # A slip in a knob's name or value is no family's fault.
        override_zero(ZeroSpec(), constraints.zero_overrides)
        self._collect()

    def _specs(self) -> list[ModelSpec]:
        modes: tuple[Checkpointing, ...] = ("none", "block", "offload")
        if self.constraints.checkpointing is not None:
            modes = (self.constraints.checkpointing,)
        if self.cluster.device == "cpu" and self.constraints.checkpointing is None:
            # Its host is its device: nothing is gained there by moving activations.
            modes = modes[:2]
        return [
            self.spec if self.spec.checkpointing == mode else self.spec.model_copy(update={"checkpointing": mode})
            for mode in modes
        ]

    def _collect(self) -> None:
        shared = False
        for nodes in node_counts(self.cluster, self.constraints):
            cluster = with_nodes(self.cluster, nodes)
            pairs = batches(self.constraints, self.training, self.global_batch, cluster.world_size)
            shared = shared or bool(pairs)
            self.capacities[nodes] = Capacity.of(cluster, self.constraints.headroom)
            rates = Rates(cluster, self.training.precision)
            rates.check()
            for micro_batch, gradient_accumulation_steps in pairs:
                update = {"micro_batch": micro_batch, "gradient_accumulation_steps": gradient_accumulation_steps}
                training = self.training.model_copy(update=update)
                for spec in self._specs():
                    for strategy in self.strategies:
                        self._family(strategy, spec, cluster, training, rates)
        if not shared:
            raise InputError(
                f"global_batch: {self.global_batch} is not allowed: must be a multiple of the "
                f"{self.cluster.world_size} ranks, and of micro_batch and accumulation where they are given"
            )

    def _family(
        self, strategy: Strategy, spec: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, rates: Rates
    ) -> None:
        if strategy in self.infeasible:
            return
        for tile in tiles(spec, cluster.world_size, strategy.stage, self.constraints):
            if not writes_to_nvme(spec, tile, cluster.world_size, training.dtype_bytes, strategy):
                continue
            try:
                for knob_set in knob_sets(spec, tile, strategy, cluster, self.constraints):
                    if knob_set.minimal_memory:
                        check_training_state(training, knob_set.zero, cluster.device)
                    if not self._evaluate(strategy, spec, cluster, training, knob_set, tile, rates):
                        break
            except InputError as error:
                self.infeasible[strategy] = str(error)
                return

    def _evaluate(
        self,
        strategy: Strategy,
        spec: ModelSpec,
        cluster: ClusterSpec,
        training: TrainingSpec,
        knob_set: KnobSet,
        tile: int | None,
        rates: Rates,
    ) -> bool:
        """Whether richer variants of the same are worth a look."""
        self.considered += 1
        bounds = bound_memory(spec, cluster, training, knob_set.zero, tile)
        peak_utilization = self.capacities[cluster.nodes].peak_utilization(bounds)
        seconds = total_seconds(step_parts(spec, training, knob_set.zero, tile, rates).values())
        candidate = Candidate(strategy, spec, cluster, training, knob_set.zero, tile, seconds, bounds, peak_utilization)
        known = self.closest.get(strategy)
        if known is None or peak_utilization < known.peak_utilization:
            self.closest[strategy] = candidate
        if peak_utilization <= REPLAY_TOLERANCE:
            self.candidates.append(candidate)
        return peak_utilization <= REPLAY_TOLERANCE or not knob_set.minimal_memory

    def fits(self, candidate: Candidate) -> bool:
        """Whether a replayed candidate leaves the headroom everywhere."""
        return self.capacities[candidate.cluster.nodes].replayed_utilization(replay_memory(candidate)) <= 1

    def best(self) -> Candidate | None:
        """The first candidate by the objective that fits; None if none does."""
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
        # Those that memory rejects by closed forms alone, the leanest first: of each family, then of all. Closed forms
        # may be the same for tiles whose peaks differ.
        leanest = [
            sorted(
                (one for one in ones if 1 < one.peak_utilization <= REPLAY_TOLERANCE),
                key=lambda one: one.peak_utilization,
            )[:REPLAYS]
            for ones in (self.closest.values(), self.candidates)
        ]
        return next((one for ones in leanest for one in ones if self.fits(one)), None)

    def feasible(self) -> Iterator[Candidate]:
        """Candidates that fit by the closed forms."""
        return (candidate for candidate in self.candidates if candidate.peak_utilization <= 1)
