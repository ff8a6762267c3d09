"""Advice where no plan fits, cheapest fix first: a smaller tile, host memory or NVMe, nodes, input, width, a hybrid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import Field

from ..common.errors import InputError, TranslutionError
from ..common.schema import Schema
from ..common.units import format_bytes, format_count
from ..config.loading import save_model
from ..config.model import GptSpec, ModelSpec, PatchSpec, override
from ..config.model_base import OPERATOR_LABELS
from ..config.parallel import ParallelSpec
from ..config.run_config import RunConfig
from ..config.training import TrainingSpec
from ..costs.parameters import TABLES, count_parameters, table_entries
from ..costs.relation_traffic import has_relation_tables
from ..hardware.cluster import ClusterSpec
from ..memory.estimate import estimate_memory
from ..memory.upper_bound import bound_memory
from ..plans.defaults import choose_zero
from .candidate import Capacity, with_nodes, writes_to_nvme
from .relation_space import group_sizes
from .searcher import REPLAY_TOLERANCE, REPLAYS, Searcher
from .space import SearchConstraints, list_strategies, tiles

MAX_ADVISED_NODES = 4096
HYBRID_RANKS = (64, 32, 16, 8, 4)
"""Ranks c1 = c2 of the α-Translution layers of a hybrid."""
HOPELESS_UTILIZATION = 1.08
"""Simulated utilization of the most promising setup above which the others are not simulated: they differ by less."""
HYPOTHETICAL_PATH = "/nvme"
"""Placeholder for the path of a drive that the cluster does not have yet."""


class Advice(Schema):
    """One change that makes a plan fit."""

    kind: str
    """What changes: nodes, host memory, NVMe, input, width, tile or hybrid."""
    text: str
    """The change in words."""
    changes: dict[str, object] = Field(default_factory=dict)
    """Fields of the model spec that change."""


class HybridRow(Schema):
    """A hybrid model that fits: some layers are full Translution, the others α-Translution or attention."""

    full_layers: int
    """Number of full layers."""
    rest: str
    """Operator of the other layers."""
    c1: int | None
    """Rank c1 = c2 of the other layers; null for attention."""
    parameters: int
    """Parameters of the hybrid model."""
    full_parameters: int
    """Parameters of the full layers' tables."""
    changes: dict[str, object]
    """Fields of the model spec that make the hybrid."""


def can_fit(spec: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, constraints: SearchConstraints) -> bool:
    """Return whether any setup fits at micro-batch 1: some strategy, tile size and checkpointing.

    Args:
        spec: the model.
        cluster: all available nodes.
        training: precision and optimizer.
        constraints: what the user fixes; the batch is ignored unless it or the micro-batch fixes the latter.
    """
    capacity = Capacity.of(cluster, constraints.headroom)
    one = training.model_copy(
        update={"micro_batch": _least_micro_batch(constraints, cluster), "gradient_accumulation_steps": 1}
    )
    setups = []
    # The last strategies need the least memory on the device.
    for run in reversed(list(_minimal_setups(spec, cluster, one, constraints))):
        utilization = capacity.peak_utilization(bound_memory(run))
        if utilization <= 1:
            return True
        setups.append((utilization, run))
    setups.reverse()
    setups.sort(key=lambda entry: entry[0])
    # A setup that the upper bound rejects by a small margin may still fit when it is simulated.
    close = [run for utilization, run in setups if utilization <= REPLAY_TOLERANCE][:REPLAYS]
    # A rank's memory does not depend on the node's capacity: without it, equal runs share one cached simulation.
    same = cluster.model_copy(update={"host_memory_bytes": 1, "nvme_bytes": None})
    for number, run in enumerate(close):
        utilization = capacity.simulated_utilization(estimate_memory(run.replace(cluster=same)))
        if utilization <= 1:
            return True
        if number == 0 and utilization > HOPELESS_UTILIZATION:
            return False
    return False


def _least_micro_batch(constraints: SearchConstraints, cluster: ClusterSpec) -> int:
    """Return the smallest micro-batch that the constraints allow; a batch and its accumulation leave only one."""
    batch, steps = constraints.global_batch, constraints.gradient_accumulation_steps
    if constraints.micro_batch is None and batch is not None and steps is not None:
        return max(1, batch // (steps * cluster.world_size))
    return constraints.micro_batch or 1


def _minimal_setups(
    spec: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, constraints: SearchConstraints
) -> Iterator[RunConfig]:
    """The minimal-memory configuration of every strategy and tile size, with and without checkpointing."""
    modes = ("none", "block") if constraints.checkpointing is None else (constraints.checkpointing,)
    world_size, path = cluster.world_size, constraints.nvme_path
    # Of relation parallelism only a given size is tried: advice may say more than is needed, but never too little.
    group, given = 1, constraints.relation_parallel or 1
    if given > 1:
        sizes = group_sizes(spec, cluster, constraints) if has_relation_tables(spec) else []
        if not sizes:
            return
        (group,) = sizes
    for strategy in list_strategies(constraints, cluster)[0]:
        if strategy.ratio < 1 or strategy.hpz:
            continue
        for tile in tiles(spec, world_size, strategy.stage, constraints, group):
            zero = choose_zero(
                spec,
                tile,
                strategy.stage,
                world_size,
                offload=strategy.offload,
                nvme_path=path,
                relation_ranks=group,
            )
            run = RunConfig(spec, cluster, training, zero, tile, ParallelSpec(relation=group))
            if writes_to_nvme(run, strategy):
                for mode in modes:
                    yield run.replace(model=spec.model_copy(update={"checkpointing": mode}))


def largest_that_fits(fits: Callable[[int], bool], least: int, limit: int) -> int | None:
    """Largest number in [least, limit] that fits; None if ``least`` does not fit. Fitting must be monotonic."""
    if least > limit or not fits(least):
        return None
    low, high = least, least
    while high < limit and fits(high):
        low, high = high, min(limit, 2 * high)
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class FixAdvisor:
    """Finds changes that make a plan fit.

    Args:
        searcher: a finished search without a result.
    """

    def __init__(self, searcher: Searcher) -> None:
        self.spec, self.cluster = searcher.spec, searcher.cluster
        self.training, self.constraints = searcher.training, searcher.constraints

    def _fits(
        self, spec: ModelSpec, cluster: ClusterSpec | None = None, constraints: SearchConstraints | None = None
    ) -> bool:
        constraints = constraints or self.constraints
        if constraints.tile_relations is not None and constraints.tile_relations > table_entries(spec):
            constraints = constraints.model_copy(update={"tile_relations": None})
        return can_fit(spec, cluster or self.cluster, self.training, constraints)

    def all(self) -> tuple[Advice, ...]:
        """All advice, cheapest change first."""
        if self._fits(self.spec):
            return ()  # What rules the plans out, such as a knob of ZeRO, is nothing that these changes would change.
        found = [self.tile(), self.host_or_nvme(), self.nodes(), self.smaller_input(), self.narrower()]
        return tuple(advice for advice in found if advice is not None)

    def tile(self) -> Advice | None:
        """A smaller tile, if the user fixed one that is too large."""
        if self.constraints.tile_relations is None:
            return None
        largest = largest_that_fits(
            lambda count: self._fits(
                self.spec, constraints=self.constraints.model_copy(update={"tile_relations": count})
            ),
            1,
            self.constraints.tile_relations,
        )
        if largest is None:
            return None
        return Advice(kind="tile", text=f"tile_relations {largest} rather than {self.constraints.tile_relations}")

    def host_or_nvme(self) -> Advice | None:
        """The host memory per node, or the NVMe drive, that this cluster needs."""
        if self.constraints.offload is not None:
            return None
        texts = []
        if self.constraints.nvme_path is None:
            with_drive = self.constraints.model_copy(update={"nvme_path": HYPOTHETICAL_PATH})
            roomy = self.cluster.model_copy(update={"nvme_bytes": 2**60})
            for known, hint in ((self.cluster, "--nvme-path, a folder on the node's drives"), (roomy, "")):
                if self._fits(self.spec, known, with_drive):
                    texts.append(hint or f"{self._drive(with_drive)} of NVMe per node, and --nvme-path")
                    break
        host = self._host()
        if host is not None:
            texts.append(f"{format_bytes(host)} of host memory per node")
        return Advice(kind="host memory or NVMe", text=", or ".join(texts)) if texts else None

    def _drive(self, constraints: SearchConstraints) -> str:
        def fits(gib: int) -> bool:
            return self._fits(self.spec, self.cluster.model_copy(update={"nvme_bytes": gib * 2**30}), constraints)

        # The smallest size that fits is one more than the largest that does not.
        return format_bytes(((largest_that_fits(lambda gib: not fits(gib), 1, 2**20) or 0) + 1) * 2**30)

    def _host(self) -> int | None:
        """Smallest host memory of a node that fits, in bytes and whole GiB."""

        def fits(gib: int) -> bool:
            return self._fits(self.spec, self.cluster.model_copy(update={"host_memory_bytes": gib * 2**30}))

        if self.cluster.device == "cpu" or not fits(2**16):
            return None
        return ((largest_that_fits(lambda gib: not fits(gib), 1, 2**16) or 0) + 1) * 2**30

    def nodes(self) -> Advice | None:
        """The smallest number of nodes of this kind that fits."""
        if self.cluster.device == "cpu":
            return None

        def fits(nodes: int) -> bool:
            return self._fits(self.spec, with_nodes(self.cluster, nodes))

        if not fits(MAX_ADVISED_NODES):
            return None
        least = (
            largest_that_fits(lambda nodes: not fits(nodes), self.cluster.nodes, MAX_ADVISED_NODES)
            or self.cluster.nodes
        ) + 1
        return Advice(kind="nodes", text=f"{least} nodes of {self.cluster.ranks_per_node} ranks")

    def smaller_input(self) -> Advice | None:
        """The longest context or the largest image that fits."""
        spec = self.spec
        if isinstance(spec, GptSpec):
            longest = largest_that_fits(lambda length: self._fits(override(spec, context=length)), 1, spec.context)
            if longest is None:
                return None
            text = f"a context of {longest} tokens rather than {spec.context}"
            return Advice(kind="input", text=text, changes={"context": longest})
        assert isinstance(spec, PatchSpec)

        def image(patches: int) -> list[int]:
            return [
                min(patches, cells) * patch
                for cells, patch in zip(spec.grid[-2:], spec.patch_extents[-2:], strict=True)
            ]

        largest = largest_that_fits(
            lambda count: self._fits(override(spec, image=image(count))), 1, max(spec.grid[-2:])
        )
        if largest is None:
            return None
        size = image(largest)
        return Advice(
            kind="input",
            text=f"an image of {size[0]} x {size[1]} rather than {spec.image[0]} x {spec.image[1]}",
            changes={"image": size},
        )

    def narrower(self) -> Advice | None:
        """The widest model of the same depth and head width that fits."""
        spec = self.spec
        if spec.heads * spec.head_dim != spec.dim:
            return None

        def changes(heads: int) -> dict[str, object]:
            return {"dim": heads * spec.head_dim, "heads": heads}

        heads = largest_that_fits(lambda count: self._fits(override(spec, **changes(count))), 1, spec.heads)
        if heads is None:
            return None
        text = f"a width of {heads * spec.head_dim} ({heads} heads) rather than {spec.dim}"
        return Advice(kind="width", text=text, changes=changes(heads))

    def hybrids(self) -> tuple[HybridRow, ...]:
        """For each operator of the other layers, the hybrid with the most full layers; best hybrid first."""
        if self.spec.operator != "translution" or self._fits(self.spec):
            return ()
        rows = [self._hybrid("alpha", rank) for rank in HYBRID_RANKS] + [self._hybrid("attention", None)]
        found = [row for row in rows if row is not None]
        return tuple(sorted(found, key=lambda row: (-row.full_layers, -row.parameters)))

    def _hybrid(self, rest: str, rank: int | None) -> HybridRow | None:
        """The hybrid with the most full layers; None if not even one layer can be full."""
        spec = self.spec

        def changes(layers: int) -> dict[str, object]:
            low_ranks: dict[str, object] = {} if rank is None else {"c1": rank, "c2": rank}
            return {"relative_layers": f"first:{layers}", "other_layers": rest, **low_ranks}

        try:
            layers = largest_that_fits(lambda count: self._fits(override(spec, **changes(count))), 1, spec.depth - 1)
        except TranslutionError:
            return None  # The head width does not suit rotary attention.
        if layers is None:
            return None
        alone = count_parameters(override(spec, depth=1, relative_layers="all")).components[TABLES]
        return HybridRow(
            full_layers=layers,
            rest=rest,
            c1=rank,
            parameters=count_parameters(override(spec, **changes(layers))).total,
            full_parameters=alone * layers,
            changes=changes(layers),
        )


def describe_hybrid(row: HybridRow) -> str:
    """Describe a hybrid in words."""
    rest = f"{OPERATOR_LABELS['alpha']} with c1 = c2 = {row.c1}" if row.c1 else OPERATOR_LABELS["attention"]
    return f"{row.full_layers} full layers, the others {rest}: {format_count(row.parameters)} parameters"


def save_hybrids(spec: ModelSpec, hybrids: Sequence[HybridRow], folder: Path) -> dict[Path, HybridRow]:
    """Write a spec file for every hybrid; return the hybrids by file.

    Args:
        spec: the model that the hybrids change.
        hybrids: as `NoPlanFits` has them.
        folder: folder to write into; it is created if there is a hybrid.

    Raises:
        InputError: if the folder cannot be written.
    """
    files = {}
    for row in hybrids:
        name = f"first-{row.full_layers}-{row.rest}{f'-{row.c1}' if row.c1 else ''}"
        path = folder / f"{name}.yaml"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
        save_model(override(spec, name=f"{spec.name} {name}", **row.changes), path)
        files[path] = row
    return files
