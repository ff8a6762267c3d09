"""What would do where no plan fits, cheapest first: nodes, host memory or NVMe, a smaller input, a hybrid."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pydantic import Field

from ..common.errors import TranslutionError
from ..common.schema import Schema
from ..common.units import format_bytes, format_count
from ..config.model import GptSpec, ModelSpec, VitSpec, override
from ..config.training import TrainingSpec
from ..config.zero import ZeroSpec
from ..costs.parameters import TABLES, count_parameters, table_entries
from ..hardware.cluster import ClusterSpec
from ..memory.estimate import estimate_memory
from ..memory.upper_bound import bound_memory
from ..plans.defaults import choose_zero
from .candidate import Capacity, with_nodes, writes_to_nvme
from .constraints import SearchConstraints
from .searcher import REPLAY_TOLERANCE, REPLAYS, Searcher
from .space import strategies, tiles

MOST_NODES = 4096
ALPHA_RANKS = (64, 32, 16, 8, 4)
SOMEWHERE = "/nvme"
"""Stands for the path of a drive that is not there yet."""


class Advice(Schema):
    """One thing that would do."""

    kind: str
    """nodes, host memory, NVMe, input, width, tile or hybrid."""
    text: str
    changes: dict[str, object] = Field(default_factory=dict)
    """Fields of the model that it changes."""


class HybridRow(Schema):
    """A hybrid that fits: some layers full, the rest low-rank or attention."""

    full_layers: int
    rest: str
    c1: int | None
    """The rank of the rest, c1 = c2; null for attention."""
    parameters: int
    full_parameters: int
    """Of the full layers' tables."""
    changes: dict[str, object]
    """Fields of the model that make it."""


def min_utilization(
    spec: ModelSpec,
    cluster: ClusterSpec,
    training: TrainingSpec,
    constraints: SearchConstraints,
    *,
    only: str | None = None,
) -> float:
    """How full the fullest memory is at least, with one sample per rank; once at most 1, it may be less still.

    Args:
        spec: the model.
        cluster: the nodes there are.
        training: precision and optimizer.
        wishes: what is decided; the batch is left out of account.
        only: a mode of offload to which the families are bound.
    """
    capacity = Capacity.of(cluster, constraints.headroom)
    one = training.model_copy(update={"micro_batch": constraints.micro_batch or 1, "gradient_accumulation_steps": 1})
    usages = sorted(
        (
            (capacity.peak_utilization(bound_memory(mode, cluster, one, zero, tile)), mode, zero, tile)
            for mode, zero, tile in _minimal_setups(spec, cluster, one, constraints, only)
        ),
        key=lambda entry: entry[0],
    )
    if not usages:
        return float("inf")
    # What the closed forms refuse by little may fit all the same: replays are exact.
    nearly = [entry for entry in usages if entry[0] <= REPLAY_TOLERANCE][:REPLAYS]
    if usages[0][0] <= 1 or not nearly:
        return usages[0][0]
    # What a rank holds does not depend on what a node could hold: under one name it is replayed once.
    alike = cluster.model_copy(update={"host_memory_bytes": 1, "nvme_bytes": None})
    least = float("inf")
    for _, mode, zero, tile in nearly:
        least = min(least, capacity.replayed_utilization(estimate_memory(mode, alike, one, zero, tile)))
        if least <= 1:
            break
    return least


def _minimal_setups(
    spec: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, constraints: SearchConstraints, only: str | None
) -> Iterator[tuple[ModelSpec, ZeroSpec, int | None]]:
    """The leanest knobs of every family that is worth a look, whole and with checkpointing."""
    modes = ("none", "block") if constraints.checkpointing is None else (constraints.checkpointing,)
    for strategy in strategies(constraints, cluster)[0]:
        if strategy.ratio < 1 or only not in (None, strategy.offload):
            continue
        for tile in tiles(spec, cluster.world_size, strategy.stage, constraints):
            if not writes_to_nvme(spec, tile, cluster.world_size, training.dtype_bytes, strategy):
                continue
            zero = choose_zero(
                spec,
                tile,
                strategy.stage,
                cluster.world_size,
                offload=strategy.offload,
                nvme_path=constraints.nvme_path,
            )
            for mode in modes:
                yield spec.model_copy(update={"checkpointing": mode}), zero, tile


def largest_that_fits(fits: Callable[[int], bool], least: int, limit: int) -> int | None:
    """The largest number from least to limit that fits, where smaller ones fit too; None if the least does not."""
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
    """Looks for what would do.

    Args:
        searcher: a search that found nothing.
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
        return min_utilization(spec, cluster or self.cluster, self.training, constraints) <= 1

    def all(self) -> tuple[Advice, ...]:
        """Everything that would do, the cheapest first."""
        found = [self.tile(), self.host_or_nvme(), self.nodes(), self.smaller_input(), self.narrower()]
        return tuple(advice for advice in found if advice is not None)

    def tile(self) -> Advice | None:
        """A smaller tile, where the user fixed one that is too large."""
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
        """Host memory, or a drive, with which this cluster would do."""
        if self.constraints.offload is not None:
            return None
        texts = []
        if self.constraints.nvme_path is None:
            with_drive = self.constraints.model_copy(update={"nvme_path": SOMEWHERE})
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

        # The least that fits is one more than the most that does not.
        return format_bytes(((largest_that_fits(lambda gib: not fits(gib), 1, 2**20) or 0) + 1) * 2**30)

    def _host(self) -> int | None:
        """The least memory of a node, in GiB, with which it fits."""

        def fits(gib: int) -> bool:
            return self._fits(self.spec, self.cluster.model_copy(update={"host_memory_bytes": gib * 2**30}))

        if self.cluster.device == "cpu" or not fits(2**16):
            return None
        return ((largest_that_fits(lambda gib: not fits(gib), 1, 2**16) or 0) + 1) * 2**30

    def nodes(self) -> Advice | None:
        """The fewest nodes of this kind that do."""
        if self.cluster.device == "cpu":
            return None

        def fits(nodes: int) -> bool:
            return self._fits(self.spec, with_nodes(self.cluster, nodes))

        if not fits(MOST_NODES):
            return None
        least = (
            largest_that_fits(lambda nodes: not fits(nodes), self.cluster.nodes, MOST_NODES) or self.cluster.nodes
        ) + 1
        return Advice(kind="nodes", text=f"{least} nodes of {self.cluster.ranks_per_node} ranks")

    def smaller_input(self) -> Advice | None:
        """The longest context, or the largest image, that fits."""
        spec = self.spec
        if isinstance(spec, GptSpec):
            longest = largest_that_fits(lambda length: self._fits(override(spec, context=length)), 1, spec.context)
            if longest is None:
                return None
            text = f"a context of {longest} tokens rather than {spec.context}"
            return Advice(kind="input", text=text, changes={"context": longest})
        assert isinstance(spec, VitSpec)

        def image(patches: int) -> list[int]:
            return [min(patches, cells) * patch for cells, patch in zip(spec.grid, spec.patch, strict=True)]

        largest = largest_that_fits(lambda count: self._fits(override(spec, image=image(count))), 1, max(spec.grid))
        if largest is None:
            return None
        size = image(largest)
        return Advice(
            kind="input",
            text=f"an image of {size[0]} x {size[1]} rather than {spec.image[0]} x {spec.image[1]}",
            changes={"image": size},
        )

    def narrower(self) -> Advice | None:
        """The widest model of the same depth and width per head that fits."""
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
        """For each form of the rest, the most layers that can stay full Translution; the best row first."""
        if self.spec.operator != "translution":
            return ()
        rows = [self._hybrid("alpha", rank) for rank in ALPHA_RANKS] + [self._hybrid("attention", None)]
        found = [row for row in rows if row is not None]
        return tuple(sorted(found, key=lambda row: (-row.full_layers, -row.parameters)))

    def _hybrid(self, rest: str, rank: int | None) -> HybridRow | None:
        """The hybrid with the most full layers; None if not even one can be full."""
        spec = self.spec

        def changes(layers: int) -> dict[str, object]:
            world_size: dict[str, object] = {} if rank is None else {"c1": rank, "c2": rank}
            return {"relative_layers": f"first:{layers}", "other_layers": rest, **world_size}

        try:
            layers = largest_that_fits(lambda count: self._fits(override(spec, **changes(count))), 1, spec.depth - 1)
        except TranslutionError:
            return None  # Its width does not suit rotary attention.
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
    """A row in words."""
    rest = f"α-Translution with c1 = c2 = {row.c1}" if row.c1 else "self-attention"
    return f"{row.full_layers} full layers, the rest {rest}: {format_count(row.parameters)} parameters"
