"""Parts that both networks share: class token, feed-forward, transformer block, checkpointing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from translution.planner.common.errors import MissingPackageError


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
