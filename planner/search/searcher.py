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
from .candidate import Candidate, Capacity, predicted, reaches_nvme, with_nodes
from .constraints import SAMPLES_PER_RANK, Checkpointing, Wishes
from .space import Family, Variant, batches, families, node_counts, tiles, variants

NEARLY = 1.25
"""Closed forms are above the replayed peaks by at most about so much; beyond it a candidate is not replayed."""
REPLAYS = 4
"""Replays of candidates that the closed forms reject; each takes up to some hundredths of a second."""


def global_batch_of(wishes: Wishes, cluster: ClusterSpec) -> int:
    """Samples of an optimizer step: as asked, or what batch and accumulation make, or 8 per rank."""
    if wishes.global_batch is not None:
        return wishes.global_batch
    return (wishes.micro_batch or SAMPLES_PER_RANK) * (wishes.accumulation or 1) * cluster.ranks


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

    def __init__(self, spec: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, wishes: Wishes) -> None:
        self.spec, self.cluster, self.training, self.wishes = spec, cluster, training, wishes
        self.families, self.refused = families(wishes, cluster)
        self.global_batch = global_batch_of(wishes, cluster)
        self.capacities: dict[int, Capacity] = {}
        self.candidates: list[Candidate] = []
        self.considered = 0
        self.nearest: dict[Family, Candidate] = {}
        """Of each family what fills the memories least."""
        check_data(spec, training, self.global_batch)
        # A slip in a knob's name or value is no family's fault.
        override_zero(ZeroSpec(), wishes.knobs)
        self._collect()

    def _specs(self) -> list[ModelSpec]:
        modes: tuple[Checkpointing, ...] = ("none", "block", "offload")
        if self.wishes.checkpointing is not None:
            modes = (self.wishes.checkpointing,)
        if self.cluster.device == "cpu" and self.wishes.checkpointing is None:
            # Its host is its device: nothing is gained there by moving activations.
            modes = modes[:2]
        return [
            self.spec if self.spec.checkpointing == mode else self.spec.model_copy(update={"checkpointing": mode})
            for mode in modes
        ]

    def _collect(self) -> None:
        shared = False
        for nodes in node_counts(self.cluster, self.wishes):
            cluster = with_nodes(self.cluster, nodes)
            pairs = batches(self.wishes, self.training, self.global_batch, cluster.ranks)
            shared = shared or bool(pairs)
            self.capacities[nodes] = Capacity.of(cluster, self.wishes.headroom)
            rates = Rates(cluster, self.training.precision)
            rates.check()
            for micro_batch, accumulation in pairs:
                update = {"micro_batch": micro_batch, "accumulation": accumulation}
                training = self.training.model_copy(update=update)
                for spec in self._specs():
                    for family in self.families:
                        self._family(family, spec, cluster, training, rates)
        if not shared:
            raise InputError(
                f"global_batch: {self.global_batch} is not allowed: must be a multiple of the "
                f"{self.cluster.ranks} ranks, and of micro_batch and accumulation where they are given"
            )

    def _family(
        self, family: Family, spec: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, rates: Rates
    ) -> None:
        if family in self.refused:
            return
        for tile in tiles(spec, cluster.ranks, family.stage, self.wishes):
            if not reaches_nvme(spec, tile, cluster.ranks, training.dtype_bytes, family):
                continue
            try:
                for variant in variants(spec, tile, family, cluster, self.wishes):
                    if variant.lean:
                        check_training_state(training, variant.zero, cluster.device)
                    if not self._consider(family, spec, cluster, training, variant, tile, rates):
                        break
            except InputError as error:
                self.refused[family] = str(error)
                return

    def _consider(
        self,
        family: Family,
        spec: ModelSpec,
        cluster: ClusterSpec,
        training: TrainingSpec,
        variant: Variant,
        tile: int | None,
        rates: Rates,
    ) -> bool:
        """Whether richer variants of the same are worth a look."""
        self.considered += 1
        bounds = bound_memory(spec, cluster, training, variant.zero, tile)
        usage = self.capacities[cluster.nodes].usage(bounds)
        seconds = total_seconds(step_parts(spec, training, variant.zero, tile, rates).values())
        candidate = Candidate(family, spec, cluster, training, variant.zero, tile, seconds, bounds, usage)
        known = self.nearest.get(family)
        if known is None or usage < known.usage:
            self.nearest[family] = candidate
        if usage <= NEARLY:
            self.candidates.append(candidate)
        return usage <= NEARLY or not variant.lean

    def fits(self, candidate: Candidate) -> bool:
        """Whether a replayed candidate leaves the headroom everywhere."""
        return self.capacities[candidate.cluster.nodes].usage_of(predicted(candidate)) <= 1

    def best(self) -> Candidate | None:
        """The first candidate by the objective that fits; None if none does."""
        objective = self.wishes.minimize
        replays, failed = REPLAYS, set()
        for candidate in sorted(self.candidates, key=lambda candidate: candidate.cost(objective)):
            if candidate.usage > 1:
                if not replays or candidate.twin in failed:
                    continue
                replays -= 1
                if not self.fits(candidate):
                    failed.add(candidate.twin)
                    continue
            elif not self.fits(candidate):
                continue
            return candidate
        # Those that memory rejects by closed forms alone, the leanest first: of each family, then of all. Closed forms
        # may be the same for tiles whose peaks differ.
        leanest = [
            sorted((one for one in ones if 1 < one.usage <= NEARLY), key=lambda one: one.usage)[:REPLAYS]
            for ones in (self.nearest.values(), self.candidates)
        ]
        return next((one for ones in leanest for one in ones if self.fits(one)), None)

    def fitting(self) -> Iterator[Candidate]:
        """Candidates that fit by the closed forms."""
        return (candidate for candidate in self.candidates if candidate.usage <= 1)
