"""Full Translution against its low-rank form and attention: what each costs, and the least cluster that trains it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

from ..common.schema import Schema, stored_as
from ..config.model import ModelSpec, VitSpec, override
from ..config.training import DTYPE_BYTES, TrainingSpec
from ..costs.flops import count_flops
from ..costs.optimizer_state import moments, widths
from ..costs.parameters import count_parameters
from ..hardware.catalog import catalog, find_gpu
from ..hardware.cluster import ClusterSpec, named_cluster
from ..memory.activations import saved_bytes
from ..memory.estimate import gathered_floor_bytes
from ..plans.defaults import choose_tile
from ..search.advice import largest_that_fits, min_utilization
from ..search.constraints import SearchConstraints
from ..search.searcher import Searcher
from ..simulator.network.ops import DtypeSizes

ALPHA_RANKS = (4, 8, 16, 32, 64)
MOST_NODES = 512
NODES = (1, 2, 8)
"""Numbers of nodes of which it is said how large a model may be."""
Axis: TypeAlias = Literal["width", "tokens", "depth"]
AXES: tuple[Axis, ...] = ("width", "tokens", "depth")
NO_OFFLOAD = SearchConstraints(offload="none")


class ComparisonRow(Schema):
    """One operator in one model."""

    model: str
    operator: str
    alpha_rank: int | None
    """c1 = c2; null for other operators."""
    parameters: int
    training_flops: int
    """Per sample, forward and backward."""
    states_bytes: int
    """Parameters, gradients, master copy and moments over all ranks."""
    saved_bytes: int = stored_as("kept_bytes")
    """Kept for backward by one sample."""
    floor_bytes: int
    """The least that ZeRO-3 needs whole on every rank."""
    cluster: str | None
    """The smallest that trains it without offload; null if none up to 512 nodes does."""
    offload_cluster: str | None
    """The smallest with states or parameters on the host."""
    ranks: int | None
    """Of the former."""
    sample_s: float | None
    """Predicted there, by its best plan."""


class ScalePoint(Schema):
    """One operator at one size along an axis."""

    axis: Axis
    value: int
    """Model width, tokens per sample, or layers."""
    operator: str
    states_bytes: int
    saved_bytes: int = stored_as("kept_bytes")


class Threshold(Schema):
    """The largest size along an axis that so many nodes train without offload."""

    axis: Axis
    operator: str
    nodes: int
    largest: int | None
    """Null if not even the smallest does."""


def state_bytes_per_parameter(training: TrainingSpec) -> int:
    """Parameter, accumulated gradient, master copy and moments."""
    wide, site = widths(training)
    return training.dtype_bytes + DTYPE_BYTES[training.accumulation_dtype] + wide + site * moments(training)


def operators(spec: ModelSpec, alpha_ranks: Sequence[int] = ALPHA_RANKS) -> Iterator[tuple[str, int | None, ModelSpec]]:
    """The compared models: name, rank and spec."""
    base = override(spec, operator="translution", relative_layers="all", rotary=False)
    yield "full Translution", None, base
    for rank in alpha_ranks:
        yield "α-Translution", rank, override(base, operator="alpha", c1=rank, c2=rank)
    yield "attention", None, override(base, operator="attention")


def clusters(gpu: str) -> Iterator[ClusterSpec]:
    """Ever larger clusters of a GPU: parts of a node, then twice as many nodes each time.

    Raises:
        InputError: for an unknown GPU.
    """
    name, known = find_gpu(gpu)
    whole = int(catalog().nodes[known.node].gpus.value)
    count = 1
    while count < whole:
        yield named_cluster(f"{count}x{name}")
        count *= 2
    nodes = 1
    while nodes <= MOST_NODES:
        yield named_cluster(f"{nodes}x{whole}x{name}")
        nodes *= 2


def smallest_cluster(
    spec: ModelSpec, gpu: str, training: TrainingSpec, constraints: SearchConstraints
) -> ClusterSpec | None:
    """The first of `clusters` that trains a model with one sample per rank; None if none does."""
    for cluster in clusters(gpu):
        if min_utilization(spec, cluster, training, constraints) <= 1:
            return cluster
    return None


def compare(
    spec: ModelSpec, gpu: str, training: TrainingSpec, alpha_ranks: Sequence[int] = ALPHA_RANKS
) -> Iterator[ComparisonRow]:
    """Every operator in a model's place.

    Args:
        spec: the model; its operator is replaced.
        gpu: of which the clusters are.
        training: precision and optimizer.
        alpha_ranks: c1 = c2 of the low-rank rows.

    Raises:
        InputError: for an unknown GPU, or a rank that does not suit the model.
    """
    sizes = DtypeSizes.of(training.dtype_bytes, "cuda")
    for name, rank, model in operators(spec, alpha_ranks):
        cluster = smallest_cluster(model, gpu, training, NO_OFFLOAD)
        offload = smallest_cluster(model, gpu, training, SearchConstraints())
        best = None if cluster is None else Searcher(model, cluster, training, NO_OFFLOAD).best()
        parameters = count_parameters(model).total
        yield ComparisonRow(
            model=spec.name,
            operator=name,
            alpha_rank=rank,
            parameters=parameters,
            training_flops=count_flops(model).training_step,
            states_bytes=parameters * state_bytes_per_parameter(training),
            saved_bytes=saved_bytes(model, 1, sizes),
            floor_bytes=gathered_floor_bytes(
                model, training, choose_tile(model, 1 if cluster is None else cluster.world_size)
            ),
            cluster=None if cluster is None else cluster.name,
            offload_cluster=None if offload is None else offload.name,
            ranks=None if cluster is None else cluster.world_size,
            sample_s=None if best is None else best.sample_seconds,
        )


def scaled(spec: ModelSpec, axis: Axis, step: int) -> tuple[int, ModelSpec]:
    """A model at one size along an axis: heads, patches along a side (or 64 tokens), or layers.

    Returns:
        The value on the axis, and the model.
    """
    if axis == "width":
        model = override(spec, heads=step, dim=step * spec.head_dim)
        return model.dim, model
    if axis == "depth":
        return step, override(spec, depth=step)
    if isinstance(spec, VitSpec):
        model = override(spec, image=[step * size for size in spec.patch])
    else:
        model = override(spec, context=64 * step)
    return model.tokens, model


def _steps(spec: ModelSpec, axis: Axis) -> list[int]:
    """Sizes from an eighth to four times the model's."""
    own = {
        "width": spec.heads,
        "depth": spec.depth,
        "tokens": max(spec.grid) if isinstance(spec, VitSpec) else max(1, spec.tokens // 64),
    }[axis]
    return sorted({max(1, round(own * factor)) for factor in (0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4)})


def scale(spec: ModelSpec, training: TrainingSpec, alpha_rank: int = 16) -> Iterator[ScalePoint]:
    """Memory against width, tokens and depth, for full Translution, its low-rank form and attention."""
    sizes = DtypeSizes.of(training.dtype_bytes, "cuda")
    for name, _, model in operators(spec, (alpha_rank,)):
        for axis in AXES:
            for step in _steps(spec, axis):
                value, larger = scaled(model, axis, step)
                states = count_parameters(larger).total * state_bytes_per_parameter(training)
                kept = saved_bytes(larger, 1, sizes)
                yield ScalePoint(axis=axis, value=value, operator=name, states_bytes=states, saved_bytes=kept)


def thresholds(spec: ModelSpec, gpu: str, training: TrainingSpec, axes: Sequence[Axis] = AXES) -> Iterator[Threshold]:
    """Where full Translution starts to need more than one node, two, eight.

    Args:
        spec: the model.
        gpu: of which the nodes are.
        training: precision and optimizer.
        axes: along which it grows.

    Raises:
        InputError: for an unknown GPU.
    """
    whole = [cluster for cluster in clusters(gpu) if cluster.nodes in NODES and _is_whole(cluster)]
    _, _, model = next(operators(spec))
    for axis in axes:
        for cluster in whole:

            def fits(step: int, axis: Axis = axis, cluster: ClusterSpec = cluster) -> bool:
                return min_utilization(scaled(model, axis, step)[1], cluster, training, NO_OFFLOAD) <= 1

            step = largest_that_fits(fits, 1, 8 * max(_steps(spec, axis)))
            largest = None if step is None else scaled(model, axis, step)[0]
            yield Threshold(axis=axis, operator="full Translution", nodes=cluster.nodes, largest=largest)


def _is_whole(cluster: ClusterSpec) -> bool:
    _, known = find_gpu(cluster.gpu or "")
    return cluster.ranks_per_node == int(catalog().nodes[known.node].gpus.value)
