"""Layers, token layouts and roles for the operator tests, and slow references to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from translution.models import AlphaTranslution, Translution
from translution.models.ops.naive import masked_softmax, naive_relation_index
from translution.planner.config.geometry import RelationGeometry

LAYOUTS: list[dict[str, Any]] = [
    {"length": 1},
    {"length": 5},
    {"length": 7, "causal": True},
    {"grid": (3, 4)},
    {"grid": (1, 3)},
    {"grid": (2, 3), "class_token": True},
    {"grid": (3, 1), "class_token": True},
    {"length": 6, "window": 2},
    {"length": 6, "causal": True, "window": 2},
    {"grid": (3, 4), "class_token": True, "window": 1},
    {"grid": (2, 3, 2), "class_token": True},
    {"grid": (3, 2, 2), "causal": True, "window": (None, 1, 0)},
    {"grid": (2, 2, 2), "class_token": True, "causal": True},
]
ROLES = ("qkv", "kv", "qv", "qk", "q", "k", "v")
LAYERS: list[tuple[type[Any], dict[str, Any]]] = [
    (Translution, {}),
    (AlphaTranslution, {"c1": 2, "c2": 3}),
    (AlphaTranslution, {"c1": 3, "c2": 1, "rotary": True}),
]


def layer_pair(layer: type[Any], options: dict[str, Any], **grouped: Any) -> tuple[nn.Module, nn.Module]:
    """A grouped layer and its gathered reference with the same weights, large enough to affect the output."""
    torch.manual_seed(0)
    fast = layer(6, 2, head_dim=8, **options, **grouped)
    for parameter in fast.parameters():
        nn.init.normal_(parameter, std=0.5)
    tables = {"tile_relations": grouped.get("tile_relations")}
    slow = layer(6, 2, head_dim=8, **options, **tables, implementation="gather")
    slow.load_state_dict(fast.state_dict())
    return fast, slow


def outputs(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The layer's output and the gradients of its input and of every weight."""
    out = layer(x)
    return [out, *torch.autograd.grad(out, [x, *layer.parameters()], grad)]


def naive_term_attention(
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
    """Self-attention with a scalar or a vector per relation, copied for every pair.

    Args:
        geometry: arrangement of the tokens.
        heads: number of attention heads.
        rows: queries, keys and values, (b, n, h·d) each.
        bias: (R, h), added to the scaled logits.
        key_vectors: (R, d), added to the keys.
        value_vectors: (R, d), added to the values.
        key_padding, noise: as in `gather_attention`.

    Returns:
        (b, n, h·d).
    """
    index = naive_relation_index(geometry).to(rows[0].device)
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
    attention = masked_softmax(logits, exists, key_padding, noise)
    return torch.einsum("bhij,bijhd->bihd", attention, values).flatten(2)
