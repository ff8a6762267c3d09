"""`compare`: what full Translution, α-Translution and attention cost, and the smallest cluster that trains each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from ..common.errors import InputError, MissingPackageError
from ..common.progress import OnProgress, ignore_progress
from ..common.schema import Schema, stored_as
from ..common.types import DTYPE_BYTES
from ..config.defaults import default_precision
from ..config.loading import load_model
from ..config.model import ModelSpec, PatchSpec, override
from ..config.model_base import OPERATOR_LABELS
from ..config.training import TrainingSpec, parse_training
from ..costs.optimizer import most_state_bytes, widths
from ..costs.parameters import count_parameters
from ..costs.workload import count_flops
from ..hardware.catalog import find_gpu, load_catalog
from ..hardware.cluster import ClusterSpec, named_cluster
from ..memory.estimate import gathered_floor_bytes, saved_bytes
from ..plans.defaults import choose_tile
from ..search.advice import can_fit, largest_that_fits
from ..search.searcher import Searcher
from ..search.space import SearchConstraints
from ..simulator.network.ops import DtypeSizes
from .traffic import TrafficPoint, traffic_points

ALPHA_RANKS = (4, 8, 16, 32, 64)
MAX_COMPARED_NODES = 512
THRESHOLD_NODES = (1, 2, 8)
"""Numbers of nodes for which `thresholds` finds the largest model."""
_ROWS_PER_THRESHOLD = 8
"""How often as long the search of a largest model takes as a row, for estimates of what is left."""
if TYPE_CHECKING:
    import pandas

Axis: TypeAlias = Literal["width", "tokens", "depth"]
AXES: tuple[Axis, ...] = ("width", "tokens", "depth")
NO_OFFLOAD = SearchConstraints(offload="none")


class ComparisonRow(Schema):
    """Costs of a model with one operator."""

    model: str
    operator: str
    alpha_rank: int | None
    """Rank c1 = c2 of α-Translution; null for other operators."""
    parameters: int
    training_flops: int
    """FLOPs per sample, forward and backward."""
    states_bytes: int
    """Bytes of parameters, gradients, master copy and moments over all ranks."""
    saved_bytes: int = stored_as("kept_bytes")
    """Bytes that the forward pass of one sample saves for backward."""
    floor_bytes: int
    """Bytes of full tensors that ZeRO-3 needs at least on every rank."""
    cluster: str | None
    """Smallest cluster that trains it without offload; null if none up to 512 nodes does."""
    offload_cluster: str | None
    """Smallest cluster that trains it with states or parameters on the host."""
    ranks: int | None
    """Ranks of ``cluster``."""
    sample_s: float | None
    """Predicted seconds per sample of the best plan on ``cluster``."""


class Threshold(Schema):
    """Largest size along an axis that a number of nodes trains without offload."""

    axis: Axis
    operator: str
    nodes: int
    largest: int | None
    """Null if not even the smallest size fits."""


class Comparison(Schema):
    """Costs of models with every compared operator, on clusters of one GPU."""

    gpu: str
    precision: str
    rows: tuple[ComparisonRow, ...]
    thresholds: tuple[Threshold, ...]
    """For the first model: the largest size along each axis that one, two and eight nodes train."""
    traffic: tuple[TrafficPoint, ...] = ()
    """For the first model with full Translution: what ZeRO-3 and relation parallelism send per GPU and step."""

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows as a table with one column per field.

        Raises:
            MissingPackageError: if pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            raise MissingPackageError("pandas is missing: pip install 'translution-scale[report]'") from None
        return pandas.DataFrame([row.model_dump() for row in self.rows])


class ScalePoint(Schema):
    """Memory of a model with one operator at one size along an axis."""

    axis: Axis
    value: int
    """Model width, tokens per sample, or number of layers."""
    operator: str
    states_bytes: int
    saved_bytes: int = stored_as("kept_bytes")


def training_state_bytes(training: TrainingSpec, parameters: int) -> int:
    """Return the bytes of all parameters, accumulated gradients, master copies and moments."""
    width = training.dtype_bytes + DTYPE_BYTES[training.accumulation_dtype] + widths(training)[0]
    return parameters * width + most_state_bytes(training, parameters, 1, 0)


def compared_models(
    spec: ModelSpec, alpha_ranks: Sequence[int] = ALPHA_RANKS
) -> Iterator[tuple[str, int | None, ModelSpec]]:
    """Yield the compared models: operator in words, rank, spec."""
    base = override(spec, operator="translution", relative_layers="all", rotary=False)
    yield OPERATOR_LABELS["translution"], None, base
    for rank in alpha_ranks:
        yield OPERATOR_LABELS["alpha"], rank, override(base, operator="alpha", c1=rank, c2=rank)
    yield OPERATOR_LABELS["attention"], None, override(base, operator="attention")


def growing_clusters(gpu: str) -> Iterator[ClusterSpec]:
    """Yield larger and larger clusters of a GPU: parts of a node, then powers of two of full nodes.

    Raises:
        InputError: for an unknown GPU.
    """
    name, known = find_gpu(gpu)
    whole = int(load_catalog().nodes[known.node].gpus.value)
    count = 1
    while count < whole:
        yield named_cluster(f"{count}x{name}")
        count *= 2
    nodes = 1
    while nodes <= MAX_COMPARED_NODES:
        yield named_cluster(f"{nodes}x{whole}x{name}")
        nodes *= 2


def smallest_cluster(
    spec: ModelSpec, gpu: str, training: TrainingSpec, constraints: SearchConstraints
) -> ClusterSpec | None:
    """First of `growing_clusters` that trains a model with one sample per rank; None if none does."""
    for cluster in growing_clusters(gpu):
        if can_fit(spec, cluster, training, constraints):
            return cluster
    return None


def comparison_rows(
    spec: ModelSpec, gpu: str, training: TrainingSpec, alpha_ranks: Sequence[int] = ALPHA_RANKS
) -> Iterator[ComparisonRow]:
    """Yield the costs of a model with every compared operator.

    Args:
        spec: the model; its operator is replaced.
        gpu: GPU of the clusters.
        training: precision and optimizer.
        alpha_ranks: ranks c1 = c2 of α-Translution.

    Raises:
        InputError: for an unknown GPU, or a rank that does not suit the model.
    """
    sizes = DtypeSizes.of_training(training, "cuda")
    for name, rank, model in compared_models(spec, alpha_ranks):
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
            states_bytes=training_state_bytes(training, parameters),
            saved_bytes=saved_bytes(model, 1, sizes),
            floor_bytes=gathered_floor_bytes(
                model, training, choose_tile(model, 1 if cluster is None else cluster.world_size)
            ),
            cluster=None if cluster is None else cluster.name,
            offload_cluster=None if offload is None else offload.name,
            ranks=None if cluster is None else cluster.world_size,
            sample_s=None if best is None else best.sample_seconds,
        )


def compare(
    models: Iterable[ModelSpec | Mapping[str, object] | str | Path],
    *,
    gpu: str = "H100",
    precision: str | None = None,
    alpha_ranks: Sequence[int] = ALPHA_RANKS,
    on_progress: OnProgress = ignore_progress,
) -> Comparison:
    """Compare full Translution with α-Translution and attention in the place of each model.

    Args:
        models: specs, preset names, files or mappings, as `load_model` takes them.
        gpu: GPU of the clusters.
        precision: dtype of training: fp32, bf16 or fp16; by default that of `default_precision`.
        alpha_ranks: ranks c1 = c2 of α-Translution.
        on_progress: called after each operator of a model and each of the largest models.

    Raises:
        InputError: for an unknown name, a bad value, or a rank that does not suit a model.
    """
    specs = [load_model(model) for model in models]
    gpu, _ = find_gpu(gpu)
    for rank in alpha_ranks:
        if rank < 1:
            raise InputError(f"alpha_rank: {rank} is not allowed: must be at least 1")
    if precision is None:
        precision = default_precision(named_cluster(f"1x{gpu}"))
    training = parse_training({"precision": precision, "data": "synthetic"}, "compare")
    total = len(specs) * (len(alpha_ranks) + 2) + len(AXES) * len(THRESHOLD_NODES) * _ROWS_PER_THRESHOLD
    rows, limits = [], []
    for row in (row for spec in specs for row in comparison_rows(spec, gpu, training, alpha_ranks)):
        rows.append(row)
        on_progress(len(rows), total)
    for limit in (limit for spec in specs[:1] for limit in thresholds(spec, gpu, training)):
        limits.append(limit)
        on_progress(len(rows) + len(limits) * _ROWS_PER_THRESHOLD, total)
    _, _, full = next(compared_models(specs[0]))
    traffic = tuple(traffic_points(full))
    return Comparison(gpu=gpu, precision=precision, rows=tuple(rows), thresholds=tuple(limits), traffic=traffic)


def scaled(spec: ModelSpec, axis: Axis, step: int) -> tuple[int, ModelSpec]:
    """Resize a model along an axis.

    Args:
        spec: the model.
        axis: what changes.
        step: heads (width), patches along a side or multiples of 64 tokens (tokens), or layers (depth).

    Returns:
        The value on the axis (model width, tokens or layers), and the resized model.
    """
    if axis == "width":
        model = override(spec, heads=step, dim=step * spec.head_dim)
        return model.dim, model
    if axis == "depth":
        return step, override(spec, depth=step)
    if isinstance(spec, PatchSpec):
        model = override(spec, image=[step * size for size in spec.patch_extents[-2:]])
    else:
        model = override(spec, context=64 * step)
    return model.tokens, model


def _steps(spec: ModelSpec, axis: Axis) -> list[int]:
    """Steps of `scaled` from an eighth to four times the model's own size."""
    own = {
        "width": spec.heads,
        "depth": spec.depth,
        "tokens": max(spec.grid[-2:]) if isinstance(spec, PatchSpec) else max(1, spec.tokens // 64),
    }[axis]
    return sorted({max(1, round(own * factor)) for factor in (0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4)})


def scale_points(spec: ModelSpec, training: TrainingSpec, alpha_rank: int = 16) -> Iterator[ScalePoint]:
    """Yield the memory at every size along width, tokens and depth, for each of three operators."""
    sizes = DtypeSizes.of_training(training, "cuda")
    for name, _, model in compared_models(spec, (alpha_rank,)):
        for axis in AXES:
            for step in _steps(spec, axis):
                value, larger = scaled(model, axis, step)
                states = training_state_bytes(training, count_parameters(larger).total)
                kept = saved_bytes(larger, 1, sizes)
                yield ScalePoint(axis=axis, value=value, operator=name, states_bytes=states, saved_bytes=kept)


def thresholds(spec: ModelSpec, gpu: str, training: TrainingSpec, axes: Sequence[Axis] = AXES) -> Iterator[Threshold]:
    """Yield the largest full Translution that one, two and eight nodes train without offload.

    Args:
        spec: the model.
        gpu: GPU of the nodes.
        training: precision and optimizer.
        axes: axes along which the model grows.

    Raises:
        InputError: for an unknown GPU.
    """
    full_nodes = [
        cluster for cluster in growing_clusters(gpu) if cluster.nodes in THRESHOLD_NODES and _has_full_nodes(cluster)
    ]
    _, _, model = next(compared_models(spec))
    for axis in axes:
        for cluster in full_nodes:

            def fits(step: int, axis: Axis = axis, cluster: ClusterSpec = cluster) -> bool:
                return can_fit(scaled(model, axis, step)[1], cluster, training, NO_OFFLOAD)

            step = largest_that_fits(fits, 1, 8 * max(_steps(spec, axis)))
            largest = None if step is None else scaled(model, axis, step)[0]
            yield Threshold(axis=axis, operator=OPERATOR_LABELS["translution"], nodes=cluster.nodes, largest=largest)


def _has_full_nodes(cluster: ClusterSpec) -> bool:
    _, known = find_gpu(cluster.gpu or "")
    return cluster.ranks_per_node == int(load_catalog().nodes[known.node].gpus.value)
