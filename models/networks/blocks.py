"""Modules that both networks share: learned tokens, feed-forward network, block, activation checkpointing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from translution.planner.common import MissingPackageError
from translution.planner.config import ModelSpec


class LearnedTokens(nn.Module):
    """A learned (1, N, C) tensor: the class token or the position embedding.

    Args:
        tokens: number of tokens, N.
        dim: model width, C.
        std: standard deviation of the initial values.
    """

    def __init__(self, tokens: int, dim: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, tokens, dim))
        nn.init.normal_(self.weight, std=std)

    def forward(self, batch: int) -> Tensor:
        """Return the tokens for every sample of a batch as a view, (B, N, C)."""
        return self.weight.expand(batch, -1, -1)


class FeedForward(nn.Module):
    """Linear, GELU, dropout and Linear, applied to each token.

    Args:
        dim: model width, C.
        hidden: width between the two Linear layers.
        dropout: probability of dropping a hidden value in training.
        bias: whether the Linear layers have biases.
    """

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0, *, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x_bnc: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C)."""
        result: Tensor = self.down(self.dropout(self.activation(self.up(x_bnc))))
        return result


class GatedFeedForward(nn.Module):
    """SwiGLU, applied to each token: down(silu(gate(x)) · up(x)), with dropout before the last Linear layer.

    Args:
        dim, hidden, dropout, bias: as in `FeedForward`.

    Source: arXiv 2002.05202, equation 6.
    """

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0, *, bias: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=bias)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.activation = nn.SiLU()
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x_bnc: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C)."""
        result: Tensor = self.down(self.dropout(self.activation(self.gate(x_bnc)) * self.up(x_bnc)))
        return result


def make_norm(spec: ModelSpec, width: int) -> nn.Module:
    """Return the norm of a spec over ``width`` values."""
    return nn.RMSNorm(width, eps=1e-5) if spec.norm == "rms" else nn.LayerNorm(width, bias=spec.bias)


class Block(nn.Module):
    """Pre-norm transformer block: operator and feed-forward network, each with dropout and a residual connection.

    Args:
        spec: width, norms, feed-forward network, and the dropout of either output and of hidden values in training.
        operator: layer (B, N, C) → (B, N, C).
    """

    def __init__(self, spec: ModelSpec, operator: nn.Module) -> None:
        super().__init__()
        feed_forward = GatedFeedForward if spec.ffn == "swiglu" else FeedForward
        self.operator_norm = make_norm(spec, spec.dim)
        self.operator = operator
        self.ffn_norm = make_norm(spec, spec.dim)
        self.ffn = feed_forward(spec.dim, spec.ffn_dim, spec.dropout, bias=spec.bias)
        self.dropout = nn.Dropout(spec.dropout)

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
