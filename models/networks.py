"""The two networks of the paper, ViT and GPT, made from a spec.

Source: arXiv 2510.10060, section 5; pre-norm blocks, no positions beside the operators' own for
relative layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from translution.planner.errors import InputError, MissingPackageError
from translution.planner.model_spec import GptSpec, ModelSpec, Operator, VitSpec

from .attention import AbsoluteTranslution, BiasAttention, SelfAttention, ShawAttention
from .context import DEFAULT_WORKSPACE_BYTES
from .layers import AlphaTranslution, Translution


class LearnedTokens(nn.Module):
    """A learned (1, N, C) tensor: the class token, or the position embedding."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, tokens, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, batch: int) -> Tensor:
        """The tokens for every sample of a batch, (B, N, C), without copies."""
        return self.weight.expand(batch, -1, -1)


class FeedForward(nn.Module):
    """Linear, GELU, dropout, Linear on each token."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x_bnc: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C)."""
        result: Tensor = self.down(self.dropout(self.activation(self.up(x_bnc))))
        return result


class Block(nn.Module):
    """Pre-norm block: the operator and the feed-forward network, each dropped out and added to its input."""

    def __init__(self, dim: int, operator: nn.Module, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.operator_norm = nn.LayerNorm(dim)
        self.operator = operator
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_bnc: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C)."""
        x_bnc = x_bnc + self.dropout(self.operator(self.operator_norm(x_bnc)))
        result: Tensor = x_bnc + self.dropout(self.ffn(self.ffn_norm(x_bnc)))
        return result


class PatchEmbedding(nn.Module):
    """Image (B, channels, H, W) to patch tokens (B, patches, C)."""

    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.image, self.patch, self.grid = spec.image, spec.patch, spec.grid
        self.channels = spec.channels
        self.patch_norm = nn.LayerNorm(spec.patch_dim)
        self.projection = nn.Linear(spec.patch_dim, spec.dim)
        self.norm = nn.LayerNorm(spec.dim)

    def forward(self, image_bchw: Tensor) -> Tensor:
        """Patches in row-major order; values of a patch by row, column, channel."""
        expected = (self.channels, *self.image)
        if image_bchw.ndim != 4 or image_bchw.shape[1:] != expected:
            raise InputError(f"image: shape {tuple(image_bchw.shape)} is not allowed: must be (batch, *{expected})")
        x = image_bchw.unflatten(3, (self.grid[1], self.patch[1])).unflatten(2, (self.grid[0], self.patch[0]))
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        result: Tensor = self.norm(self.projection(self.patch_norm(x)))
        return result


def _checkpointed(block: Block, checkpointing: str) -> nn.Module:
    """A block that keeps only its input for backward, on the device or on the host."""
    if checkpointing == "none":
        return block
    if checkpointing == "block":
        return CheckpointedBlock(block)
    try:
        from fairscale.nn.checkpoint import checkpoint_wrapper
    except ImportError:
        raise MissingPackageError("fairscale is missing: pip install 'translution-scale[train]'") from None
    wrapped: nn.Module = checkpoint_wrapper(block, offload_to_cpu=True)
    return wrapped


class CheckpointedBlock(Block):
    """The block, computed again in backward; its parameters have the same names."""

    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)
        for name, module in block.named_children():
            self.add_module(name, module)

    def forward(self, x_bnc: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C)."""
        if not torch.is_grad_enabled():
            return super().forward(x_bnc)
        result: Tensor = checkpoint(super().forward, x_bnc, use_reentrant=False)
        return result


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


class VisionTransformer(nn.Module):
    """Images (B, channels, H, W) to class logits (B, classes)."""

    def __init__(self, spec: VitSpec, operators: list[nn.Module]) -> None:
        super().__init__()
        self.pool = spec.pool
        self.embedding = PatchEmbedding(spec)
        self.class_token = LearnedTokens(1, spec.dim) if spec.class_token else None
        self.positions = LearnedTokens(spec.tokens, spec.dim) if spec.learned_positions else None
        self.dropout = nn.Dropout(spec.dropout)
        self.blocks = nn.ModuleList(
            _checkpointed(Block(spec.dim, operator, spec.ffn_dim, spec.dropout), spec.checkpointing)
            for operator in operators
        )
        self.norm = nn.LayerNorm(spec.dim)
        self.head = nn.Linear(spec.dim, spec.classes)

    def forward(self, image_bchw: Tensor) -> Tensor:
        """(B, channels, H, W) → (B, classes)."""
        x = self.embedding(image_bchw)
        if self.class_token is not None:
            x = torch.cat([self.class_token(len(x)), x], dim=1)
        if self.positions is not None:
            x = x + self.positions(len(x))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        result: Tensor = self.head(x[:, 0] if self.pool == "class" else x.mean(dim=1))
        return result


class LanguageModel(nn.Module):
    """Token numbers (B, context) to logits over the vocabulary (B, context, vocabulary)."""

    def __init__(self, spec: GptSpec, operators: list[nn.Module]) -> None:
        super().__init__()
        self.context = spec.context
        self.embedding = nn.Embedding(spec.vocabulary, spec.dim)
        self.positions = LearnedTokens(spec.context, spec.dim) if spec.learned_positions else None
        self.dropout = nn.Dropout(spec.dropout)
        self.blocks = nn.ModuleList(
            _checkpointed(Block(spec.dim, operator, spec.ffn_dim, spec.dropout), spec.checkpointing)
            for operator in operators
        )
        self.norm = nn.LayerNorm(spec.dim)
        self.head_norm = nn.LayerNorm(spec.dim)
        self.head = nn.Linear(spec.dim, spec.vocabulary, bias=False)

    def forward(self, tokens_bn: Tensor) -> Tensor:
        """(B, context) → (B, context, vocabulary)."""
        if tokens_bn.ndim != 2 or tokens_bn.shape[1] != self.context:
            shape = tuple(tokens_bn.shape)
            raise InputError(f"tokens: shape {shape} is not allowed: must be (batch, {self.context})")
        x = self.embedding(tokens_bn)
        if self.positions is not None:
            x = x + self.positions(len(x))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(self.head_norm(self.norm(x)))
        return result


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
