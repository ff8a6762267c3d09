"""What the user fixes (`SearchConstraints`), and the search space that remains.

The space has strategies (ZeRO stage and offload mode), node counts, batch splits, tile sizes and knob sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import Field, TypeAdapter

from ..common.errors import InputError
from ..common.schema import Schema, stored_as, validate
from ..common.types import Line, Positive
from ..config.model import ModelSpec
from ..config.zero import OffloadMode, ShardingEngine, ZeroSpec, min_buffers
from ..costs.parameters import table_entries
from ..hardware.cluster import ClusterSpec
from ..plans.defaults import choose_fsdp2, choose_tile, choose_zero, override_zero, require_plain, whole_rows

RATIOS = (0.25, 0.5, 0.75)
"""Offload ratios to try."""


class Strategy(NamedTuple):
    """A ZeRO stage with an offload mode."""

    stage: Stage
    offload: OffloadMode
    ratio: float = 1.0
    hpz: bool = False
    """Whether every node has a second copy of the parameters: ZeRO++'s hpZ."""
    quantized: bool = False
    """Whether parameters and gradients are communicated as integers: ZeRO++'s qwZ and qgZ."""
    engine: ShardingEngine = "deepspeed"
    relation: bool = False
    """Whether groups of ranks share out the relations; ZeRO partitions over the replicas."""

    @property
    def text(self) -> str:
        """The strategy in words."""
        if self.engine == "fsdp2":
            return "FSDP2"
        if self.hpz:
            return f"ZeRO-3 with hpZ{', qwZ and qgZ' if self.quantized else ''}, no offload"
        part = f", {self.ratio:.0%} of it" if self.ratio < 1 else ""
        names = {
            "none": "no offload",
            "cpu-optimizer": f"optimizer on the host{part}",
            "cpu": "all on the host",
            "nvme-optimizer": "optimizer on NVMe",
            "nvme": "all on NVMe",
        }
        extra = " with relation parallelism" if self.relation else ""
        return f"ZeRO-{self.stage}{extra}, {names[self.offload]}"


def list_strategies(constraints: SearchConstraints, cluster: ClusterSpec) -> tuple[list[Strategy], dict[Strategy, str]]:
    """List the strategies to try, and the infeasible ones with the reason.

    Raises:
        InputError: for an unknown offload mode, or what FSDP2 does not have.
    """
    if constraints.offload is not None:
        OffloadMode.parse(constraints.offload)
    if constraints.engine == "fsdp2":
        require_plain(constraints.stage, constraints.offload, constraints.zero_overrides)
        return [Strategy(3, OffloadMode.NONE, engine="fsdp2")], {}
    every = [Strategy(0, OffloadMode.NONE)]
    every += [Strategy(stage, offload) for stage in (1, 2) for offload in (OffloadMode.NONE, OffloadMode.CPU_OPTIMIZER)]
    every += [Strategy(3, offload) for offload in OffloadMode]
    ratios = RATIOS if constraints.offload_ratio in (None, 1.0) else (constraints.offload_ratio,)
    every += [Strategy(3, OffloadMode.CPU_OPTIMIZER, ratio) for ratio in ratios]
    every += _zero_plus_plus(cluster, constraints)
    chosen, infeasible = [], {}
    for strategy in every:
        if constraints.stage not in (None, strategy.stage) or constraints.offload not in (None, strategy.offload):
            continue
        if constraints.offload_ratio not in (None, strategy.ratio):
            continue
        if strategy.quantized and not constraints.quantized:
            infeasible[strategy] = "it rounds parameters and gradients to integers: allow that with --quantized"
            continue
        if strategy.offload.uses_nvme and constraints.nvme_path is None:
            if constraints.offload is None:
                infeasible[strategy] = "no path on an NVMe drive was given (--nvme-path)"
                continue
        elif strategy.ratio < 1 and cluster.device == "cpu" and constraints.offload_ratio is None:
            # The device of a CPU rank is its host, so that a partial offload changes nothing.
            continue
        chosen.append(strategy)
    return chosen, infeasible


ZERO_PLUS_PLUS = ("hpz_ranks", "quantized_weights", "quantized_gradients")
"""Fields of `ZeroSpec` that make ZeRO++."""
SWAP_KNOBS = ("pipeline_read", "pipeline_write", "buffer_count")
"""Fields of the optimizer's offload to NVMe that the search varies."""


def _zero_plus_plus(cluster: ClusterSpec, constraints: SearchConstraints) -> list[Strategy]:
    """Strategies of ZeRO++, which differ from ZeRO-3 only on several nodes of several ranks."""
    given = set(ZERO_PLUS_PLUS) & set(constraints.zero_overrides)
    if cluster.nodes == 1 or cluster.ranks_per_node == 1 or given:
        return []
    kinds = (False, True) if cluster.device == "cuda" else (False,)
    return [Strategy(3, OffloadMode.NONE, hpz=True, quantized=quantized) for quantized in kinds]


def node_counts(cluster: ClusterSpec, constraints: SearchConstraints) -> list[int]:
    """Numbers of nodes to try, largest first: all nodes, then repeated halves down to one.

    To minimize time only the full number and its half are tried: fewer nodes are faster only if the network bounds.
    """
    counts = [cluster.nodes]
    fewest = 1 if constraints.minimize != "time" else (cluster.nodes + 1) // 2
    while not constraints.all_nodes and counts[-1] > fewest:
        counts.append((counts[-1] + 1) // 2)
    return counts


def batches(constraints: SearchConstraints, global_batch: int, world_size: int) -> list[tuple[int, int]]:
    """Pairs of micro-batch and gradient accumulation steps whose product is a rank's share of the global batch.

    Args:
        constraints: may fix either.
        global_batch: samples of an optimizer step over all ranks.
        world_size: number of ranks.
    """
    per_rank, rest = divmod(global_batch, world_size)
    if rest or not per_rank:
        return []
    pairs = [(size, per_rank // size) for size in _divisors(per_rank)]
    pairs = [pair for pair in pairs if constraints.micro_batch in (None, pair[0])]
    pairs = [pair for pair in pairs if constraints.gradient_accumulation_steps in (None, pair[1])]
    return pairs[:1] + _spread(pairs[1:], 7)


def _divisors(number: int) -> list[int]:
    low = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def _spread(pairs: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """At most ``count`` of the pairs, evenly spaced from first to last."""
    if len(pairs) <= count:
        return pairs
    step = (len(pairs) - 1) / (count - 1)
    return [pairs[round(number * step)] for number in range(count)]


def tiles(
    spec: ModelSpec, world_size: int, stage: int, constraints: SearchConstraints, relation_ranks: int = 1
) -> list[int | None]:
    """Relations per tile to try.

    Args:
        spec: the model.
        world_size: number of ranks.
        stage: the ZeRO stage.
        constraints: may fix the size.
        relation_ranks: ranks that share out the relations, G; above 1 only the default size is tried.

    Raises:
        InputError: if the constraints' tile size is out of range.
    """
    relations = table_entries(spec)
    chosen = choose_tile(spec, world_size, relation_ranks)
    if constraints.tile_relations is not None:
        if chosen is None:
            raise InputError(f"tile_relations: {constraints.tile_relations} is not allowed: the model has no tables")
        if constraints.tile_relations > relations:
            raise InputError(
                f"tile_relations: {constraints.tile_relations} is not allowed: must be from 1 to {relations}"
            )
        return [constraints.tile_relations]
    if chosen is None or stage < 3 or relation_ranks > 1:
        # Below stage 3 tiles are not gathered one by one.
        return [chosen]
    sizes = [chosen, chosen * 2, chosen * 4, chosen // 2, chosen // 4]
    if constraints.engine == "fsdp2":
        sizes = [whole_rows(size, world_size) for size in sizes]
    return list(dict.fromkeys(min(relations, max(1, size)) for size in sizes))


@dataclass(frozen=True, slots=True)
class KnobSet:
    """One setting of a strategy's knobs."""

    zero: ZeroSpec
    minimal_memory: bool
    """True for the knob set of the strategy that needs the least device memory."""


def knob_sets(
    spec: ModelSpec,
    tile_relations: int | None,
    strategy: Strategy,
    cluster: ClusterSpec,
    constraints: SearchConstraints,
    relation_ranks: int = 1,
) -> Iterator[KnobSet]:
    """Knob sets to try, the one with minimal memory first.

    Args:
        spec: the model.
        tile_relations: relations per tile.
        strategy: stage and offload.
        cluster: the ranks.
        constraints: give knobs that are fixed.
        relation_ranks: ranks that share out the relations, G.

    Raises:
        InputError: if the user's overrides contradict the strategy.
    """
    if strategy.engine == "fsdp2":
        yield from _fsdp2_knobs(choose_fsdp2(spec, tile_relations, cluster), cluster)
    else:
        base = _minimal_knobs(spec, tile_relations, strategy, cluster, constraints, relation_ranks)
        yield from _zero_knobs(base, strategy, cluster, constraints)


def _fsdp2_knobs(base: ZeroSpec, cluster: ClusterSpec) -> Iterator[KnobSet]:
    yield KnobSet(base, minimal_memory=True)
    if cluster.device == "cuda":
        ahead = {"prefetch_bucket_elements": base.reduce_bucket_elements}
        yield KnobSet(base.model_copy(update=ahead), minimal_memory=False)


def _zero_knobs(
    base: ZeroSpec, strategy: Strategy, cluster: ClusterSpec, constraints: SearchConstraints
) -> Iterator[KnobSet]:
    yield KnobSet(base, minimal_memory=True)
    on_gpu, largest = cluster.device == "cuda", base.reduce_bucket_elements
    changes: list[dict[str, Any]] = []
    if strategy.stage in (1, 2) and on_gpu:
        changes.append({"overlap_comm": True})
    if strategy.stage == 3:
        streams: list[dict[str, Any]] = [{}]
        if on_gpu:
            streams.append({"overlap_comm": True})
            if strategy.offload is not OffloadMode.NVME:
                # DeepSpeed prefetches at least one full module, and no parameters that lie on NVMe.
                streams += [
                    {"overlap_comm": True, "prefetch_bucket_elements": count * largest, "max_live_elements": live}
                    for count, live in ((1, 4 * largest), (2, 6 * largest))
                ]
        swaps: list[dict[str, Any]] = [{}]
        if strategy.offload.uses_nvme:
            swaps += [_swap(base, read=True, write=False), _swap(base, read=True, write=True)]
        larger: list[dict[str, Any]] = [{}]
        if not strategy.relation:
            # A rank of a relation group has few tiles, so that a larger bucket gains little.
            larger.append({"reduce_bucket_elements": 4 * largest})
        if not strategy.relation and strategy.offload is not OffloadMode.NVME:
            larger.append(larger[1] | {"sub_group_elements": 4 * base.sub_group_elements})
        changes += [stream | swap | more for stream in streams for swap in swaps for more in larger]
    fixed = {name.partition(".")[0] for name in constraints.zero_overrides}
    for change in changes:
        if change and not fixed & set(change):
            yield KnobSet(base.model_copy(update=change), minimal_memory=False)


def _minimal_knobs(
    spec: ModelSpec,
    tile_relations: int | None,
    strategy: Strategy,
    cluster: ClusterSpec,
    constraints: SearchConstraints,
    relation_ranks: int,
) -> ZeroSpec:
    base = choose_zero(
        spec,
        tile_relations,
        strategy.stage,
        cluster.world_size,
        offload=strategy.offload,
        nvme_path=constraints.nvme_path,
        ratio=strategy.ratio,
        relation_ranks=relation_ranks,
    )
    if strategy.hpz:
        rounds = dict.fromkeys(("quantized_weights", "quantized_gradients"), strategy.quantized)
        base = base.model_copy(update={"hpz_ranks": cluster.ranks_per_node, **rounds})
    return override_zero(base, constraints.zero_overrides) if constraints.zero_overrides else base


def _swap(base: ZeroSpec, *, read: bool, write: bool) -> dict[str, Any]:
    buffers = {"pipeline_read": read, "pipeline_write": write, "buffer_count": min_buffers(read, write)}
    return {"offload_optimizer": base.offload_optimizer.model_copy(update=buffers)}


Stage: TypeAlias = Literal[0, 1, 2, 3]
Objective: TypeAlias = Literal["time", "nodes", "cost", "memory"]
Checkpointing: TypeAlias = Literal["none", "block", "offload"]

HEADROOM = 0.08
"""Default fraction of every memory that stays free."""
SAMPLES_PER_RANK = 8
"""Default samples per rank and optimizer step."""


class SearchConstraints(Schema):
    """What the user fixes; None leaves a choice to the search."""

    global_batch: Positive | None = None
    """Samples of an optimizer step over all ranks; None is micro-batch times accumulation, or 8 per rank."""
    micro_batch: Positive | None = None
    """Samples per rank and forward pass."""
    gradient_accumulation_steps: Positive | None = stored_as("accumulation", None)
    """Micro-batches per optimizer step."""
    engine: ShardingEngine = "deepspeed"
    """What shards: DeepSpeed's ZeRO, or torch's FSDP2."""
    stage: Stage | None = None
    """ZeRO stage."""
    offload: str | None = None
    """Offload mode: none, cpu-optimizer, cpu, nvme-optimizer or nvme."""
    offload_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of the optimizer's sub-groups that are offloaded."""
    nvme_path: Line | None = None
    """A folder on every node's NVMe drive; None rules out the nvme modes."""
    checkpointing: Checkpointing | None = None
    """Activation checkpointing."""
    tile_relations: Positive | None = None
    """Relations per tile."""
    relation_parallel: Positive | None = None
    """Ranks that share out the relations of every table, G; 1 rules relation parallelism out."""
    quantized: bool = False
    """Allow ZeRO++'s quantization, which rounds what ranks exchange."""
    all_nodes: bool = False
    """Use every node of the cluster instead of the best number."""
    headroom: Annotated[float, Field(ge=0, lt=1)] = HEADROOM
    """Fraction of every memory that stays free."""
    minimize: Objective = "time"
    """What the search minimizes: the time of a sample, the nodes, the cost of a sample, or device memory."""
    zero_overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of `ZeroSpec` that replace the search's choice, as in `make_plan`."""


_CONSTRAINTS: TypeAdapter[SearchConstraints] = TypeAdapter(SearchConstraints)


def parse_constraints(fields: Mapping[str, object], what: str) -> SearchConstraints:
    """Return validated constraints.

    Args:
        fields: fields of `SearchConstraints` by name.
        what: name of the fields' origin, for error messages.

    Raises:
        InputError: for an unknown field or a bad value.
    """
    return validate(_CONSTRAINTS, dict(fields), what, tuple(SearchConstraints.model_fields))


def resolve_global_batch(constraints: SearchConstraints, cluster: ClusterSpec) -> int:
    """Samples of an optimizer step: as given, or micro-batch times accumulation times ranks, or 8 per rank."""
    if constraints.global_batch is not None:
        return constraints.global_batch
    micro_batch = constraints.micro_batch or SAMPLES_PER_RANK
    return micro_batch * (constraints.gradient_accumulation_steps or 1) * cluster.world_size
