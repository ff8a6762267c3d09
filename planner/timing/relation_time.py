"""What relation parallelism changes in the time of a step: the rates of its two kinds of groups, and its exchanges.

A group of G consecutive ranks shares out the relations; the D = world / G ranks with the same place in their groups are
replicas, over which ZeRO partitions. What travels in a group: models/ops/relation_parallel/functions.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ..common.units import FP32_BYTES
from ..config.model import ModelSpec
from ..config.parallel import deal_relations, owned_geometry
from ..costs.parameters import TABLES, owned_parameter_groups, parameter_groups
from ..costs.relation_traffic import SEED_BYTES, moved_widths
from ..hardware.cluster import ClusterSpec
from .rates import Rates

COPIES = 4
"""How often an exchanged element is read or written in memory besides the exchange: packed, then unpacked or summed."""


class Exchanged(NamedTuple):
    """Bytes that one rank sends to its group in one pass over one micro-batch, and the number of its collectives."""

    gathered: int
    """Bytes of all-gathers: rows and the output's gradient, with the seeds of dropout."""
    scattered: int
    """Bytes of all-to-alls: pairs, parts of the output and of the rows' gradients."""
    calls: int
    """Number of collectives."""

    @property
    def total(self) -> int:
        """All bytes."""
        return self.gathered + self.scattered


@lru_cache(maxsize=1024)
def exchanged(spec: ModelSpec, ranks: int, batch: int, value_bytes: int) -> tuple[Exchanged, Exchanged]:
    """Return what the rank with the most pairs sends in forward and in backward; both are `relation_parallel_traffic`.

    Args:
        spec: the model.
        ranks: ranks of the group, G.
        batch: samples of each rank.
        value_bytes: bytes per element of the activations.
    """
    geometry, forward, backward = spec.geometry, [0, 0, 0], [0, 0, 0]
    seeds = SEED_BYTES * (ranks - 1) * (spec.dropout > 0)
    has_logits = bool({"q", "k"} & set(spec.roles))
    own, pairs = _most_pairs(spec, ranks), geometry.total_pairs
    to_samples, to_owners = (spec.heads * batch * n * value_bytes for n in ((ranks - 1) * own, pairs - own))
    row = (ranks - 1) * batch * geometry.tokens * value_bytes
    for operator in spec.layer_operators:
        widths, output = moved_widths(spec, operator)
        if not widths:
            continue
        has_values = output > 0
        for sums, gathered, parts, kinds in (
            (forward, row * sum(widths) + seeds, row * output, (has_logits, has_values)),
            (backward, row * (sum(widths) + output), row * sum(widths), (has_values, has_logits)),
        ):
            sums[0] += gathered
            sums[1] += parts + to_samples * kinds[0] + to_owners * kinds[1]
        forward[2] += len(widths) + (spec.dropout > 0) + has_logits + 2 * has_values
        backward[2] += 2 * len(widths) + has_logits + 2 * has_values
    return Exchanged(*forward), Exchanged(*backward)


@lru_cache(maxsize=256)
def _most_pairs(spec: ModelSpec, ranks: int) -> int:
    owners = deal_relations(spec.geometry, ranks)
    return max(owned_geometry(spec.geometry, owners, rank).total_pairs for rank in range(ranks))


@lru_cache(maxsize=256)
def shared_elements(spec: ModelSpec) -> tuple[int, int]:
    """Return the elements and the number of the tensors that all ranks of a group have: all but tables."""
    groups = [group for group in parameter_groups(spec) if group.component != TABLES]
    return sum(group.total for group in groups), sum(group.copies for group in groups)


def zeroed_bytes(spec: ModelSpec, batch: int, ranks: int) -> int:
    """Return the bytes of the gradients of the attention weights of a group's samples, which backward sets to zero.

    Args:
        spec: the model.
        batch: samples of each rank.
        ranks: ranks of the group, G; 1 without a group.
    """
    layers = sum(moved_widths(spec, operator)[1] > 0 for operator in spec.layer_operators)
    return 0 if ranks == 1 else layers * ranks * batch * spec.heads * spec.tokens**2 * FP32_BYTES


def spanned_nodes(cluster: ClusterSpec, group: int) -> int:
    """Return over how many nodes a group of consecutive ranks extends, at most."""
    per_node = cluster.ranks_per_node
    return 1 if per_node % group == 0 else max(2, -(-group // per_node))


@lru_cache(maxsize=64)
def group_rates(rates: Rates, group: int) -> Rates:
    """Return the rates of collectives in a relation group, while the other groups do the same.

    Args:
        rates: those of the whole cluster.
        group: ranks of the group, G.
    """
    nodes = spanned_nodes(rates.cluster, group)
    if nodes == 1:
        return rates.within(group)
    return _derived(rates, {"nodes": nodes, "ranks_per_node": min(group, rates.cluster.ranks_per_node)})


@lru_cache(maxsize=64)
def replica_rates(rates: Rates, group: int) -> Rates:
    """Return the rates of collectives among replicas, while the replicas of all other places do the same.

    The groups of a node share its network adapters: its ranks of different places belong to different replicas.

    Args:
        rates: those of the whole cluster.
        group: ranks of a relation group, G; 1 returns the rates as they are.
    """
    if group == 1:
        return rates
    cluster = rates.cluster
    replicas = cluster.world_size // group
    near = cluster.ranks_per_node // group if cluster.ranks_per_node % group == 0 else 1
    changes: dict[str, object] = {"nodes": replicas // near, "ranks_per_node": near}
    if cluster.nic_bytes_per_s is not None:
        changes["nic_bytes_per_s"] = cluster.nic_bytes_per_s * near / cluster.ranks_per_node
    if replicas == 1 and cluster.measured is not None:
        # Measured collectives are those of several ranks.
        alone = dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce"))
        changes["measured"] = cluster.measured.model_copy(update=alone)
    return _derived(rates, changes)


def _derived(rates: Rates, changes: dict[str, object]) -> Rates:
    return Rates(rates.cluster.model_copy(update=changes), rates.precision, rates.level)


def exchange_seconds(sent: Exchanged, group: int, rates: Rates) -> float:
    """Return the seconds of exchanges in a group.

    Args:
        sent: what a rank sends.
        group: ranks of the group, G.
        rates: those of the whole cluster.
    """
    own, whole = group_rates(rates, group), group / (group - 1)
    gather, scatter = own.collective("all_gather"), own.collective("all_to_all")
    seconds = sent.calls * gather.latency_s
    seconds += whole * (sent.gathered / gather.bytes_per_s + sent.scattered / scatter.bytes_per_s)
    return seconds + COPIES * sent.total / rates.memory_bytes_per_s


@lru_cache(maxsize=256)
def shared_gradient_seconds(spec: ModelSpec, group: int, value_bytes: int, rates: Rates) -> float:
    """Return the seconds in which a group averages the gradients of all parameters but tables, one by one.

    Every gradient is scaled first, those of the rank's own tables too.

    Args:
        spec: the model.
        group: ranks of the group, G.
        value_bytes: bytes per element of a gradient.
        rates: those of the whole cluster.
    """
    elements, tensors = shared_elements(spec)
    reduce = group_rates(rates, group).collective("all_reduce")
    scaled = sum(parameters.total for parameters in owned_parameter_groups(spec, None, group))
    seconds = tensors * reduce.latency_s + elements * value_bytes / reduce.bytes_per_s
    return seconds + 2 * scaled * value_bytes / rates.memory_bytes_per_s
