"""What a search may choose: stages, offload, batches, tiles and knobs, as far as the user has left them open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..common.errors import InputError, nearest
from ..config.model import ModelSpec
from ..config.training import TrainingSpec
from ..config.zero import ZeroSpec, min_buffers
from ..costs.parameters import table_entries
from ..hardware.cluster import ClusterSpec
from ..plans.defaults import OFFLOAD, choose_tile, choose_zero, override_zero
from .constraints import SearchConstraints, Stage

RATIOS = (0.25, 0.5, 0.75)


class Strategy(NamedTuple):
    """A stage and what leaves the device."""

    stage: Stage
    offload: str
    ratio: float = 1.0

    @property
    def text(self) -> str:
        """For a reader."""
        part = f", {self.ratio:.0%} of it" if self.ratio < 1 else ""
        names = {
            "none": "no offload",
            "cpu-optimizer": f"optimizer on the host{part}",
            "cpu": "all on the host",
            "nvme-optimizer": "optimizer on NVMe",
            "nvme": "all on NVMe",
        }
        return f"ZeRO-{self.stage}, {names[self.offload]}"


def strategies(constraints: SearchConstraints, cluster: ClusterSpec) -> tuple[list[Strategy], dict[Strategy, str]]:
    """The families to try, and why others are not.

    Raises:
        InputError: for an unknown mode of offload.
    """
    if constraints.offload is not None and constraints.offload not in OFFLOAD:
        allowed, hint = ", ".join(OFFLOAD), nearest(constraints.offload, OFFLOAD)
        raise InputError(f"offload: {constraints.offload!r} is not allowed: must be one of {allowed}{hint}")
    every = [Strategy(0, "none")]
    every += [Strategy(stage, offload) for stage in (1, 2) for offload in ("none", "cpu-optimizer")]
    every += [Strategy(3, offload) for offload in OFFLOAD]
    ratios = RATIOS if constraints.offload_ratio in (None, 1.0) else (constraints.offload_ratio,)
    every += [Strategy(3, "cpu-optimizer", ratio) for ratio in ratios]
    chosen, infeasible = [], {}
    for strategy in every:
        if constraints.stage not in (None, strategy.stage) or constraints.offload not in (None, strategy.offload):
            continue
        if constraints.offload_ratio not in (None, strategy.ratio):
            continue
        if "nvme" in strategy.offload and constraints.nvme_path is None:
            if constraints.offload is None:
                infeasible[strategy] = "no path on an NVMe drive was given (--nvme-path)"
                continue
        elif strategy.ratio < 1 and cluster.device == "cpu" and constraints.offload_ratio is None:
            # A CPU rank's device is its host: a part of the optimizer has nowhere else to be.
            continue
        chosen.append(strategy)
    return chosen, infeasible


def node_counts(cluster: ClusterSpec, constraints: SearchConstraints) -> list[int]:
    """Numbers of nodes to try, the most first: halves of the whole, down to one.

    For time alone only the first half is worth a look: fewer nodes are faster at most where a network bounds.
    """
    counts = [cluster.nodes]
    fewest = 1 if constraints.minimize != "time" else (cluster.nodes + 1) // 2
    while not constraints.all_nodes and counts[-1] > fewest:
        counts.append((counts[-1] + 1) // 2)
    return counts


def batches(
    constraints: SearchConstraints, training: TrainingSpec, global_batch: int, world_size: int
) -> list[tuple[int, int]]:
    """Pairs of micro-batch and accumulation that make the global batch.

    Args:
        wishes: may fix either.
        training: unused fields stay.
        global_batch: samples of a step.
        ranks: that share them.
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


def _spread(pairs: list[tuple[int, int]], largest_that_fits: int) -> list[tuple[int, int]]:
    """At most so many, evenly from first to last."""
    if len(pairs) <= largest_that_fits:
        return pairs
    step = (len(pairs) - 1) / (largest_that_fits - 1)
    return [pairs[round(number * step)] for number in range(largest_that_fits)]


def tiles(spec: ModelSpec, world_size: int, stage: int, constraints: SearchConstraints) -> list[int | None]:
    """Relations per tile to try.

    Raises:
        InputError: if the asked one is out of range.
    """
    relations = table_entries(spec)
    chosen = choose_tile(spec, world_size)
    if constraints.tile_relations is not None:
        if constraints.tile_relations > relations:
            raise InputError(
                f"tile_relations: {constraints.tile_relations} is not allowed: must be from 1 to {relations}"
            )
        return [constraints.tile_relations]
    if chosen is None or stage < 3:
        # Below stage 3 nothing is gathered by tiles.
        return [chosen]
    sizes = (chosen, chosen * 2, chosen * 4, chosen // 2, chosen // 4)
    return list(dict.fromkeys(min(relations, max(1, size)) for size in sizes))


@dataclass(frozen=True, slots=True)
class KnobSet:
    """Knobs of a family, beside those that `choose_zero` gives."""

    zero: ZeroSpec
    minimal_memory: bool
    """Whether no other variant of the family needs less of the device."""


def knob_sets(
    spec: ModelSpec,
    tile_relations: int | None,
    strategy: Strategy,
    cluster: ClusterSpec,
    constraints: SearchConstraints,
) -> Iterator[KnobSet]:
    """Knobs to try, the leanest first.

    Raises:
        InputError: if the user's knobs do not go with the family.
    """
    base = choose_zero(
        spec,
        tile_relations,
        strategy.stage,
        cluster.world_size,
        offload=strategy.offload,
        nvme_path=constraints.nvme_path,
        ratio=strategy.ratio,
    )
    if constraints.zero_overrides:
        base = override_zero(base, constraints.zero_overrides)
    yield KnobSet(base, minimal_memory=True)
    on_gpu, largest = cluster.device == "cuda", base.reduce_bucket_elements
    changes: list[dict[str, Any]] = []
    if strategy.stage in (1, 2) and on_gpu:
        changes.append({"overlap_comm": True})
    if strategy.stage == 3:
        streams: list[dict[str, Any]] = [{}]
        if on_gpu:
            streams.append({"overlap_comm": True})
            if strategy.offload != "nvme":
                # DeepSpeed prefetches at least one whole module, and no parameters that lie on NVMe.
                streams += [
                    {"overlap_comm": True, "prefetch_bucket_elements": count * largest, "max_live_elements": live}
                    for count, live in ((1, 4 * largest), (2, 6 * largest))
                ]
        swaps: list[dict[str, Any]] = [{}]
        if "nvme" in strategy.offload:
            swaps += [_swap(base, read=True, write=False), _swap(base, read=True, write=True)]
        larger: list[dict[str, Any]] = [{}, {"reduce_bucket_elements": 4 * largest}]
        if strategy.offload != "nvme":
            larger.append(larger[1] | {"sub_group_elements": 4 * base.sub_group_elements})
        changes += [stream | swap | more for stream in streams for swap in swaps for more in larger]
    fixed = {name.partition(".")[0] for name in constraints.zero_overrides}
    for change in changes:
        if change and not fixed & set(change):
            yield KnobSet(base.model_copy(update=change), minimal_memory=False)


def _swap(base: ZeroSpec, *, read: bool, write: bool) -> dict[str, Any]:
    buffers = {"pipeline_read": read, "pipeline_write": write, "buffer_count": min_buffers(read, write)}
    return {"offload_optimizer": base.offload_optimizer.model_copy(update=buffers)}
