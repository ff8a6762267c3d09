"""What the attention of a block consists of, and how the tokens of a network lie.

Names of attributes are those of timm (layers/attention.py, models/vision_transformer.py, models/swin_transformer.py)
and of transformers (models/vit, deit and swin), also of its versions before 5.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import Tensor, nn

from translution.planner.common import InputError

from .wrapped import HuggingFaceLayer, TimmLayer, WindowLayer, WrappedLayer

_CALLS: tuple[tuple[type[WrappedLayer], set[str]], ...] = (
    (TimmLayer, {"x", "attn_mask", "is_causal"}),
    (WindowLayer, {"x", "mask"}),
    (HuggingFaceLayer, {"hidden_states", "attention_mask", "head_mask", "output_attentions", "kwargs"}),
)
"""Arguments of an attention that a wrapper takes."""
_WITHOUT_EFFECT = (nn.Identity, nn.Dropout, type(None))


@dataclass(frozen=True)
class FoundAttention:
    """The attention of a block."""

    name: str
    """Attribute of the block that has it."""
    heads: int
    weights: dict[str, tuple[Tensor, Tensor | None]]
    """Role ("q", "k", "v") → projection (E, C) and bias (E,) or None, E = h·D."""
    projection: nn.Linear
    wrapper: type[WrappedLayer]
    returns_tuple: bool
    dropout: float
    """Probability of dropping an attention weight."""
    drop: nn.Module
    """What follows the output projection."""
    window: tuple[int, int] | None
    """Height and width of its window, if it has windows."""
    relation_bias: Tensor | None
    """Scalars by relation, (R, h), numbered as in `RelationGeometry`."""
    obstacle: str
    """What a layer cannot start from; empty if there is nothing."""


def read_attention(block: nn.Module) -> FoundAttention | None:
    """Return the attention of a block; None if the block has none that is known."""
    for name in ("attn", "attention"):
        attention = getattr(block, name, None)
        if isinstance(attention, nn.Module) and (found := _read(name, attention)) is not None:
            return found
    return None


def _read(name: str, attention: nn.Module) -> FoundAttention | None:
    # Before transformers 5 the projections were in a module of their own.
    inner = next((part for key in ("attention", "self") if (part := getattr(attention, key, None)) is not None), None)
    inner = attention if inner is None else inner
    heads = getattr(inner, "num_heads", getattr(inner, "num_attention_heads", None))
    output = getattr(attention, "output", None)
    projection = next(
        (
            part
            for part in (
                getattr(attention, "proj", None),
                getattr(attention, "o_proj", None),
                getattr(output, "dense", None),
            )
            if isinstance(part, nn.Linear)
        ),
        None,
    )
    weights, call = _weights(inner), _wrapper(attention)
    if not isinstance(heads, int) or projection is None or weights is None or call is None:
        return None
    scalars = getattr(inner, "relative_position_bias", None)
    scalars = inner if scalars is None else scalars
    table, window = (getattr(scalars, key, None) for key in ("relative_position_bias_table", "window_size"))
    dropout = getattr(inner, "attn_drop", getattr(inner, "attention_dropout", getattr(inner, "dropout", 0.0)))
    drop = getattr(attention, "proj_drop", getattr(output, "dropout", None))
    annotation = str(inspect.signature(attention.forward).return_annotation)
    return FoundAttention(
        name=name,
        heads=heads,
        weights=weights,
        projection=projection,
        wrapper=call,
        returns_tuple="tuple" in annotation.lower(),
        dropout=float(getattr(dropout, "p", dropout)),
        drop=drop if isinstance(drop, nn.Module) else nn.Identity(),
        window=tuple(window) if isinstance(table, Tensor) and window is not None else None,
        relation_bias=table if isinstance(table, Tensor) else None,
        obstacle=_obstacle(attention, inner),
    )


def _weights(inner: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]] | None:
    """Return the projections of queries, keys and values, from one Linear or from three."""
    joint = getattr(inner, "qkv", None)
    if isinstance(joint, nn.Linear):
        bias = dict(joint.named_parameters()).get("bias")
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return dict(zip("qkv", zip(joint.weight.chunk(3), biases, strict=True), strict=True))
    for names in (("q_proj", "k_proj", "v_proj"), ("query", "key", "value")):
        parts = [getattr(inner, name, None) for name in names]
        if all(isinstance(part, nn.Linear) for part in parts):
            named = [dict(part.named_parameters()) for part in parts if part is not None]
            return {role: (part["weight"], part.get("bias")) for role, part in zip("qkv", named, strict=True)}
    return None


def _wrapper(attention: nn.Module) -> type[WrappedLayer] | None:
    arguments = inspect.signature(attention.forward).parameters
    for wrapper, allowed in _CALLS:
        if arguments and next(iter(arguments)) in allowed and set(arguments) <= allowed:
            return wrapper
    return None


def _obstacle(attention: nn.Module, inner: nn.Module) -> str:
    for name in ("q_norm", "k_norm", "norm", "gate"):
        part = getattr(attention, name, None)
        if not isinstance(part, _WITHOUT_EFFECT):
            return f"has a {name}"
    scale = getattr(inner, "scale", getattr(inner, "scaling", None))
    weights = _weights(inner)
    heads = getattr(inner, "num_heads", getattr(inner, "num_attention_heads", None))
    assert weights is not None and isinstance(heads, int)
    head_dim = len(weights["q"][0]) // heads
    if scale is not None and (not isinstance(scale, float) or abs(scale * head_dim**0.5 - 1) > 1e-6):
        return f"scales its logits by other than {head_dim} ** -0.5"
    if hasattr(inner, "relative_position_bias") and not hasattr(
        inner.relative_position_bias, "relative_position_bias_table"
    ):
        return "has a position bias of another form"
    return ""


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network in order: those in ``model.blocks``, or every module with an attention.

    Raises:
        InputError: if there are none.
    """
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.ModuleList | nn.Sequential):
        return list(blocks)
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        attention = None if module in inside else read_attention(module)
        if attention is not None:
            found.append(module)
            inside |= set(getattr(module, attention.name).modules())
    if not found:
        raise InputError(
            f"model: {type(model).__name__} is not allowed: must have its blocks in .blocks, or blocks with .attn or "
            ".attention"
        )
    return found


@dataclass(frozen=True)
class TokenLayout:
    """How the tokens of a network lie: class token, further tokens, patches."""

    grid: tuple[int, int]
    """Height and width of the grid of patches, or of a window."""
    class_token: bool
    extra_tokens: int = 0
    """Tokens between the class token and the patches, such as a distillation token or registers."""


def find_layout(model: nn.Module) -> TokenLayout | None:
    """Return how the tokens of a network of timm or Hugging Face lie; None if it does not tell."""
    timm_grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    prefix = getattr(model, "num_prefix_tokens", None)
    if timm_grid is not None and isinstance(prefix, int):
        has_class = getattr(model, "cls_token", None) is not None
        return TokenLayout((timm_grid[0], timm_grid[1]), has_class, prefix - has_class)
    for module in model.modules():
        patches = getattr(module, "patch_embeddings", None)
        image, patch = getattr(patches, "image_size", None), getattr(patches, "patch_size", None)
        if image is not None and patch is not None:
            height, width = (
                (side // size for side, size in zip(image, patch, strict=True))
                if isinstance(image, tuple | list)
                else (image // patch,) * 2
            )
            more = [getattr(module, name, None) for name in ("distillation_token", "register_tokens")]
            extra = sum(part.shape[1] for part in more if isinstance(part, Tensor))
            return TokenLayout((height, width), getattr(module, "cls_token", None) is not None, extra)
    return None
