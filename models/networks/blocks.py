"""Modules that both networks share: learned tokens, feed-forward network, block, activation checkpointing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from translution.planner.common import MissingPackageError


class LearnedTokens(nn.Module):
    """A learned (1, N, C) tensor: the class token or the position embedding.

    Args:
        tokens: number of tokens, N.
        dim: model width, C.
    """

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, tokens, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, batch: int) -> Tensor:
        """Return the tokens for every sample of a batch as a view, (B, N, C)."""
        return self.weight.expand(batch, -1, -1)


class FeedForward(nn.Module):
    """Linear, GELU, dropout and Linear, applied to each token.

    Args:
        dim: model width, C.
        hidden: width between the two Linear layers.
        dropout: probability of dropping a hidden value in training.
    """

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
    """Pre-norm transformer block: operator and feed-forward network, each with dropout and a residual connection.

    Args:
        dim: model width, C.
        operator: layer (B, N, C) → (B, N, C).
        hidden: hidden width of the feed-forward network.
        dropout: probability of dropping a value of either output, or a hidden value, in training.
    """

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


def apply_checkpointing(block: Block, checkpointing: str) -> nn.Module:
    """Wrap a block so that it saves only its input for backward.

    Args:
        block: the block.
        checkpointing: "none", "block" (save the input on the device) or "offload" (on the host).

    Raises:
        MissingPackageError: for "offload" without fairscale.
    """
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
    """A block whose forward is recomputed in backward; its parameters keep their names.

    Args:
        block: block whose modules are taken over.
    """

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
