"""The causal language model."""

from __future__ import annotations

from torch import Tensor, nn

from translution.planner.common import InputError
from translution.planner.config import GptSpec

from .blocks import Block, LearnedTokens, apply_checkpointing, make_norm
from .head import Head, TiedEmbedding, TiedHead


class LanguageModel(nn.Module):
    """Causal language model: token ids (B, context) → logits (B, context, vocabulary).

    Args:
        spec: the model.
        operators: one layer (B, N, C) → (B, N, C) for each block.
    """

    def __init__(self, spec: GptSpec, operators: list[nn.Module]) -> None:
        super().__init__()
        self.context = spec.context
        embedding = TiedEmbedding if spec.tied_embeddings else nn.Embedding
        self.embedding = embedding(spec.vocabulary, spec.dim)
        self.positions = LearnedTokens(spec.context, spec.dim, spec.token_init_std) if spec.learned_positions else None
        self.dropout = nn.Dropout(spec.dropout)
        self.blocks = nn.ModuleList(
            apply_checkpointing(Block(spec, operator), spec.checkpointing) for operator in operators
        )
        self.norm = make_norm(spec, spec.dim)
        self.head_norm = make_norm(spec, spec.dim)
        self.head = TiedHead(self.embedding) if spec.tied_embeddings else Head(spec.dim, spec.vocabulary)

    def forward(
        self, tokens_bn: Tensor, targets_bn: Tensor | None = None, *, label_smoothing: float = 0.0, scores: bool = False
    ) -> Tensor:
        """(B, context) → (B, context, vocabulary); with targets, a loss that is computed in chunks of tokens.

        Args:
            tokens_bn: token ids.
            targets_bn: ids of the next tokens, or None. The result is then the mean cross-entropy.
            label_smoothing: share of each target that is spread evenly over the vocabulary.
            scores: return (2, B·context) instead: each token's loss, and 1 where the prediction is right, otherwise 0.
        """
        if tokens_bn.ndim != 2 or tokens_bn.shape[1] != self.context:
            shape = tuple(tokens_bn.shape)
            raise InputError(f"tokens: shape {shape} is not allowed: must be (batch, {self.context})")
        x = self.embedding(tokens_bn)
        if self.positions is not None:
            x = x + self.positions(len(x))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.head_norm(self.norm(x))
        result: Tensor = self.head(x, targets_bn, label_smoothing=label_smoothing, scores=scores)
        return result

    def tie(self) -> None:
        """Give a tied head the embedding's present Parameter, after that was replaced."""
        if isinstance(self.head, TiedHead):
            self.head.weight = self.embedding.weight
