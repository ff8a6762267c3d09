"""What ZeRO-3 and relation parallelism send against the batch and the number of ranks, and where they send as much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..common.schema import Schema
from ..config.model import ModelSpec
from ..costs.parameters import TABLES, count_parameters
from ..costs.relation_traffic import moved_widths, relation_parallel_traffic, zero3_table_traffic

TRAFFIC_RANKS = (8, 64)
"""Ranks of the curves of traffic against the batch."""
TRAFFIC_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class TrafficPoint(Schema):
    """Bytes of tables, or of what travels instead, that one rank sends in one step."""

    ranks: int
    """Ranks of ZeRO-3, and of the relation group."""
    batch: int
    """Samples of each rank."""
    zero3_bytes: int
    """Gathers of the tables for forward and for backward, and the reduction of their gradients."""
    relation_bytes: int
    """Rows, logits, attention weights and their gradients."""


def traffic_points(
    spec: ModelSpec, ranks: Sequence[int] = TRAFFIC_RANKS, batches: Sequence[int] = TRAFFIC_BATCHES
) -> Iterator[TrafficPoint]:
    """Yield the bytes of both ways for every number of ranks and samples, in half precision.

    Args:
        spec: the model, with relation tables.
        ranks: numbers of ranks; those above the number of relations are left out.
        batches: samples of each rank.
    """
    for count in ranks:
        if not 1 < count <= spec.geometry.relations:
            continue
        whole = zero3_table_traffic(spec, ranks=count)
        for batch in batches:
            sent = relation_parallel_traffic(spec, ranks=count, batch=batch).total
            yield TrafficPoint(ranks=count, batch=batch, zero3_bytes=whole, relation_bytes=sent)


def crossing_samples(spec: ModelSpec, ranks: int) -> float:
    """Return the samples of a group and step from which relation parallelism sends more than ZeRO-3.

    Both send (G − 1) times as much as a constant, except for some of the pairs, so that G · b hardly depends on G.

    Args:
        spec: the model, with relation tables.
        ranks: ranks of the group, G.
    """
    one, two = (relation_parallel_traffic(spec, ranks=ranks, batch=batch).total for batch in (1, 2))
    each = two - one
    return ranks * (zero3_table_traffic(spec, ranks=ranks) - (one - each)) / each


def row_crossing_samples(spec: ModelSpec) -> float:
    """Return the samples from which rows alone, without pairs, are more than ZeRO-3 sends of the tables.

    For full Translution with all roles it is 9 · R · C / (5 · N): three passes of three tables of R · C · C elements,
    against five passes of N · C elements.

    Args:
        spec: the model, with relation tables.
    """
    tables = count_parameters(spec).components[TABLES]
    widths = [moved_widths(spec, operator) for operator in spec.layer_operators]
    return 3 * tables / (spec.tokens * sum(3 * sum(moved) + 2 * output for moved, output in widths))
