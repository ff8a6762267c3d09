"""Replace the attention of a timm-style vision transformer by Translution."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from translution.planner.common import InputError

from ..layers.tables import ROLE_NAMES
from ..layers.translution import Translution


class _Attention(nn.Module):
    """A layer with the call signature of timm's attention."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_bnc: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) → (B, N, C).

        Raises:
            InputError: if there is an attention mask, which the layer does not support.
        """
        if attn_mask is not None:
            raise InputError("attn_mask: a tensor is not allowed: must be None")
        result: Tensor = self.layer(x_bnc)
        return result


def replace_attention(
    model: nn.Module,
    layers: Iterable[int],
    *,
    grid: tuple[int, int],
    class_token: bool,
    start_from_attention: bool = False,
    **options: Any,
) -> nn.Module:
    """Replace the attention of some blocks of a timm-style vision transformer by full Translution.

    Each block in ``model.blocks`` must have ``attn.qkv`` (one Linear for queries, keys and values),
    ``attn.num_heads`` and ``attn.proj``, whose weights are copied. A new layer maps (B, N, C) to
    (B, N, C) as the attention did; N is height · width, plus 1 with a class token.

    Args:
        model: network to change in place.
        layers: numbers of the blocks.
        grid: (height, width) of the grid of patches.
        class_token: True if one class token precedes the patches.
        start_from_attention: True to start with every matrix of a table equal to the attention's, so
            that the model's outputs do not change; the attention's qkv must then have no bias.
        options: further arguments of `Translution`, such as roles or tile_relations.

    Returns:
        The model.

    Raises:
        InputError: naming a block that does not exist or lacks these attributes; the model is then unchanged.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        raise InputError(f"model: {type(model).__name__} is not allowed: must have its blocks in .blocks")
    chosen = list(layers)
    made = {}
    for number in chosen:
        if not 0 <= number < len(blocks):
            raise InputError(f"layers: {number} is not allowed: must be from 0 to {len(blocks) - 1}")
        made[number] = _translution_for(blocks[number], number, grid, class_token, start_from_attention, options)
    for number, layer in made.items():
        blocks[number].attn = _Attention(layer)
    return model


@torch.no_grad()
def _translution_for(
    block: nn.Module, number: int, grid: tuple[int, int], class_token: bool, start: bool, options: Mapping[str, Any]
) -> Translution:
    attention = getattr(block, "attn", None)
    qkv, heads, projection = (getattr(attention, name, None) for name in ("qkv", "num_heads", "proj"))
    if not (isinstance(qkv, nn.Linear) and isinstance(heads, int) and isinstance(projection, nn.Linear)):
        raise InputError(f"layers: block {number} is not allowed: must have attn.qkv, attn.num_heads and attn.proj")
    if start and "bias" in dict(qkv.named_parameters()):
        raise InputError("start_from_attention: True is not allowed: must be False where attn.qkv has a bias")
    dim, inner = qkv.in_features, qkv.out_features // 3
    layer = Translution(dim, heads, head_dim=inner // heads, grid=grid, class_token=class_token, **options)
    if isinstance(layer.output, nn.Linear):
        layer.output.weight.copy_(projection.weight)
        layer.output.bias.zero_()
        if "bias" in dict(projection.named_parameters()):
            layer.output.bias.copy_(projection.bias)
    if start:
        for role, weight in zip("qkv", qkv.weight.view(3, inner, dim), strict=True):
            if role in layer.roles:
                layer.tables.load_table(ROLE_NAMES[role], weight.t().expand(layer.geometry.relations, dim, inner))
            else:
                plain = layer.plain[role]
                assert isinstance(plain, nn.Linear)
                plain.weight.copy_(weight)
    return layer.to(qkv.weight.device, qkv.weight.dtype)
