"""The causal language model."""

from __future__ import annotations

from torch import Tensor, nn

from translution.planner.common import InputError
from translution.planner.config import GptSpec

from .blocks import Block, LearnedTokens, apply_checkpointing


class LanguageModel(nn.Module):
    """Causal language model: token ids (B, context) → logits (B, context, vocabulary).

    Args:
        spec: the model.
        operators: one layer (B, N, C) → (B, N, C) for each block.
    """

    def __init__(self, spec: GptSpec, operators: list[nn.Module]) -> None:
        super().__init__()
        self.context = spec.context
        self.embedding = nn.Embedding(spec.vocabulary, spec.dim)
        self.positions = LearnedTokens(spec.context, spec.dim) if spec.learned_positions else None
        self.dropout = nn.Dropout(spec.dropout)
        self.blocks = nn.ModuleList(
            apply_checkpointing(Block(spec.dim, operator, spec.ffn_dim, spec.dropout), spec.checkpointing)
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
