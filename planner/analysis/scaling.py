"""The best plan of a model on a cluster, and how its memory and time grow along an axis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

from ..common.phases import Tier
from ..common.schema import Schema
from ..config.model import ModelSpec, VitSpec
from ..config.training import TrainingSpec
from ..costs.parameters import count_parameters
from ..hardware.cluster import ClusterSpec
from ..search.candidate import Candidate, replay_memory, with_nodes
from ..search.constraints import SearchConstraints
from ..search.explain import shortage
from ..search.searcher import Searcher
from ..timing.step_time import estimate_step_time
from .compare import Axis, operators, scaled

ALPHA_RANK = 16
"""c1 = c2 of the α-Translution that is set beside the full one."""
GrowthAxis: TypeAlias = Literal["width", "tokens", "depth", "nodes"]
GROWTH_AXES: tuple[GrowthAxis, ...] = ("width", "tokens", "depth", "nodes")
FACTORS = (0.25, 0.5, 1, 2, 4, 8)
"""Of the model's own size."""
NODE_COUNTS = (1, 2, 4, 8, 16)


class PlanPoint(Schema):
    """The best plan of one operator on a cluster; figures are null where no plan fits."""

    model: str
    operator: str
    cluster: str
    parameters: int
    plan: str | None
    """In words."""
    samples: int
    """Of a step, over all ranks."""
    device_bytes: int | None
    """The highest of a rank; likewise what follows."""
    device_low_bytes: int | None
    device_high_bytes: int | None
    """With every constant of the GPU at its low and its high end."""
    host_bytes: int | None
    """Pageable."""
    pinned_bytes: int | None
    likely_s: float | None
    """Of a step."""
    low_s: float | None
    high_s: float | None
    reason: str | None
    """Why nothing fits."""


class GrowthPoint(Schema):
    """A model at one size along an axis."""

    axis: GrowthAxis
    value: int
    """Model width, tokens per sample, layers, or nodes."""
    best: PlanPoint


def _words(candidate: Candidate) -> str:
    checkpoints = {"none": "", "block": ", checkpointing", "offload": ", checkpoints on the host"}
    batch = f"{candidate.training.micro_batch} × {candidate.training.gradient_accumulation_steps}"
    return f"{candidate.strategy.text}{checkpoints[candidate.spec.checkpointing]}, {batch} samples"


def _why_not(searcher: Searcher) -> str:
    closest = min(searcher.closest.values(), key=lambda candidate: candidate.peak_utilization, default=None)
    if closest is None:
        return next(iter(searcher.infeasible.values()), "no plan was possible")
    capacity = searcher.capacities[closest.cluster.nodes]
    if closest.peak_utilization <= 1:
        return f"{closest.strategy.text}: fits by its closed form, not when replayed"
    return f"{closest.strategy.text}: {shortage(closest, capacity)}"


def best_point(spec: ModelSpec, operator: str, cluster: ClusterSpec, training: TrainingSpec) -> PlanPoint:
    """What ``translution plan --all-nodes`` would choose: 8 samples per rank and step, no NVMe, 8% of memory free.

    Args:
        spec: the model.
        operator: its operator in words.
        cluster: whose nodes are all used.
        training: precision and optimizer.

    Raises:
        InputError: if the cluster lacks a rate, or the data does not suit the model.
    """
    searcher = Searcher(spec, cluster, training, SearchConstraints(all_nodes=True))
    best = searcher.best()
    common = {
        "model": spec.name,
        "operator": operator,
        "cluster": cluster.name,
        "parameters": count_parameters(spec).total,
        "samples": searcher.global_batch,
    }
    if best is None:
        return PlanPoint.model_validate(dict.fromkeys(PlanPoint.model_fields) | common | {"reason": _why_not(searcher)})
    memory = replay_memory(best)
    time = estimate_step_time(best.spec, best.cluster, best.training, best.zero, best.tile_relations)
    low, high = memory.device_interval_bytes or (memory.peak_bytes, memory.peak_bytes)
    return PlanPoint.model_validate(
        common
        | {
            "plan": _words(best),
            "device_bytes": memory.peak_bytes,
            "device_low_bytes": low,
            "device_high_bytes": high,
            "host_bytes": memory.highest("host"),
            "pinned_bytes": memory.highest(Tier.PINNED),
            "likely_s": time.likely_s,
            "low_s": time.low_s,
            "high_s": time.high_s,
            "reason": None,
        }
    )


def best_points(spec: ModelSpec, cluster: ClusterSpec, training: TrainingSpec) -> Iterator[PlanPoint]:
    """Full Translution, its low-rank form and attention in a model's place, each with its best plan.

    Args:
        spec: the model; its operator is replaced.
        cluster: whose nodes are all used.
        training: precision and optimizer.

    Raises:
        InputError: as `best_point` does, or if the rank does not suit the model.
    """
    for name, _, model in operators(spec, (ALPHA_RANK,)):
        yield best_point(model, name, cluster, training)


def _sizes(spec: ModelSpec, axis: Axis, factors: Sequence[float]) -> list[int]:
    """Steps along an axis, as `compare.scaled` takes them."""
    own = {
        "width": spec.heads,
        "depth": spec.depth,
        "tokens": max(spec.grid) if isinstance(spec, VitSpec) else max(1, spec.tokens // 64),
    }[axis]
    # Patches count twice: half as many along each side are a quarter as many tokens.
    root = 0.5 if axis == "tokens" and isinstance(spec, VitSpec) else 1.0
    return sorted({max(1, round(own * factor**root)) for factor in factors})


def growth(
    spec: ModelSpec,
    cluster: ClusterSpec,
    training: TrainingSpec,
    axes: Sequence[GrowthAxis] = GROWTH_AXES,
    factors: Sequence[float] = FACTORS,
) -> Iterator[GrowthPoint]:
    """The best plan at every size along every axis; about a second for each.

    Args:
        spec: the model at the middle of every axis; its operator is replaced.
        cluster: where it runs; along "nodes" their number is replaced, with as many samples for each rank.
        training: precision and optimizer.
        axes: along which it grows.
        factors: of its own size, along all axes but "nodes".

    Raises:
        InputError: as `best_points` does.
    """
    for axis in axes:
        for name, _, model in operators(spec, (ALPHA_RANK,)):
            if axis == "nodes":
                for nodes in NODE_COUNTS:
                    best = best_point(model, name, with_nodes(cluster, nodes), training)
                    yield GrowthPoint(axis=axis, value=nodes, best=best)
                continue
            for step in _sizes(model, axis, factors):
                value, larger = scaled(model, axis, step)
                yield GrowthPoint(axis=axis, value=value, best=best_point(larger, name, cluster, training))
