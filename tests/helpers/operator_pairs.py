"""Layers, places and roles that the operator tests share, and a layer with its reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from translution.models import AlphaTranslution, Translution

PLACES: list[dict[str, Any]] = [
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
]
ROLES = ("qkv", "kv", "qv", "qk", "q", "k", "v")
LAYERS: list[tuple[type[Any], dict[str, Any]]] = [
    (Translution, {}),
    (AlphaTranslution, {"c1": 2, "c2": 3}),
    (AlphaTranslution, {"c1": 3, "c2": 1, "rotary": True}),
]


def layer_pair(layer: type[Any], options: dict[str, Any], **grouped: Any) -> tuple[nn.Module, nn.Module]:
    """A grouped layer and its gathered twin with the same weights, large enough to matter."""
    torch.manual_seed(0)
    fast = layer(6, 2, head_dim=4, **options, **grouped)
    for parameter in fast.parameters():
        nn.init.normal_(parameter, std=0.5)
    tables = {"tile_relations": grouped.get("tile_relations")}
    slow = layer(6, 2, head_dim=4, **options, **tables, implementation="gather")
    slow.load_state_dict(fast.state_dict())
    return fast, slow


def outputs(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The layer's output, and the gradients of its input and of every weight."""
    out = layer(x)
    return [out, *torch.autograd.grad(out, [x, *layer.parameters()], grad)]
