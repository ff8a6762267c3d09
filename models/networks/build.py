"""The paper's two networks, ViT and GPT, built from a spec.

Source: arXiv 2510.10060, section 5. Blocks are pre-norm; relative layers have no position encoding
besides their relations.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from translution.planner.config import DEFAULT_WORKSPACE_BYTES, ModelSpec, Operator, PatchSpec

from ..layers.attention import AbsoluteTranslution, BiasAttention, SelfAttention, ShawAttention
from ..layers.translution import AlphaTranslution, Translution
from .gpt import LanguageModel
from .vit import VisionTransformer


def make_operator(
    spec: ModelSpec,
    operator: Operator,
    *,
    tile_relations: int | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    implementation: str = "auto",
    relation_group: ProcessGroup | None = None,
) -> nn.Module:
    """Return the operator of one block, a layer (B, N, C) → (B, N, C).

    Args:
        spec: model with the sizes, roles and geometry of the layer.
        operator: name of the operator, one of `OPERATORS`.
        tile_relations, workspace_bytes, implementation, relation_group: as in `Translution`.
    """
    layout: dict[str, Any]
    if isinstance(spec, PatchSpec):
        layout = {"grid": spec.grid, "class_token": spec.class_token, "causal": spec.geometry.causal}
    else:
        layout = {"length": spec.context, "causal": True}
    sizes: dict[str, Any] = {"head_dim": spec.head_dim, "dropout": spec.dropout, "bias": spec.bias, **layout}
    if operator == "attention":
        if not isinstance(spec, PatchSpec):
            sizes["causal"] = spec.attention_causal
        turned: dict[str, Any] = {"rotary": spec.rotary_attention, "rotary_pairs": spec.rotary_pairs}
        return SelfAttention(spec.dim, spec.heads, kv_heads=spec.kv_heads, **turned, **sizes)
    sizes |= {"window": spec.window, "workspace_bytes": workspace_bytes}
    if operator in ("bias", "shaw"):
        return (BiasAttention if operator == "bias" else ShawAttention)(spec.dim, spec.heads, **sizes)
    tables: dict[str, Any] = {"roles": spec.roles, "tile_relations": tile_relations}
    if operator == "absolute":
        return AbsoluteTranslution(spec.dim, spec.heads, **sizes, **tables)
    tables |= {"implementation": implementation, "relation_group": relation_group}
    if operator == "translution":
        return Translution(spec.dim, spec.heads, **sizes, **tables)
    tables |= {"rotary": spec.rotary, "rotary_pairs": spec.rotary_pairs}
    return AlphaTranslution(spec.dim, spec.heads, c1=spec.c1, c2=spec.c2, **sizes, **tables)


def build(
    spec: ModelSpec,
    *,
    tile_relations: int | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    implementation: str = "auto",
    relation_group: ProcessGroup | None = None,
) -> VisionTransformer | LanguageModel:
    """Build the network of a spec, initialized from torch's random state.

    Args:
        spec: the model; `planner.config.presets.preset` and `parse_model_spec` return one.
        tile_relations: number of relations per tile of a table; None stores each table as one Parameter.
        workspace_bytes: limit of the scratch memory of one operator call.
        implementation: as in `Translution`.
        relation_group: ranks that share out the relations, as in `Translution`; every rank builds the network, and must
            do so with the same random state.

    Returns:
        A vision transformer, images (B, channels, H, W) or clips (B, channels, frames, H, W) → logits (B, classes), or
        a language model, token ids (B, context) → logits (B, context, vocabulary).

    Raises:
        InputError: naming the argument that is not allowed.
        MissingPackageError: for a spec with ``checkpointing="offload"``, without fairscale.
    """
    operators = [
        make_operator(
            spec,
            operator,
            tile_relations=tile_relations,
            workspace_bytes=workspace_bytes,
            implementation=implementation,
            relation_group=relation_group,
        )
        for operator in spec.layer_operators
    ]
    if isinstance(spec, PatchSpec):
        return VisionTransformer(spec, operators)
    return LanguageModel(spec, operators)
