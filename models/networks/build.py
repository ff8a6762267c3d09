"""The two networks of the paper, ViT and GPT, made from a spec.

Source: arXiv 2510.10060, section 5; pre-norm blocks, no positions beside the operators' own for
relative layers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from translution.planner.config.model import ModelSpec, Operator, VitSpec

from ..layers.attention import AbsoluteTranslution, BiasAttention, SelfAttention, ShawAttention
from ..layers.translution import AlphaTranslution, Translution
from ..ops.context import DEFAULT_WORKSPACE_BYTES
from .gpt import LanguageModel
from .vit import VisionTransformer


def make_operator(
    spec: ModelSpec,
    operator: Operator,
    *,
    tile_relations: int | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    implementation: str = "grouped",
) -> nn.Module:
    """One layer's operator.

    Args:
        spec: sizes, roles and geometry.
        operator: one of `OPERATORS`.
        tile_relations, workspace_bytes, implementation: as in `Translution`.
    """
    place: dict[str, Any]
    if isinstance(spec, VitSpec):
        place = {"grid": spec.grid, "class_token": spec.class_token}
    else:
        place = {"length": spec.context, "causal": True}
    sizes: dict[str, Any] = {"head_dim": spec.head_dim, "dropout": spec.dropout, **place}
    if operator == "attention":
        return SelfAttention(spec.dim, spec.heads, rotary=spec.rotary_attention, **sizes)
    sizes |= {"window": spec.window, "workspace_bytes": workspace_bytes}
    if operator in ("bias", "shaw"):
        return (BiasAttention if operator == "bias" else ShawAttention)(spec.dim, spec.heads, **sizes)
    tables: dict[str, Any] = {"roles": spec.roles, "tile_relations": tile_relations}
    if operator == "absolute":
        return AbsoluteTranslution(spec.dim, spec.heads, **sizes, **tables)
    tables["implementation"] = implementation
    if operator == "translution":
        return Translution(spec.dim, spec.heads, **sizes, **tables)
    return AlphaTranslution(spec.dim, spec.heads, c1=spec.c1, c2=spec.c2, rotary=spec.rotary, **sizes, **tables)


def build(
    spec: ModelSpec,
    *,
    tile_relations: int | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    implementation: str = "grouped",
) -> VisionTransformer | LanguageModel:
    """The network of a spec, initialised from torch's random state.

    Args:
        spec: the model.
        tile_relations: relations per tile of a table; None keeps tables whole.
        workspace_bytes: limit of each operator's scratch memory.
        implementation: "grouped" or "gather".

    Raises:
        InputError: for a bad argument.
    """
    operators = [
        make_operator(
            spec,
            operator,
            tile_relations=tile_relations,
            workspace_bytes=workspace_bytes,
            implementation=implementation,
        )
        for operator in spec.layer_operators
    ]
    if isinstance(spec, VitSpec):
        return VisionTransformer(spec, operators)
    return LanguageModel(spec, operators)
