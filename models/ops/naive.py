"""The slow, obviously right operator: a matrix for every pair, as the published layer computes it.

Legend of shape suffixes: b batch, i query tokens, j key tokens, h heads, d width per head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from translution.planner.config.geometry import RelationGeometry


def relation_index(geometry: RelationGeometry) -> Tensor:
    """The relation of every pair (query, key) as an (N, N) tensor of int64; −1 where there is none."""
    tokens = range(geometry.tokens)
    rows = [[-1 if (r := geometry.relation(i, j)) is None else r for j in tokens] for i in tokens]
    return torch.tensor(rows)


def _reversed(geometry: RelationGeometry, index: Tensor) -> Tensor:
    reverse = torch.tensor([geometry.reverse(r) for r in range(geometry.relations)], device=index.device)
    return reverse[index]


def _per_pair(x: Tensor, table: Tensor, index: Tensor, *, query: bool) -> Tensor:
    """Rows of x times the matrix of each pair: (b, n, c) and (R, c, e) to (b, i, j, e).

    The product broadcasts over the batch, which copies all N² matrices once per sample.
    """
    rows = x[:, :, None, None, :] if query else x[:, None, :, None, :]
    return torch.matmul(rows, table[index]).squeeze(3)


def _weights(logits: Tensor, exists: Tensor, key_padding: Tensor | None, noise: Tensor | None) -> Tensor:
    """Softmax over the keys that exist and are not padding, (b, h, i, j)."""
    logits = logits.masked_fill(~exists, -torch.inf)
    if key_padding is not None:
        logits = logits.masked_fill(key_padding[:, None, None, :], -torch.inf)
    attention = logits.softmax(-1)
    # A query whose keys are all padding weighs none of them.
    attention = attention.masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0.0)
    return attention if noise is None else attention * noise


def term_attention(
    geometry: RelationGeometry,
    heads: int,
    rows: Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    key_vectors: Tensor | None = None,
    value_vectors: Tensor | None = None,
    key_padding: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Self-attention with a scalar or a vector of each pair's relation, gathered for every pair.

    Args:
        geometry: how the tokens lie.
        heads: attention heads.
        rows: queries, keys and values (b, n, h·d).
        bias: (R, h), added to the scaled logits.
        key_vectors: (R, d), added to the keys.
        value_vectors: (R, d), added to the values.
        key_padding, noise: as in `gather_attention`.

    Returns:
        (b, n, h·d).
    """
    index = relation_index(geometry).to(rows[0].device)
    exists, index = index >= 0, index.clamp(min=0)
    query, key, value = (x.unflatten(2, (heads, -1)) for x in rows)
    keys, values = (x[:, None].expand(-1, geometry.tokens, -1, -1, -1) for x in (key, value))
    if key_vectors is not None:
        keys = keys + key_vectors[index][:, :, None]
    if value_vectors is not None:
        values = values + value_vectors[index][:, :, None]
    logits = torch.einsum("bihd,bijhd->bhij", query, keys) / query.shape[3] ** 0.5
    if bias is not None:
        logits = logits + bias[index].permute(2, 0, 1)
    attention = _weights(logits, exists, key_padding, noise)
    return torch.einsum("bhij,bijhd->bihd", attention, values).flatten(2)


def gather_attention(
    geometry: RelationGeometry,
    heads: int,
    scale: float,
    sources: Mapping[str, Tensor],
    tables: Mapping[str, Tensor],
    key_padding: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Attention with relation tables, a matrix gathered for every pair and sample.

    Args:
        geometry: how the tokens lie.
        heads: attention heads.
        scale: factor of the summed logits.
        sources: (b, n, width) each, named as `RelationTables.forward` describes.
        tables: (R, width, width') for the roles that have one, numbered as in the paper.
        key_padding: (b, n), true where a token is padding that no query may see.
        noise: (b, h, n, n), what dropout multiplies the attention weights by.

    Returns:
        Outputs of the relative and of the plain values, (b, n, width) each, or None.
    """
    index = relation_index(geometry).to(next(iter(sources.values())).device)
    exists, index = index >= 0, index.clamp(min=0)
    logits: Tensor | float = 0.0
    if "query" in sources:
        query, key = sources["query"], sources["key"]
        shape = (len(query), geometry.tokens, geometry.tokens, heads, -1)
        if "query" in tables:
            query = _per_pair(query, tables["query"], _reversed(geometry, index), query=True)
        else:
            query = query[:, :, None].expand(-1, -1, geometry.tokens, -1)
        if "key" in tables:
            key = _per_pair(key, tables["key"], index, query=False)
        else:
            key = key[:, None].expand(-1, geometry.tokens, -1, -1)
        logits = (query.reshape(shape) * key.reshape(shape)).sum(-1).permute(0, 3, 1, 2)
    if "plain_query" in sources:
        query, key = (sources[name].unflatten(2, (heads, -1)) for name in ("plain_query", "plain_key"))
        logits = logits + torch.einsum("bihd,bjhd->bhij", query, key)
    assert isinstance(logits, Tensor)
    attention = _weights(logits * scale, exists, key_padding, noise)
    relative = plain = None
    if "value" in sources:
        value = _per_pair(sources["value"], tables["value"], index, query=False).unflatten(3, (heads, -1))
        relative = (attention.permute(0, 2, 3, 1).unsqueeze(-1) * value).sum(2).flatten(2)
    if "plain_value" in sources:
        value = sources["plain_value"].unflatten(2, (heads, -1))
        plain = torch.einsum("bhij,bjhd->bihd", attention, value).flatten(2)
    return relative, plain
