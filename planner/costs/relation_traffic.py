"""Bytes that a rank sends under relation parallelism, and under ZeRO-3 for comparison, in closed form.

Rank g of a group of G owns the relations of p(g) of the p pairs; it has b samples of N tokens and h heads. Per layer:

    pass                              elements that it sends                       direction
    rows of the relative roles        (G − 1) · b · N · width                      forward, and again backward
    parts of the output               (G − 1) · b · N · width of the output        forward
    gradient of the output            (G − 1) · b · N · width of the output        backward
    parts of the rows' gradients      (G − 1) · b · N · width                      backward
    logits, gradients of weights      (G − 1) · b · h · p(g)                       forward, backward
    weights, gradients of logits      b · h · (p − p(g))                           forward, backward

Only relative roles send: rows, logits if queries or keys are relative, weights and output if values are. Where the
roles have the same input, as in full Translution, its rows travel once. This is what models/ops/relation_parallel does.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..common.errors import InputError
from ..common.schema import Schema
from ..config.geometry import RelationGeometry
from ..config.model import ModelSpec
from ..config.model_base import Operator
from ..config.parallel import deal_relations, owned_geometry
from .parameters import TABLES, operator_groups, parameter_groups

SEED_BYTES = 8
"""The seed of dropout, which every rank sends to every other."""


class RelationTraffic(Schema):
    """Bytes that one rank sends in one training step."""

    rows: int
    """Rows of tokens, parts of outputs, and their gradients."""
    pairs: int
    """Logits, attention weights, and their gradients."""
    seeds: int
    """Seeds of dropout."""

    @property
    def total(self) -> int:
        """All bytes."""
        return self.rows + self.pairs + self.seeds


def layer_relation_traffic(
    geometry: RelationGeometry,
    *,
    ranks: int,
    rank: int,
    batch: int,
    heads: int,
    moved_widths: Iterable[int],
    output_width: int,
    has_logits: bool,
    dropout: bool,
    value_bytes: int,
    owners: tuple[int, ...] | None = None,
    dropout_ranks: int | None = None,
) -> RelationTraffic:
    """Return the bytes that one rank sends for one layer, forward and backward.

    Args:
        geometry: arrangement of the tokens.
        ranks: ranks of the group, G.
        rank: the rank within the group.
        batch: samples of each rank, b.
        heads: number of attention heads, h.
        moved_widths: width of each tensor of rows that travels; roles with the same input share one.
        output_width: width of the relative values' output; 0 if values are not relative.
        has_logits: whether queries or keys are relative.
        dropout: whether attention weights are dropped.
        value_bytes: bytes per element of the rows, in whose dtype everything travels.
        owners: rank that owns each relation; by default those of `deal_relations`.
        dropout_ranks: ranks that drop what one process with all their samples would; by default those of the group.

    Raises:
        InputError: if there are more ranks than relations, or no such rank.
    """
    owners = deal_relations(geometry, ranks) if owners is None else owners
    if not 0 <= rank < ranks:
        raise InputError(f"rank: {rank} is not allowed: must be from 0 to {ranks - 1}")
    own = owned_geometry(geometry, owners, rank).total_pairs
    widths = 3 * sum(moved_widths) + 2 * output_width
    pairs = heads * batch * ((ranks - 1) * own + geometry.total_pairs - own)
    return RelationTraffic(
        rows=(ranks - 1) * batch * geometry.tokens * widths * value_bytes,
        pairs=pairs * (has_logits + (output_width > 0)) * value_bytes,
        seeds=SEED_BYTES * ((dropout_ranks or ranks) - 1) * dropout,
    )


def moved_widths(spec: ModelSpec, operator: Operator) -> tuple[tuple[int, ...], int]:
    """Return the widths of the rows that travel in one layer, and the width of its relative output.

    Args:
        spec: gives sizes and roles.
        operator: of the layer; one without tables moves nothing.
    """
    roles, coupled = spec.roles, bool({"q", "k"} & set(spec.roles))
    moving = [role for role in "qkv" if role in roles or (coupled and role in "qk")]
    if operator == "translution":
        # Relative roles multiply the layer's input; a query or key without a table is projected first.
        return (spec.dim, *(spec.inner_dim for role in moving if role not in roles)), spec.inner_dim * ("v" in roles)
    if operator == "alpha":
        low1, low2 = spec.heads * spec.c1, spec.heads * spec.c2
        return tuple(low1 if role in roles else low2 for role in moving), low2 * ("v" in roles)
    return (), 0


def has_relation_tables(spec: ModelSpec) -> bool:
    """Return whether a layer of a model has relation tables, which ranks can share out."""
    return any(moved_widths(spec, operator)[0] for operator in spec.layer_operators)


def relation_parallel_traffic(
    spec: ModelSpec,
    *,
    ranks: int,
    batch: int,
    value_bytes: int = 2,
    rank: int = 0,
    dropout_ranks: int | None = None,
) -> RelationTraffic:
    """Return the bytes that one rank of a group sends in one training step of a model, over all layers.

    Args:
        spec: the model.
        ranks: ranks that share out the relations, G.
        batch: samples of each rank.
        value_bytes: bytes per element of the activations.
        rank: the rank within the group; numbers of pairs differ slightly.
        dropout_ranks: as in `layer_relation_traffic`; in a plan all ranks.

    Raises:
        InputError: if there are more ranks than relations, or no such rank.
    """
    parts = []
    for operator in spec.layer_operators:
        moved, output = moved_widths(spec, operator)
        if moved:
            part = layer_relation_traffic(
                spec.geometry,
                ranks=ranks,
                rank=rank,
                batch=batch,
                heads=spec.heads,
                moved_widths=moved,
                output_width=output,
                has_logits=bool({"q", "k"} & set(spec.roles)),
                dropout=spec.dropout > 0,
                value_bytes=value_bytes,
                dropout_ranks=dropout_ranks,
            )
            parts.append(part)
    return RelationTraffic(
        rows=sum(part.rows for part in parts),
        pairs=sum(part.pairs for part in parts),
        seeds=sum(part.seeds for part in parts),
    )


def shared_gradient_traffic(spec: ModelSpec, *, ranks: int, value_bytes: int = 2) -> int:
    """Return the bytes of gradients that one rank of a group sends for each micro-batch, in addition to the operator.

    The gradients of all parameters but the tables are averaged over the group by all-reduces, which send what a ring
    sends: 2·(G − 1)/G of their bytes (arXiv 1802.05799, section 3).

    Args:
        spec: the model.
        ranks: ranks that share out the relations, G.
        value_bytes: bytes per element of the gradients, as of the parameters.
    """
    operators = [operator for operator in spec.layer_operators if operator in ("translution", "alpha")]
    layers = (group for operator in operators for group in operator_groups(spec, operator))
    owned = sum(group.total for group in layers if group.component == TABLES)
    shared = sum(group.total for group in parameter_groups(spec)) - owned
    return 2 * (ranks - 1) * shared * value_bytes // ranks


def zero3_table_traffic(spec: ModelSpec, *, ranks: int, value_bytes: int = 2) -> int:
    """Return the bytes of tables that one rank sends in one training step under ZeRO-3.

    Each table is gathered for forward and again for backward, and its gradient is scattered: three passes, in each of
    which a rank sends its share of the table to the others, or the others' shares of its gradient (arXiv 1910.02054,
    section 7).

    Args:
        spec: the model.
        ranks: number of ranks.
        value_bytes: bytes per element of parameters and gradients.
    """
    elements = sum(group.total for group in parameter_groups(spec) if group.component == TABLES)
    return 3 * elements * value_bytes * (ranks - 1) // ranks
