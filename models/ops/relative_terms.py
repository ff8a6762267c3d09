"""Terms of an operator chain that are cheaper than a table: a scalar or a vector per relation.

Nothing is expanded for the full batch: scalars are summed per relation in one step, and vectors are
expanded for a bounded number of query positions at a time. Both are looked up again in backward.
Like the tile of a table, each term is a module that the chain calls, and its autograd function stores
the Parameter itself.

Sources: scalars, Swin Transformer (arXiv 2103.14030, section 3.2); vectors, "Self-Attention with
Relative Position Representations" (arXiv 1803.02155), one set for all heads.

Legend of shapes: i query positions of a chunk, b batch, h heads, n tokens, e = h·d, d width per head,
R (suffix r) relations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .context import RelationContext, accumulation_dtype, relation_index


def _index(context: RelationContext, device: torch.device) -> Tensor:
    # Pairs that do not exist read an arbitrary entry; the softmax masks them.
    return relation_index(context.geometry, device).clamp_(min=0)


def _sum_by(index: Tensor, rows: Tensor, target: Tensor) -> None:
    """Add each row to the target row of its index, in an order that is the same in every run."""
    if target.device.type == "cpu":
        target.index_add_(0, index.flatten(), rows)
    else:
        target.index_put_((index.flatten(),), rows, accumulate=True)


class _AddBias(Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, context: RelationContext, table_rh: Tensor) -> Tensor:
        assert context.logits is not None
        ctx.context, ctx.table = context, table_rh
        bias_nnh = table_rh[_index(context, table_rh.device)].to(context.logits.dtype)
        # The softmax scales all logits, but these scalars must stay unscaled.
        context.logits.add_(bias_nnh.permute(2, 0, 1), alpha=1 / context.scale)
        return link.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_link: Tensor) -> tuple[Tensor | None, ...]:
        context: RelationContext = ctx.context
        table_rh: Tensor = ctx.table
        if not ctx.needs_input_grad[2]:
            return grad_link, None, None
        assert context.grad_attention is not None
        grad_nnh = context.grad_attention.sum(0).permute(1, 2, 0) / context.scale
        grad = grad_nnh.new_zeros(table_rh.shape)
        _sum_by(_index(context, grad.device), grad_nnh.flatten(0, 1), grad)
        return grad_link, None, grad.to(table_rh.dtype)


class RelationBias(nn.Module):
    """A learned scalar for each relation and head, added to the logits.

    Args:
        relations: number of relations, R.
        heads: number of attention heads, h.
    """

    def __init__(self, relations: int, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(relations, heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, link: Tensor, context: RelationContext) -> Tensor:
        """Add the scalars to the context's logits; link (1,) → link (1,)."""
        result: Tensor = _AddBias.apply(link, context, self.table)
        return result


def _chunks(context: RelationContext, vectors_rd: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of query positions and the vectors of their pairs (i, n, d), within the workspace limit."""
    tokens = context.geometry.tokens
    index = _index(context, vectors_rd.device)
    step = max(1, context.workspace_bytes // (2 * tokens * vectors_rd.shape[1] * vectors_rd.element_size()))
    for start in range(0, tokens, step):
        chunk = slice(start, min(start + step, tokens))
        yield chunk, vectors_rd[index[chunk]]


def _rows(x_bne: Tensor, chunk: slice, heads: int) -> Tensor:
    """Return the chunk's positions of (b, n, h·d) as (i, b·h, d)."""
    rows: Tensor = x_bne[:, chunk].unflatten(2, (heads, -1))
    return rows.permute(1, 0, 2, 3).flatten(1, 2)


def _pairs(x_bhnn: Tensor, chunk: slice) -> Tensor:
    """Return the chunk's query rows of (b, h, n, n) as (i, b·h, n)."""
    return x_bhnn[:, :, chunk].permute(2, 0, 1, 3).flatten(1, 2)


def _add_rows(target_bne: Tensor, chunk: slice, rows_ibhd: Tensor) -> None:
    """Add (i, b·h, d) to the chunk's positions of (b, n, h·d)."""
    target_bne[:, chunk].add_(rows_ibhd.unflatten(1, (len(target_bne), -1)).flatten(2).transpose(0, 1))


class _AddKeyVectors(Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, context: RelationContext, vectors_rd: Tensor) -> Tensor:
        assert context.logits is not None
        ctx.context, ctx.vectors = context, vectors_rd
        query, (batch, heads) = context.source["plain_query"], context.logits.shape[:2]
        for chunk, vectors_ind in _chunks(context, vectors_rd):
            rows = _rows(query, chunk, heads)
            logits = torch.bmm(rows, vectors_ind.to(rows.dtype).transpose(1, 2))
            context.logits[:, :, chunk].add_(logits.unflatten(1, (batch, heads)).permute(1, 2, 0, 3))
        return link.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_link: Tensor) -> tuple[Tensor | None, ...]:
        context: RelationContext = ctx.context
        vectors_rd: Tensor = ctx.vectors
        grad_logits = context.grad_attention
        assert grad_logits is not None
        query, heads = context.source["plain_query"], context.heads
        dtype = accumulation_dtype(query.dtype)
        grad_vectors = vectors_rd.new_zeros(vectors_rd.shape, dtype=dtype)
        grad_query = torch.zeros_like(query, dtype=dtype)
        index = _index(context, query.device)
        for chunk, vectors_ind in _chunks(context, vectors_rd):
            grad = _pairs(grad_logits, chunk).to(query.dtype)
            _add_rows(grad_query, chunk, torch.bmm(grad, vectors_ind.to(query.dtype)))
            products = torch.bmm(grad.transpose(1, 2), _rows(query, chunk, heads)).to(dtype)
            _sum_by(index[chunk], products.flatten(0, 1), grad_vectors)
        if "plain_query" in context.wanted:
            context.grads["plain_query"] = grad_query
        return grad_link, None, grad_vectors.to(vectors_rd.dtype) if ctx.needs_input_grad[2] else None


class _AddValueVectors(Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, context: RelationContext, vectors_rd: Tensor) -> Tensor:
        assert context.weights is not None
        ctx.context, ctx.vectors = context, vectors_rd
        like = context.source["plain_value"]
        context.out = torch.zeros_like(like, dtype=accumulation_dtype(like.dtype))
        for chunk, vectors_ind in _chunks(context, vectors_rd):
            weights = _pairs(context.weights, chunk)
            _add_rows(context.out, chunk, torch.bmm(weights, vectors_ind.to(weights.dtype)))
        return link.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_link: Tensor) -> tuple[Tensor | None, ...]:
        context: RelationContext = ctx.context
        vectors_rd: Tensor = ctx.vectors
        assert context.grad_out is not None and context.weights is not None and context.grad_attention is not None
        (batch, heads), dtype = context.weights.shape[:2], context.weights.dtype
        grad_vectors = vectors_rd.new_zeros(vectors_rd.shape, dtype=accumulation_dtype(dtype))
        index = _index(context, vectors_rd.device)
        for chunk, vectors_ind in _chunks(context, vectors_rd):
            grad = _rows(context.grad_out, chunk, heads)
            weights = torch.bmm(grad, vectors_ind.to(dtype).transpose(1, 2))
            context.grad_attention[:, :, chunk].add_(weights.unflatten(1, (batch, heads)).permute(1, 2, 0, 3))
            products = torch.bmm(_pairs(context.weights, chunk).transpose(1, 2), grad).to(grad_vectors.dtype)
            _sum_by(index[chunk], products.flatten(0, 1), grad_vectors)
        return grad_link, None, grad_vectors.to(vectors_rd.dtype) if ctx.needs_input_grad[2] else None


class RelationVectors(nn.Module):
    """A learned vector for each relation, added to keys or to values.

    Args:
        relations: number of relations, R.
        head_dim: width per head, D.
        role: "key" or "value".
    """

    def __init__(self, relations: int, head_dim: int, role: str) -> None:
        super().__init__()
        self.role = role
        self.vectors = nn.Parameter(torch.empty(relations, head_dim))
        nn.init.trunc_normal_(self.vectors, std=0.02)

    def forward(self, link: Tensor, context: RelationContext) -> Tensor:
        """Add the vectors' term to the context's logits or output; link (1,) → link (1,)."""
        function = _AddKeyVectors if self.role == "key" else _AddValueVectors
        result: Tensor = function.apply(link, context, self.vectors)
        return result
