"""Putting the layers into other people's networks, and other people's tables into the layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from translution.planner.common.errors import InputError

from ..layers.translution import AlphaTranslution, Translution

_ROLES = {"q": "query", "k": "key", "v": "value"}


@torch.no_grad()
def load_tables(
    layer: Translution | AlphaTranslution, tables: Mapping[str, Tensor], *, published_names: bool = False
) -> None:
    """Load whole tables into a layer, whatever its tiling.

    Args:
        layer: receives them; other weights stay as they are.
        tables: role ("q", "k", "v") → (R, C, C'), for exactly the relative roles; relations numbered as
            in `RelationGeometry`.
        published_names: the tables come from the published code, which calls query what the paper's
            equations call key and the other way round.

    Raises:
        InputError: naming the role that is missing, superfluous or of the wrong shape.
    """
    wanted = set(layer.roles)
    if published_names:
        names = {"q": "k", "k": "q", "v": "v"}
        tables = {names.get(role, role): table for role, table in tables.items()}
    if set(tables) != wanted:
        raise InputError(f"tables: roles {sorted(tables)} are not allowed: must be {sorted(wanted)}")
    shape = (layer.geometry.relations, *layer.tables.widths)
    for role, table in tables.items():
        if tuple(table.shape) != shape:
            raise InputError(f"tables: {role} of shape {tuple(table.shape)} is not allowed: must be {shape}")
    for role, table in tables.items():
        layer.tables.load_table(_ROLES[role], table)


def tables_from_state_dict(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Pick one layer's tables out of a state dict that holds one (R, C, C') tensor per role.

    Args:
        state: the state dict.
        names: role → key of its table, such as ``{"q": "layers.0.to_q.unique_params"}``.

    Raises:
        InputError: naming a key that is absent.
    """
    for key in names.values():
        if key not in state:
            raise InputError(f"state dict: has no {key!r}")
    return {role: state[key] for role, key in names.items()}


class _Attention(nn.Module):
    """A layer under the call signature of the attention that it replaces: further arguments are refused."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_bnc: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) → (B, N, C).

        Raises:
            InputError: for an attention mask, which a relative operator has no use for.
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

    A block is expected in ``model.blocks`` with ``attn.qkv`` (one Linear to queries, keys and values),
    ``attn.num_heads`` and ``attn.proj``; the projection's weights are taken over.

    Args:
        model: changed in place.
        layers: numbers of the blocks.
        grid: (height, width) of the patches.
        class_token: whether one class token stands before the patches.
        start_from_attention: start with every matrix of a table equal to the attention's, so that the
            model computes what it did before; the attention's qkv must then have no bias.
        options: further arguments of `Translution`, such as roles or tile_relations.

    Returns:
        The model.

    Raises:
        InputError: naming a block that is absent or not of this style, and nothing is replaced.
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
                layer.tables.load_table(_ROLES[role], weight.t().expand(layer.geometry.relations, dim, inner))
            else:
                plain = layer.plain[role]
                assert isinstance(plain, nn.Linear)
                plain.weight.copy_(weight)
    return layer.to(qkv.weight.device, qkv.weight.dtype)
