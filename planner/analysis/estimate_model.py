"""`estimate`: what a model costs before a plan is chosen, next to the same model with other operators.

Costs are exact parameter counts, FLOPs per sample, activations saved for backward, and, for a cluster, the memory of
a rank at each ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.schema import Schema, stored_as
from ..config.defaults import GPU_PRECISION, default_precision
from ..config.loading import load_model
from ..config.model import ModelSpec, parse_model_spec
from ..config.model_base import OPERATOR_LABELS as OPERATOR_LABELS
from ..config.model_base import OPERATORS, Operator
from ..config.parallel import ParallelSpec
from ..config.run_config import RunConfig
from ..config.training import TrainingSpec, parse_training
from ..costs.parameters import ParameterCount, count_parameters
from ..costs.workload import FlopCount, count_flops
from ..hardware.cluster import ClusterSpec, load_cluster
from ..memory.estimate import MemoryEstimate, estimate_memory, saved_bytes
from ..plans.defaults import choose_tile, choose_zero
from ..simulator.network.ops import DtypeSizes

ADAMW_STATE_BYTES = 16
"""Bytes per parameter of training in fp32 with AdamW: parameter, gradient and two moments."""


class SavedActivations(Schema):
    """Bytes that one micro-batch's forward pass saves for backward."""

    published: int
    """By the published code, which gathers a matrix for every pair of tokens."""
    ours: int
    """By the grouped operator of this project."""


class OperatorCosts(Schema):
    """Costs of a model with one operator."""

    operator: str
    parameters: ParameterCount
    training_state_bytes: int
    """Parameters, gradients and AdamW's moments in fp32, over all ranks."""
    activations: SavedActivations = stored_as("activations_bytes")
    flops: FlopCount = stored_as("flops_per_sample")
    """FLOPs per sample."""


class ModelCosts(Schema):
    """Costs of a model, and of the same model with every other operator."""

    model: ModelSpec
    precision: str
    micro_batch: int
    """Samples per rank and forward pass."""
    comparison: tuple[OperatorCosts, ...]
    """The model's own operator first."""
    world_size: int | None
    """Number of ranks that share the training state; null without a cluster."""
    stages: dict[int, MemoryEstimate]
    """Memory of one rank by ZeRO stage, without offload; empty without a cluster."""
    relation_parallel: int = 1
    """Ranks that share out the relations in the memory of a rank, G."""

    @property
    def own(self) -> OperatorCosts:
        """Costs with the model's own operator."""
        return self.comparison[0]

    @property
    def parameters(self) -> ParameterCount:
        """Exact parameter counts, in total and per component."""
        return self.own.parameters

    @property
    def flops(self) -> FlopCount:
        """FLOPs per sample, forward and training step."""
        return self.own.flops

    @property
    def activations(self) -> SavedActivations:
        """Bytes that one micro-batch saves for backward."""
        return self.own.activations

    @property
    def training_state_bytes(self) -> int:
        """Parameters, gradients and AdamW's moments in fp32, over all ranks."""
        return self.own.training_state_bytes

    def document(self) -> dict[str, Any]:
        """The costs as one JSON document, as ``translution estimate --json`` prints it."""
        head = {
            "model": self.model.model_dump(mode="json"),
            "precision": self.precision,
            "micro_batch": self.micro_batch,
        }
        own = self.own.model_dump(mode="json", exclude={"operator"})
        comparison = [costs.model_dump(mode="json") for costs in self.comparison]
        stages = [{"stage": stage, **estimate.model_dump(mode="json")} for stage, estimate in self.stages.items()]
        group = {"relation_parallel": self.relation_parallel} if self.relation_parallel > 1 else {}
        return head | own | {"comparison": comparison, "per_rank": {"ranks": self.world_size, **group, "zero": stages}}


def operator_costs(spec: ModelSpec, micro_batch: int, sizes: DtypeSizes) -> OperatorCosts:
    """Costs of one model.

    Args:
        spec: the model.
        micro_batch: samples of a forward pass.
        sizes: bytes per value.
    """
    parameters = count_parameters(spec)
    return OperatorCosts(
        operator=spec.operator,
        parameters=parameters,
        training_state_bytes=parameters.total * ADAMW_STATE_BYTES,
        activations=SavedActivations(
            published=saved_bytes(spec, micro_batch, sizes, "gather"), ours=saved_bytes(spec, micro_batch, sizes)
        ),
        flops=count_flops(spec),
    )


def with_operator(spec: ModelSpec, operator: Operator) -> ModelSpec | None:
    """Return the model with another operator, or None if that operator contradicts another field."""
    if operator == spec.operator:
        return spec
    try:
        fields = spec.model_dump() | {"operator": operator}
        fields["rotary"] = spec.rotary and operator in ("attention", "alpha")
        if operator in ("attention", "absolute"):
            fields["window"] = None
        return parse_model_spec(fields)
    except InputError:
        return None


def compare_operators(spec: ModelSpec, micro_batch: int, sizes: DtypeSizes) -> tuple[OperatorCosts, ...]:
    """Costs of a model with its own operator, then with every other operator that it allows."""
    order: tuple[Operator, ...] = (spec.operator, *(name for name in OPERATORS if name != spec.operator))
    models = (with_operator(spec, name) for name in order)
    return tuple(operator_costs(model, micro_batch, sizes) for model in models if model is not None)


def memory_by_stage(
    spec: ModelSpec, cluster: ClusterSpec, training: TrainingSpec, relation_ranks: int = 1
) -> dict[int, MemoryEstimate]:
    """Memory of one rank at each ZeRO stage, with default knobs and without offload.

    Args:
        spec: the model.
        cluster: the ranks.
        training: precision and batch.
        relation_ranks: ranks that share out the relations, G; ZeRO partitions over the others.

    Raises:
        InputError: if the number does not suit the ranks or the model.
    """
    estimates, parallel = {}, ParallelSpec(relation=relation_ranks)
    for stage in (0, 1, 2, 3):
        # Only stage 3 gathers tiles one by one.
        tile = choose_tile(spec, cluster.world_size, relation_ranks) if stage == 3 else None
        zero = choose_zero(spec, tile, stage, cluster.world_size, relation_ranks=relation_ranks)
        estimates[stage] = estimate_memory(RunConfig(spec, cluster, training, zero, tile, parallel))
    return estimates


def estimate(
    model: ModelSpec | Mapping[str, object] | str | Path,
    *,
    cluster: ClusterSpec | Mapping[str, object] | str | Path | None = None,
    precision: str | None = None,
    micro_batch: int = 1,
    relation_parallel: int = 1,
) -> ModelCosts:
    """Estimate what a model costs.

    Args:
        model: a spec, a preset name, a file or a mapping, as `load_model` takes it.
        cluster: a spec, a name, a file or a mapping, as `load_cluster` takes it; with it the result has the memory of
            a rank at each ZeRO stage.
        precision: dtype of parameters and activations: fp32, bf16 or fp16; by default that of `default_precision`, on
            GPUs without a cluster.
        micro_batch: samples per rank and forward pass.
        relation_parallel: ranks that share out the relations, G, in the memory of a rank; needs a cluster if above 1.

    Raises:
        InputError: for an unknown name or a bad value.
    """
    spec = load_model(model)
    where = None if cluster is None else load_cluster(cluster)
    if precision is None:
        precision = GPU_PRECISION if where is None else default_precision(where)
    if where is None and relation_parallel != 1:
        raise InputError(f"relation_parallel: {relation_parallel} is not allowed: must be 1 without a cluster")
    values = {"micro_batch": micro_batch, "precision": precision, "data": "synthetic"}
    training = parse_training(values, "estimate")
    sizes = DtypeSizes.of_training(training, "cuda" if where is None else where.device)
    return ModelCosts(
        model=spec,
        precision=precision,
        micro_batch=micro_batch,
        comparison=compare_operators(spec, micro_batch, sizes),
        world_size=None if where is None else where.world_size,
        stages={} if where is None else memory_by_stage(spec, where, training, relation_parallel),
        relation_parallel=relation_parallel,
    )
