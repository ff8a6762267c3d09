"""Bytes that a rank sends in a step under ZeRO-3, hpZ, MiCS and relation parallelism, on its node and on the network.

A gather, or a reduction, of a tensor over W ranks on M nodes of n ranks sends (W − 1) / W of it from each rank. Every
node receives the other nodes' parts once: (M − 1) / M of it, of which a rank's share is an n-th; the rest stays on the
node. Sources: arXiv 1910.02054, section 7 (ZeRO-3); arXiv 2306.10209, section 3.2 (hpZ); arXiv 2205.00119, section 3
(MiCS: parameters are sharded within a node, and gradients averaged over the nodes once a step).
"""

from __future__ import annotations

from collections.abc import Iterator

from ..common.schema import Schema
from ..config.run_config import RunConfig
from ..costs.parameters import TABLES, count_parameters
from ..costs.relation_traffic import has_relation_tables
from .engine_time import weight_uses
from .relation_time import exchanged, shared_elements, spanned_nodes


class TrafficRow(Schema):
    """Bytes that one rank sends in one step under one way to share out a model."""

    strategy: str
    node_bytes: int
    """Over the links of its node."""
    network_bytes: int
    """Over its share of the node's network adapters."""


class _Ranks:
    """Ranks on nodes, and what their collectives send."""

    def __init__(self, ranks: int, nodes: int) -> None:
        self.ranks, self.nodes = ranks, nodes

    def passes(self, size: float, count: float = 1.0) -> tuple[float, float]:
        """Bytes on the node and on the network of a number of gathers, or reductions, of a tensor of a size."""
        network = size * (self.nodes - 1) / self.nodes / (self.ranks // self.nodes)
        return count * (size * (self.ranks - 1) / self.ranks - network), count * network


def traffic_rows(run: RunConfig) -> tuple[TrafficRow, ...]:
    """Return what a rank sends under ZeRO-3, hpZ, MiCS and relation parallelism; empty for one rank or without tables.

    All have the run's batch and checkpointing. hpZ and MiCS need several nodes. Relation parallelism has the group and
    the stage of the run, or is that of a node with ZeRO-1.

    Args:
        run: model, cluster and training.
    """
    cluster, model = run.cluster, run.model
    if run.world_size == 1 or not has_relation_tables(model):
        return ()
    width, count = run.training.dtype_bytes, run.training.gradient_accumulation_steps
    uses, size = weight_uses(model), count_parameters(model).total * width
    every, node = _Ranks(run.world_size, cluster.nodes), _Ranks(cluster.ranks_per_node, 1)
    rows = {"ZeRO-3": [every.passes(size, count * (uses + 1))]}
    if cluster.nodes > 1 and cluster.ranks_per_node > 1:
        near = node.passes(size, count * uses - 1)
        rows["ZeRO-3 with hpZ"] = [every.passes(size, 1 + count), near]
        average = 2 * (cluster.nodes - 1) / cluster.nodes * size / cluster.ranks_per_node
        rows["MiCS, sharded within a node"] = [node.passes(size, count * (uses + 1)), (0.0, average)]
    group, stage = run.parallel.relation, run.zero.stage
    if group == 1:
        group, stage = cluster.ranks_per_node, 1
    if 1 < group <= model.geometry.relations:
        passes = list(_relation_passes(run, group, stage))
        rows[f"relation parallelism in groups of {group}, ZeRO-{stage}"] = passes
    return tuple(
        TrafficRow(
            strategy=name,
            node_bytes=round(sum(near for near, _ in passes)),
            network_bytes=round(sum(far for _, far in passes)),
        )
        for name, passes in rows.items()
    )


def _relation_passes(run: RunConfig, group: int, stage: int) -> Iterator[tuple[float, float]]:
    """Yield the bytes on the node and on the network of each kind of collective."""
    model, training, cluster = run.model, run.training, run.cluster
    width, count = training.dtype_bytes, training.gradient_accumulation_steps
    forward, backward = exchanged(model, group, training.micro_batch, width)
    sent = count * (forward.total * (weight_uses(model) - 1) + backward.total)
    nodes = spanned_nodes(cluster, group)
    per_node = group / nodes
    away = (group - per_node) / (group - 1)
    yield sent * (1 - away), sent * away
    shared = shared_elements(model)[0] * width
    yield _Ranks(group, nodes).passes(shared, 2 * count)
    own = (count_parameters(model).components[TABLES] / group + shared / width) * width
    replicas = run.world_size // group
    near = cluster.ranks_per_node // group if cluster.ranks_per_node % group == 0 else 1
    # Among replicas: ZeRO-3 gathers for every use, the others once a step; from stage 2 on each micro-batch is reduced.
    passes = count * (weight_uses(model) + 1) if stage == 3 else 1 + (count if stage == 2 else 1)
    yield _Ranks(replicas, replicas // near).passes(own, passes)
