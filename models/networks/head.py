"""The language model's head, and its loss in chunks of tokens, so that logits over the vocabulary are never whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from translution.planner.config import LOSS_CHUNK_ELEMENTS

HELD_SCALE = 1024.0
"""Factor of the gradients that are held from forward to backward. Without it, those of a mean over many tokens are too
small for fp16: the loss is scaled only in backward."""


def chunk_rows(vocabulary: int) -> int:
    """Return the number of tokens of a chunk."""
    return max(1, LOSS_CHUNK_ELEMENTS // vocabulary)


class Head(nn.Linear):
    """Logits over the vocabulary, (B, N, C) → (B, N, V), or losses of them.

    Args:
        dim: model width, C.
        vocabulary: number of token types, V.
    """

    def __init__(self, dim: int, vocabulary: int) -> None:
        super().__init__(dim, vocabulary, bias=False)

    def forward(
        self, x_bnc: Tensor, targets_bn: Tensor | None = None, *, label_smoothing: float = 0.0, scores: bool = False
    ) -> Tensor:
        """Return logits (B, N, V); with targets, what `chunked_loss` or `chunked_scores` returns."""
        return head_output(x_bnc, self.weight, targets_bn, label_smoothing=label_smoothing, scores=scores)


class TiedHead(nn.Module):
    """A head that multiplies by the embedding's matrix.

    The Parameter is registered here too, so that ZeRO-3 gathers it for this module as well.

    Args:
        embedding: the embedding (V, C) of the tokens.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight

    def forward(
        self, x_bnc: Tensor, targets_bn: Tensor | None = None, *, label_smoothing: float = 0.0, scores: bool = False
    ) -> Tensor:
        """As `Head`."""
        return head_output(x_bnc, self.weight, targets_bn, label_smoothing=label_smoothing, scores=scores)


class TiedEmbedding(nn.Embedding):
    """The embedding of a tied head: its values are small enough to be a head's weights too (GPT-2's deviation)."""

    def reset_parameters(self) -> None:
        """Draw the values."""
        nn.init.normal_(self.weight, std=0.02)


def head_output(
    x_bnc: Tensor, weight_vc: Tensor, targets_bn: Tensor | None, *, label_smoothing: float, scores: bool
) -> Tensor:
    """Return logits (B, N, V); with targets the mean loss, or with ``scores`` what `chunked_scores` returns."""
    if targets_bn is None:
        return F.linear(x_bnc, weight_vc)
    x_rc, targets_r = x_bnc.flatten(0, 1), targets_bn.flatten()
    if torch.is_autocast_enabled(x_rc.device.type):
        dtype = torch.get_autocast_dtype(x_rc.device.type)
        x_rc, weight_vc = x_rc.to(dtype), weight_vc.to(dtype)
    if scores:
        return chunked_scores(x_rc, weight_vc, targets_r)
    return chunked_loss(x_rc, weight_vc, targets_r, label_smoothing=label_smoothing)


def chunked_loss(x_rc: Tensor, weight_vc: Tensor, targets_r: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of x·Wᵀ, computed in chunks of tokens.

    Forward computes each chunk's logits, its loss, and the gradients of x and W, and holds only these for backward. The
    sum over chunks of W's gradient has W's dtype.

    Args:
        x_rc: rows (R, C).
        weight_vc: the head's weight (V, C).
        targets_r: token ids (R,).
        label_smoothing: share of each target that is spread evenly over all token types.

    Returns:
        The loss, a scalar in fp32 or wider. It has no second derivative, and its backward runs once.
    """
    # Within forward torch's grad mode is off, whether or not gradients are wanted.
    wanted = torch.is_grad_enabled() and (x_rc.requires_grad or weight_vc.requires_grad)
    result: Tensor = _ChunkedLoss.apply(x_rc, weight_vc, targets_r, label_smoothing, wanted)
    return result


@torch.no_grad()
def chunked_scores(x_rc: Tensor, weight_vc: Tensor, targets_r: Tensor) -> Tensor:
    """Return (2, R) in fp32 or wider: each token's loss, and 1 where its target has the largest logit, otherwise 0.

    Args:
        x_rc, weight_vc, targets_r: as in `chunked_loss`.
    """
    parts = []
    for rows in _chunks(len(x_rc), len(weight_vc)):
        logits = _widen(F.linear(x_rc[rows], weight_vc))
        losses = F.cross_entropy(logits, targets_r[rows], reduction="none")
        parts.append(torch.stack([losses, (logits.argmax(-1) == targets_r[rows]).to(losses.dtype)]))
        del logits
    return torch.cat(parts, dim=1)


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    step = chunk_rows(vocabulary)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _widen(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype.itemsize < 4 else logits


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_rc: Tensor, weight_vc: Tensor, targets_r: Tensor, label_smoothing: float, wanted: bool
    ) -> Tensor:
        rows, total = len(x_rc), None
        with torch.autocast(x_rc.device.type, enabled=False):
            x_grad = torch.empty_like(x_rc) if wanted else None
            weight_grad = torch.zeros_like(weight_vc) if wanted else None
            for chunk in _chunks(rows, len(weight_vc)):
                loss, grad = _loss_and_gradient(x_rc[chunk], weight_vc, targets_r[chunk], label_smoothing, wanted)
                total = loss if total is None else total + loss
                if x_grad is not None and weight_grad is not None:
                    grad = grad.mul_(HELD_SCALE / rows).to(x_rc.dtype)
                    torch.mm(grad, weight_vc, out=x_grad[chunk])
                    weight_grad.addmm_(grad.t(), x_rc[chunk])
                del grad
        if x_grad is not None and weight_grad is not None:
            ctx.save_for_backward(x_grad, weight_grad)
        assert total is not None
        return total / rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_grad, weight_grad = ctx.saved_tensors
        # In place: a copy of the weight's gradient is as large as the weight. A second backward raises, as autograd
        # has released the tensors, or its check of their version does.
        scale = grad / HELD_SCALE
        return x_grad.mul_(scale), weight_grad.mul_(scale), None, None, None


def _loss_and_gradient(
    x_rc: Tensor, weight_vc: Tensor, targets_r: Tensor, smoothing: float, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Return the sum of a chunk's losses, and, if it is wanted, the gradient of its logits."""
    log_rv = _widen(F.linear(x_rc, weight_vc)).log_softmax(-1)
    loss = F.nll_loss(log_rv, targets_r, reduction="sum")
    if smoothing:
        loss = loss * (1 - smoothing) - log_rv.sum() * (smoothing / len(weight_vc))
    if not wanted:
        return loss, log_rv
    # The gradient of the logits is their softmax less the target's distribution; the memory is that of the logarithm.
    grad_rv = log_rv.exp_()
    one = grad_rv.new_full((1, 1), smoothing - 1).expand(len(targets_r), 1)
    grad_rv.scatter_add_(1, targets_r[:, None], one)
    return loss, grad_rv.sub_(smoothing / len(weight_vc)) if smoothing else grad_rv
