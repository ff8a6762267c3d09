"""The slow reference operator: a matrix for every pair and sample, as the published layer computes it.

The other modules of `ops` are tested against it, and layers offer it as ``implementation="naive"``.

Legend of shapes: b batch, n tokens, i query tokens, j key tokens, h heads, d width per head, c input
width, e output width, R relations.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from translution.planner.config import RelationGeometry


def naive_relation_index(geometry: RelationGeometry) -> Tensor:
    """Relation of every pair (query, key), (n, n) int64; −1 where the pair does not exist."""
    tokens = range(geometry.tokens)
    rows = [[-1 if (r := geometry.relation(i, j)) is None else r for j in tokens] for i in tokens]
    return torch.tensor(rows)


def _reversed(geometry: RelationGeometry, index: Tensor) -> Tensor:
    """Replace each relation of the index by that of the reversed pair."""
    reverse = torch.tensor([geometry.reverse(r) for r in range(geometry.relations)], device=index.device)
    return reverse[index]


def _per_pair(x: Tensor, table: Tensor, index: Tensor, *, query: bool) -> Tensor:
    """Multiply the rows of x by the matrix of each pair: (b, n, c) and (R, c, e) → (b, i, j, e).

    The product broadcasts over the batch, which copies all n² matrices once per sample.
    """
    rows = x[:, :, None, None, :] if query else x[:, None, :, None, :]
    return torch.matmul(rows, table[index]).squeeze(3)


def masked_softmax(logits: Tensor, exists: Tensor, key_padding: Tensor | None, noise: Tensor | None) -> Tensor:
    """Softmax over the keys that exist and are not padding.

    Args:
        logits: (b, h, i, j).
        exists: (i, j), true where the pair exists.
        key_padding: (b, j), true where a key is padding.
        noise: (b, h, i, j), factors of dropout; None without dropout.

    Returns:
        (b, h, i, j).
    """
    logits = logits.masked_fill(~exists, -torch.inf)
    if key_padding is not None:
        logits = logits.masked_fill(key_padding[:, None, None, :], -torch.inf)
    attention = logits.softmax(-1)
    # A query whose keys are all padding gets zero weights rather than NaN.
    attention = attention.masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0.0)
    return attention if noise is None else attention * noise


def gather_attention(
    geometry: RelationGeometry,
    heads: int,
    scale: float,
    sources: Mapping[str, Tensor],
    tables: Mapping[str, Tensor],
    key_padding: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Attention with relation tables, with a matrix gathered for every pair and sample.

    Args:
        geometry: arrangement of the tokens.
        heads: number of attention heads.
        scale: factor applied to the summed logits.
        sources: (b, n, width) each, named as in `OperatorChain.forward`.
        tables: (R, c, e) for each role that has a table, numbered as in the paper.
        key_padding: (b, n), true where a token is padding and must not be attended to.
        noise: (b, h, n, n), factors that dropout multiplies the attention weights by.

    Returns:
        Outputs of the relative values and of the plain values, (b, n, width) each, or None.
    """
    index = naive_relation_index(geometry).to(next(iter(sources.values())).device)
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
    attention = masked_softmax(logits * scale, exists, key_padding, noise)
    relative = plain = None
    if "value" in sources:
        value = _per_pair(sources["value"], tables["value"], index, query=False).unflatten(3, (heads, -1))
        relative = (attention.permute(0, 2, 3, 1).unsqueeze(-1) * value).sum(2).flatten(2)
    if "plain_value" in sources:
        value = sources["plain_value"].unflatten(2, (heads, -1))
        plain = torch.einsum("bhij,bjhd->bihd", attention, value).flatten(2)
    return relative, plain
