"""`scaling`: the best plan of a model on a cluster, and how its memory and time grow along an axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import TypeAdapter

from ..common.phases import Tier
from ..common.schema import Schema, validate
from ..config.loading import load_model
from ..config.model import ModelSpec, PatchSpec
from ..config.training import TrainingSpec
from ..costs.parameters import count_parameters
from ..hardware.cluster import ClusterSpec, load_cluster
from ..memory.estimate import estimate_memory
from ..search.candidate import Candidate, with_nodes
from ..search.searcher import Searcher
from ..search.space import SearchConstraints
from ..search.verdicts import shortage
from ..timing.step_time import estimate_step_time
from .comparison import Axis, compared_models, scaled

_TRAINING: TypeAdapter[TrainingSpec] = TypeAdapter(TrainingSpec)
ALPHA_RANK = 16
"""Rank c1 = c2 of the α-Translution that is compared with full Translution."""
GrowthAxis: TypeAlias = Literal["width", "tokens", "depth", "nodes"]
GROWTH_AXES: tuple[GrowthAxis, ...] = ("width", "tokens", "depth", "nodes")
FACTORS = (0.25, 0.5, 1, 2, 4, 8)
"""Multiples of the model's own size."""
NODE_COUNTS = (1, 2, 4, 8, 16)


class PlanPoint(Schema):
    """The best plan of a model with one operator on a cluster; predictions are null if no plan fits."""

    model: str
    operator: str
    cluster: str
    parameters: int
    plan: str | None
    """The plan in words."""
    samples: int
    """Samples of an optimizer step over all ranks."""
    device_bytes: int | None
    """Device peak of a rank."""
    device_low_bytes: int | None
    device_high_bytes: int | None
    """Device peak with every item of the device overhead at its low and at its high end."""
    host_bytes: int | None
    """Peak of pageable host memory of a rank."""
    pinned_bytes: int | None
    """Peak of pinned host memory of a rank."""
    likely_s: float | None
    """Seconds of an optimizer step: likely, low and high prediction."""
    low_s: float | None
    high_s: float | None
    reason: str | None
    """Why no plan fits; null if one does."""


class GrowthPoint(Schema):
    """The best plan of a model at one size along an axis."""

    axis: GrowthAxis
    value: int
    """Model width, tokens per sample, number of layers, or number of nodes."""
    best: PlanPoint


def _describe_candidate(candidate: Candidate) -> str:
    checkpoints = {"none": "", "block": ", checkpointing", "offload": ", checkpoints on the host"}
    batch = f"{candidate.run.training.micro_batch} × {candidate.run.training.gradient_accumulation_steps}"
    return f"{candidate.strategy.text}{checkpoints[candidate.run.model.checkpointing]}, {batch} samples"


def _closest_reason(searcher: Searcher) -> str:
    closest = min(searcher.closest.values(), key=lambda candidate: candidate.peak_utilization, default=None)
    if closest is None:
        return next(iter(searcher.infeasible.values()), "no plan was possible")
    capacity = searcher.capacities[closest.nodes]
    if closest.peak_utilization <= 1:
        return f"{closest.strategy.text}: fits by the upper bound, but not when it is simulated"
    return f"{closest.strategy.text}: {shortage(closest, capacity)}"


def best_point(spec: ModelSpec, operator: str, cluster: ClusterSpec, training: TrainingSpec) -> PlanPoint:
    """The plan that ``translution plan --all-nodes`` chooses: 8 samples per rank and step, no NVMe, 8% headroom.

    Args:
        spec: the model.
        operator: its operator in words.
        cluster: the cluster, all of whose nodes are used.
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
        return PlanPoint.model_validate(
            dict.fromkeys(PlanPoint.model_fields) | common | {"reason": _closest_reason(searcher)}
        )
    memory, time = estimate_memory(best.run), estimate_step_time(best.run)
    low, high = memory.device_interval_bytes or (memory.peak_bytes, memory.peak_bytes)
    return PlanPoint.model_validate(
        common
        | {
            "plan": _describe_candidate(best),
            "device_bytes": memory.peak_bytes,
            "device_low_bytes": low,
            "device_high_bytes": high,
            "host_bytes": memory.highest(Tier.HOST),
            "pinned_bytes": memory.highest(Tier.PINNED),
            "likely_s": time.likely_s,
            "low_s": time.low_s,
            "high_s": time.high_s,
            "reason": None,
        }
    )


def best_points(spec: ModelSpec, cluster: ClusterSpec, training: TrainingSpec) -> Iterator[PlanPoint]:
    """Yield the best plan of a model with full Translution, α-Translution and attention.

    Args:
        spec: the model; its operator is replaced.
        cluster: the cluster, all of whose nodes are used.
        training: precision and optimizer.

    Raises:
        InputError: as `best_point` does, or if the rank does not suit the model.
    """
    for name, _, model in compared_models(spec, (ALPHA_RANK,)):
        yield best_point(model, name, cluster, training)


def _sizes(spec: ModelSpec, axis: Axis, factors: Sequence[float]) -> list[int]:
    """Steps along an axis, as `comparison.scaled` takes them."""
    own = {
        "width": spec.heads,
        "depth": spec.depth,
        "tokens": max(spec.grid[-2:]) if isinstance(spec, PatchSpec) else max(1, spec.tokens // 64),
    }[axis]
    # A side counts twice: half the patches along each side are a quarter of the tokens.
    root = 0.5 if axis == "tokens" and isinstance(spec, PatchSpec) else 1.0
    return sorted({max(1, round(own * factor**root)) for factor in factors})


def growth_points(
    spec: ModelSpec,
    cluster: ClusterSpec,
    training: TrainingSpec,
    axes: Sequence[GrowthAxis] = GROWTH_AXES,
    factors: Sequence[float] = FACTORS,
) -> Iterator[GrowthPoint]:
    """Yield the best plan at every size along every axis; each takes about a second.

    Args:
        spec: the model in the middle of every axis; its operator is replaced.
        cluster: the cluster; along "nodes" the number of nodes is replaced and the samples per rank stay.
        training: precision and optimizer.
        axes: axes along which the model or the cluster grows.
        factors: multiples of the model's own size, along all axes but "nodes".

    Raises:
        InputError: as `best_points` does.
    """
    for axis in axes:
        for name, _, model in compared_models(spec, (ALPHA_RANK,)):
            if axis == "nodes":
                for nodes in NODE_COUNTS:
                    best = best_point(model, name, with_nodes(cluster, nodes), training)
                    yield GrowthPoint(axis=axis, value=nodes, best=best)
                continue
            for step in _sizes(model, axis, factors):
                value, larger = scaled(model, axis, step)
                yield GrowthPoint(axis=axis, value=value, best=best_point(larger, name, cluster, training))


def scaling(
    model: ModelSpec | Mapping[str, object] | str | Path,
    cluster: ClusterSpec | Mapping[str, object] | str | Path,
    *,
    precision: str = "bf16",
    axes: Sequence[GrowthAxis] = GROWTH_AXES,
    factors: Sequence[float] = FACTORS,
) -> tuple[GrowthPoint, ...]:
    """Find the best plan of three operators at every size along every axis; each takes about a second.

    Args:
        model: the model in the middle of every axis, as `load_model` takes it.
        cluster: the cluster, as `load_cluster` takes it.
        precision: dtype of training: fp32, bf16 or fp16.
        axes: width, tokens, depth or nodes.
        factors: multiples of the model's own size, along all axes but "nodes".

    Raises:
        InputError: for an unknown name, a bad value, or a cluster that lacks a rate.
    """
    training = validate(_TRAINING, {"precision": precision, "data": "synthetic"}, "scaling", ())
    return tuple(growth_points(load_model(model), load_cluster(cluster), training, axes, factors))
