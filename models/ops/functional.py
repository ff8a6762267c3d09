"""The operator in torch's own functions, for `torch.func`: vmap, grad, jvp and what is built of them.

The grouped operator shares buffers between its autograd functions, which torch.func's transforms cannot follow. Here
every step returns a new tensor. Autograd saves the projected rows of all pairs, (b, p, e) per role, so this takes more
memory than the grouped operator, but no matrix is copied for a pair.

Legend of shapes: b batch, n tokens, p pairs of all relations, h heads, d width per head, c input width, e = h·d,
R relations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from translution.planner.config import RelationGeometry

from .context import relation_index
from .naive import masked_softmax


@dataclass(frozen=True, eq=False)
class RelationTerms:
    """What a chain of tiles adds to attention, in stored order of the relations."""

    tables: Mapping[str, Tensor]
    """(R, c, e) by the name of the input that is multiplied: "query", "key" or "value"."""
    bias: Tensor | None = None
    """(R, h), added to the scaled logits."""
    key_vectors: Tensor | None = None
    """(R, d), added to the keys."""
    value_vectors: Tensor | None = None
    """(R, d), added to the values."""


class _Pairs:
    """The pairs of a geometry, sorted by relation."""

    def __init__(self, geometry: RelationGeometry, device: torch.device) -> None:
        self.index = relation_index(geometry, device)
        self.exists = self.index >= 0
        relations, order = self.index.flatten().sort(stable=True)
        self.positions = order[relations >= 0]
        """(p,): position of each pair in a flattened (n, n) matrix."""
        self.counts = torch.bincount(relations[relations >= 0], minlength=geometry.relations).tolist()
        self.query, self.key = self.positions // geometry.tokens, self.positions % geometry.tokens
        places = torch.arange(len(self.positions), device=device)
        missing = self.index.new_full((geometry.tokens**2,), len(self.positions))
        self.slots = missing.index_copy(0, self.positions, places)
        """(n·n,): number of the pair at each position, p where there is none."""

    def rows(self, x_bnc: Tensor, tokens: Tensor, table_rce: Tensor | None) -> Tensor:
        """Return the rows of each pair's token times the matrix of its relation, (b, p, e)."""
        rows = x_bnc[:, tokens]
        if table_rce is None:
            return rows
        parts = rows.split(self.counts, dim=1)
        return torch.cat([part @ table_rce[r].to(part.dtype) for r, part in enumerate(parts)], dim=1)

    def matrix(self, values_bph: Tensor, missing: float) -> Tensor:
        """Return the values of all pairs as (b, h, n, n)."""
        rest = values_bph.new_full((1, 1, 1), missing).expand(len(values_bph), 1, values_bph.shape[2])
        flat = torch.cat([values_bph, rest], dim=1)[:, self.slots]
        square: Tensor = flat.unflatten(1, self.index.shape)
        return square.permute(0, 3, 1, 2)


def functional_attention(
    geometry: RelationGeometry,
    heads: int,
    scale: float,
    sources: Mapping[str, Tensor],
    terms: RelationTerms,
    *,
    key_padding: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor | None, Tensor | None]:
    """Attention over all pairs, of functions that torch.func can transform.

    Args:
        geometry: arrangement of the tokens.
        heads: number of attention heads.
        scale: factor applied to the summed logits.
        sources: (b, n, width) each, named as in `OperatorChain.forward`.
        terms: tables, scalars and vectors of the relations.
        key_padding: (b, n), true where a token is padding and must not be attended to.
        dropout: probability of dropping an attention weight; vmap must be told how to draw them (``randomness``).

    Returns:
        Outputs of the relative values and of the plain values, (b, n, width) each, or None.
    """
    pairs = _Pairs(geometry, next(iter(sources.values())).device)
    logits = _logits(pairs, heads, scale, sources, terms)
    attention = masked_softmax(logits * scale, pairs.exists, key_padding, None)
    if dropout:
        attention = torch.nn.functional.dropout(attention, dropout)
    relative = plain = None
    if "value" in sources:
        values = pairs.rows(sources["value"], pairs.key, terms.tables.get("value"))
        weights = attention.permute(0, 2, 3, 1).flatten(1, 2)[:, pairs.positions]
        rows = (values.unflatten(2, (heads, -1)) * weights.unsqueeze(-1)).flatten(2)
        shape = (len(rows), geometry.tokens, rows.shape[2])
        relative = rows.new_zeros(shape).index_add(1, pairs.query, rows)
    if "plain_value" in sources:
        split = sources["plain_value"].unflatten(2, (heads, -1))
        plain = torch.einsum("bhij,bjhd->bihd", attention, split).flatten(2)
    if terms.value_vectors is not None:
        vectors = terms.value_vectors[pairs.index.clamp(min=0)].to(attention.dtype)
        relative = torch.einsum("bhij,ijd->bihd", attention, vectors).flatten(2)
    return relative, plain


def _logits(pairs: _Pairs, heads: int, scale: float, sources: Mapping[str, Tensor], terms: RelationTerms) -> Tensor:
    """Return the summed logits before the scale, (b, h, n, n); any value where a pair does not exist."""
    found: list[Tensor] = []
    if "query" in sources:
        query = pairs.rows(sources["query"], pairs.query, terms.tables.get("query")).unflatten(2, (heads, -1))
        key = pairs.rows(sources["key"], pairs.key, terms.tables.get("key")).unflatten(2, (heads, -1))
        found.append(pairs.matrix((query * key).sum(-1), -torch.inf))
    index = pairs.index.clamp(min=0)
    if "plain_query" in sources:
        query, key = (sources[name].unflatten(2, (heads, -1)) for name in ("plain_query", "plain_key"))
        found.append(torch.einsum("bihd,bjhd->bhij", query, key))
        if terms.key_vectors is not None:
            found.append(torch.einsum("bihd,ijd->bhij", query, terms.key_vectors[index].to(query.dtype)))
    if terms.bias is not None:
        found.append((terms.bias[index] / scale).permute(2, 0, 1).unsqueeze(0))
    total = found[0]
    for part in found[1:]:
        total = total + part
    return total
