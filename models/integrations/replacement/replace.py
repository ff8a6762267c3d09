"""Replace the attention of a vision transformer of timm, of Hugging Face or like theirs by Translution."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from translution.planner.common import InputError

from .found import FoundAttention, TokenLayout, find_blocks, find_layout, read_attention
from .layer import AdaptedTranslution
from .wrapped import WrappedLayer


@dataclass(frozen=True)
class _Options:
    """The arguments of `replace_attention` that concern every block."""

    layout: TokenLayout | None
    start: bool
    options: Mapping[str, Any]


def replace_attention(
    model: nn.Module,
    layers: Iterable[int],
    *,
    grid: tuple[int, int] | None = None,
    class_token: bool | None = None,
    start_from_attention: bool = False,
    **options: Any,
) -> nn.Module:
    """Replace the attention of some blocks of a vision transformer by full Translution.

    The blocks are those in ``model.blocks``, or else all modules with ``attn`` or ``attention`` in their order: timm's
    ViT, DeiT and Swin, Hugging Face's ViT, DeiT and Swin, and networks of the same form. The attention has one Linear
    ``qkv`` or three (``q_proj`` or ``query``, and so on), ``num_heads``, and an output projection, which the layer
    takes over with the dropout after it. A new layer maps (B, N, C) to (B, N, C) as the attention did and takes the
    same masks.

    Tokens other than the class token and the patches, such as DeiT's distillation token or registers, get rows of the
    layer's grid above the patches; what remains of these rows is padding.

    Args:
        model: network to change in place.
        layers: numbers of the blocks.
        grid: (height, width) of the grid of patches; None if the network tells. Windows of a Swin transformer are the
            grid of their own.
        class_token: True if a class token precedes the patches; None if the network tells.
        start_from_attention: True to start with every matrix of a table equal to the attention's, so that the model's
            outputs do not change. The bias of the queries becomes a learned vector per head that is multiplied by the
            keys' tokens, that of the values becomes part of the output projection's bias, and that of the keys has no
            effect in a softmax. The scalars of a Swin transformer's relations are kept.
        options: further arguments of `Translution`, such as roles or tile_relations; dropout is the attention's by
            default.

    Returns:
        The model.

    Raises:
        InputError: naming a block that does not exist or whose attention is of another form, or an argument that is
            missing; the model is then unchanged.
    """
    blocks = find_blocks(model)
    chosen = list(layers)
    asked = _Options(_layout(model, grid, class_token), start_from_attention, options)
    made: dict[int, tuple[str, WrappedLayer]] = {}
    for number in chosen:
        if not 0 <= number < len(blocks):
            raise InputError(f"layers: {number} is not allowed: must be from 0 to {len(blocks) - 1}")
        found = read_attention(blocks[number])
        if found is None:
            raise InputError(
                f"layers: block {number} is not allowed: must have attn.qkv, attn.num_heads and attn.proj, or the "
                "attention of Hugging Face's ViT, DeiT or Swin"
            )
        made[number] = found.name, _layer_for(found, number, asked)
    for number, (name, layer) in made.items():
        setattr(blocks[number], name, layer)
    return model


def _layout(model: nn.Module, grid: tuple[int, int] | None, class_token: bool | None) -> TokenLayout | None:
    """Return how the network's tokens lie, from the arguments and from the network."""
    told = find_layout(model)
    if grid is None and class_token is None:
        return told
    if grid is None or class_token is None:
        if told is None:
            missing = "grid" if grid is None else "class_token"
            raise InputError(f"{missing}: None is not allowed: {type(model).__name__} does not tell it")
        grid = told.grid if grid is None else grid
        class_token = told.class_token if class_token is None else class_token
    prefix = None if told is None else told.class_token + told.extra_tokens
    return TokenLayout(grid, class_token, max(0, prefix - class_token) if prefix else 0)


@torch.no_grad()
def _layer_for(found: FoundAttention, number: int, asked: _Options) -> WrappedLayer:
    layout = asked.layout if found.window is None else TokenLayout(found.window, class_token=False)
    if layout is None:
        raise InputError("grid: None is not allowed: give the height and width of the grid, and class_token")
    if asked.start and found.obstacle:
        raise InputError(
            f"start_from_attention: True is not allowed: must be False where the attention {found.obstacle} "
            f"(block {number})"
        )
    (height, width), extra = layout.grid, layout.extra_tokens
    rows = -(-extra // width)
    weight, bias = found.weights["q"]
    inner, dim = weight.shape
    options: dict[str, Any] = {"dropout": found.dropout} | dict(asked.options)
    layer = AdaptedTranslution(
        dim,
        found.heads,
        head_dim=inner // found.heads,
        grid=(height + rows, width),
        class_token=layout.class_token,
        key_term=asked.start and bias is not None,
        relation_bias=asked.start and found.relation_bias is not None,
        **options,
    )
    layer.output.get_parameter("weight").copy_(found.projection.weight)
    own = dict(found.projection.named_parameters()).get("bias")
    layer.output.get_parameter("bias").copy_(own if own is not None else torch.zeros(()))
    if asked.start:
        layer.start_from(found.weights, found.relation_bias)
    before = layout.class_token + extra
    first = layout.class_token + rows * width
    places = [*range(before), *range(first, first + height * width)]
    wrapped = found.wrapper(layer, places, found.drop, returns_tuple=found.returns_tuple)
    return wrapped.to(weight.device).to(weight.dtype)
