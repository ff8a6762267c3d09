"""Exact parameter counts in closed form: every tensor with its shape and number of copies.

Sources: arXiv 2510.10060, section 3 and appendix; the published layers for biases and norms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..common.errors import InputError
from ..common.schema import Schema
from ..config.model import ModelSpec, PatchSpec
from ..config.model_base import Operator

EMBEDDING = "embeddings"
TABLES = "relation tables"
RELATION_TERMS = "relative scalars and vectors"
PROJECTIONS = "projections"
LOW_RANK = "low-rank projections"
OUTPUT = "output projections"
FFN = "feed-forward"
NORMS = "norms"
HEAD = "head"


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """``copies`` parameter tensors of the same ``shape`` that belong to one component."""

    component: str
    shape: tuple[int, ...]
    copies: int = 1

    @property
    def numel(self) -> int:
        """Number of elements of one tensor."""
        return math.prod(self.shape)

    @property
    def total(self) -> int:
        """Number of elements of all copies."""
        return self.numel * self.copies


class ParameterCount(Schema):
    """Number of parameters of a model, in total and by component."""

    total: int
    components: dict[str, int]
    largest_tensor: int
    """Elements of the largest parameter tensor, which ZeRO-3 must gather in full."""


def _linear(component: str, d_in: int, d_out: int, *, bias: bool, copies: int) -> Iterator[ParameterGroup]:
    yield ParameterGroup(component, (d_out, d_in), copies)
    if bias:
        yield ParameterGroup(component, (d_out,), copies)


def _norm(spec: ModelSpec, width: int, copies: int) -> ParameterGroup:
    return ParameterGroup(NORMS, (width,), spec.norm_tensors * copies)


def table_tiles(relations: int, tile_relations: int | None) -> tuple[tuple[int, int], ...]:
    """Return the tiles of a table in order, as pairs (relations per tile, number of such tiles).

    Args:
        relations: number of relations of the table, R.
        tile_relations: relations per tile; None for one tile. The last tile may be smaller.

    Raises:
        InputError: if tile_relations is below 1.
    """
    if tile_relations is None:
        return ((relations, 1),)
    if tile_relations < 1:
        raise InputError(f"tile_relations: {tile_relations} is not allowed: must be at least 1")
    full, rest = divmod(relations, tile_relations)
    tiles = ((tile_relations, full), (rest, 1))
    return tuple(tile for tile in tiles if all(tile))


def table_entries(spec: ModelSpec) -> int:
    """Return the number of matrices of one table: one per relation, or one per position for absolute."""
    return spec.tokens if spec.operator == "absolute" else spec.geometry.relations


def _table(spec: ModelSpec, d_in: int, d_out: int, tile_relations: int | None, copies: int) -> Iterator[ParameterGroup]:
    for size, count in table_tiles(table_entries(spec), tile_relations):
        yield ParameterGroup(TABLES, (size, d_in, d_out), count * copies)


def operator_groups(
    spec: ModelSpec, operator: Operator, tile_relations: int | None = None, copies: int = 1
) -> Iterator[ParameterGroup]:
    """Yield the parameter tensors of one operator with its output projection.

    Args:
        spec: gives sizes, roles and geometry.
        operator: one of `OPERATORS`.
        tile_relations: relations per tile; None for one tile per table.
        copies: number of layers.
    """
    dim, inner = spec.dim, spec.inner_dim
    relative = len(spec.roles)
    if operator in ("attention", "bias", "shaw"):
        joint = inner + 2 * spec.kv_dim if operator == "attention" else 3 * inner
        yield from _linear(PROJECTIONS, dim, joint, bias=False, copies=copies)
        relations = spec.geometry.relations
        if operator == "bias":
            yield ParameterGroup(RELATION_TERMS, (relations, spec.heads), copies)
        elif operator == "shaw":
            yield ParameterGroup(RELATION_TERMS, (relations, spec.head_dim), 2 * copies)
    elif operator in ("translution", "absolute"):
        if relative < 3:
            yield from _linear(PROJECTIONS, dim, inner, bias=False, copies=copies * (3 - relative))
        yield from _table(spec, dim, inner, tile_relations, copies * relative)
    else:
        low1, low2 = spec.heads * spec.c1, spec.heads * spec.c2
        yield from _linear(PROJECTIONS, dim, 3 * inner, bias=False, copies=copies)
        yield from _linear(LOW_RANK, dim, low1, bias=False, copies=copies * relative)
        yield from _table(spec, low1, low2, tile_relations, copies * relative)
        if len(set(spec.roles) & set("qk")) == 1:
            yield from _linear(LOW_RANK, dim, low2, bias=False, copies=copies)
        if "v" in spec.roles:
            yield from _linear(LOW_RANK, low2, inner, bias=False, copies=copies)
    if spec.has_output_projection:
        yield from _linear(OUTPUT, inner, dim, bias=spec.bias, copies=copies)


def parameter_groups(spec: ModelSpec, tile_relations: int | None = None) -> tuple[ParameterGroup, ...]:
    """Return every parameter tensor of a model.

    Args:
        spec: the model.
        tile_relations: relations per tile; None for one tile per table. The total does not depend on it.

    Raises:
        InputError: if tile_relations is below 1.
    """
    groups: list[ParameterGroup] = []
    dim, depth = spec.dim, spec.depth
    if isinstance(spec, PatchSpec):
        groups += [_norm(spec, spec.patch_dim, 1), *_linear(EMBEDDING, spec.patch_dim, dim, bias=spec.bias, copies=1)]
        groups.append(_norm(spec, dim, 1))
        if spec.class_token:
            groups.append(ParameterGroup(EMBEDDING, (1, 1, dim)))
        groups.extend(_linear(HEAD, dim, spec.classes, bias=spec.bias, copies=1))
    else:
        groups.append(ParameterGroup(EMBEDDING, (spec.vocabulary, dim)))
        groups.append(_norm(spec, dim, 1))
        if not spec.tied_embeddings:
            groups.extend(_linear(HEAD, dim, spec.vocabulary, bias=False, copies=1))
    if spec.learned_positions:
        groups.append(ParameterGroup(EMBEDDING, (1, spec.tokens, dim)))
    for operator in sorted(set(spec.layer_operators)):
        copies = spec.layer_operators.count(operator)
        groups.extend(operator_groups(spec, operator, tile_relations, copies))
    groups.append(_norm(spec, dim, 2 * depth + 1))
    wide = depth * (2 if spec.ffn == "swiglu" else 1)
    groups.extend(_linear(FFN, dim, spec.ffn_dim, bias=spec.bias, copies=wide))
    groups.extend(_linear(FFN, spec.ffn_dim, dim, bias=spec.bias, copies=depth))
    return tuple(groups)


def owned_parameter_groups(
    spec: ModelSpec, tile_relations: int | None = None, relation_ranks: int = 1
) -> tuple[ParameterGroup, ...]:
    """Return every parameter tensor that one rank of a relation group has: of the tables its relations only.

    It is the rank with the most relations, ceil(R / G) of each table (`deal_relations`).

    Args:
        spec: the model.
        tile_relations: relations per tile; None for one tile per table.
        relation_ranks: ranks that share out the relations, G; 1 for all relations.

    Raises:
        InputError: if tile_relations is below 1.
    """
    if relation_ranks == 1:
        return parameter_groups(spec, tile_relations)
    found: list[ParameterGroup] = []
    for group in parameter_groups(spec):
        if group.component == TABLES:
            owned = -(-group.shape[0] // relation_ranks)
            for size, count in table_tiles(owned, tile_relations):
                found.append(ParameterGroup(TABLES, (size, *group.shape[1:]), count * group.copies))
        else:
            found.append(group)
    return tuple(found)


def block_weight_elements(spec: ModelSpec) -> int:
    """Return the elements of what a block's operations save of its weights, at most: all but relation tables."""
    ffn = (3 if spec.ffn == "swiglu" else 2) * (spec.dim * spec.ffn_dim + max(spec.dim, spec.ffn_dim))
    operators = (
        sum(
            group.total
            for group in operator_groups(spec, operator)
            if group.component != TABLES or operator == "absolute"
        )
        for operator in set(spec.layer_operators)
    )
    return ffn + max(operators)


def count_parameters(spec: ModelSpec, tile_relations: int | None = None) -> ParameterCount:
    """Return the exact parameter counts of a model."""
    return sum_parameters(parameter_groups(spec, tile_relations))


def sum_parameters(groups: Iterable[ParameterGroup]) -> ParameterCount:
    """Add up parameter groups in total and by component."""
    components: dict[str, int] = {}
    largest = 0
    for group in groups:
        components[group.component] = components.get(group.component, 0) + group.total
        largest = max(largest, group.numel)
    return ParameterCount(total=sum(components.values()), components=components, largest_tensor=largest)
