"""The grouped operator, forward and backward: the pairs of one relation form one matrix product.

The published implementation copies a matrix for every pair and sample and saves the copies for
backward: b·n²·c·e elements per role. Here no matrix is copied. The projected queries, keys and
values of a relation exist only while its logits or its part of the output are computed, and
backward computes them again. Saved for backward: the operator's inputs and the attention weights.

One call is a chain of autograd functions; a tensor of one element, the *link*, orders them:

    OpenFunction → LogitTileFunction … → SoftmaxFunction → ValueTileFunction … → CloseFunction

Each tile's function stores the tile's Parameter itself, never a view: under ZeRO-3 a saved view
would keep the gathered storage alive after its release, and the Parameter is gathered again
before the tile's backward.

Source: arXiv 2510.10060, equations of Translution and α-Translution; shapes as in context.py, k relations of a tile.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from translution.planner.config import RelationPairs, TokenBlock

from .batched import BatchedTile
from .context import (
    RelationContext,
    accumulation_dtype,
    by_token,
    missing_pairs,
    pair_values,
    token_rows,
)
from .fused import FusedTile

SOURCES = ("query", "key", "value", "plain_query", "plain_key", "plain_value")
"""Inputs of the three relative roles, projected for a logit role without a table, and of the three plain roles."""


def _many_relations(context: RelationContext, first: int, count: int) -> BatchedTile | FusedTile | None:
    """Return what computes many relations of a tile at a time; None to take one after the other."""
    kinds = {"fused": FusedTile, "batched": BatchedTile}
    return kinds[context.implementation](context, first, count) if context.implementation in kinds else None


def _split_heads(x_bne: Tensor, heads: int) -> Tensor:
    """Return (b, n, h·d) as a (b, h, n, d) view."""
    batch, tokens, width = x_bne.shape
    return x_bne.view(batch, tokens, heads, width // heads).transpose(1, 2)


def _grad_buffer(context: RelationContext, name: str) -> Tensor:
    if name not in context.grads:
        source = context.source[name]
        context.grads[name] = torch.zeros_like(source, dtype=accumulation_dtype(source.dtype))
    return context.grads[name]


def _scatter_add(
    context: RelationContext, name: str, block: TokenBlock, piece: tuple[slice, slice], grad: Tensor
) -> None:
    """Add rows (b, …, width) to the gradient of a block's tokens; sum them first if they share one token."""
    token_rows(_grad_buffer(context, name), block, *piece).add_(by_token(grad, block))


class OpenFunction(Function):
    """Start of the chain: stores the inputs and starts the logits; backward returns the inputs' gradients."""

    @staticmethod
    def forward(ctx: Any, context: RelationContext, anchor: Tensor, *sources: Tensor | None) -> Tensor:
        """Anchor (1,) → link (1,); sources in the order of SOURCES, (b, n, width) each."""
        given = {name: x for name, x in zip(SOURCES, sources, strict=True) if x is not None}
        context.wanted = frozenset(name for name, x in given.items() if x.requires_grad)
        context.source = {name: x.detach() for name, x in given.items()}
        first, tokens = next(iter(context.source.values())), context.geometry.tokens
        shape = (len(first), context.heads, tokens, tokens)
        context.allocate_workspace()
        if "plain_query" in context.source:
            query = _split_heads(context.source["plain_query"], context.heads)
            key = _split_heads(context.source["plain_key"], context.heads)
            context.logits = torch.matmul(query, key.transpose(2, 3)).to(accumulation_dtype(first.dtype))
        elif not context.geometry.complete:
            context.logits = first.new_full(shape, -torch.inf, dtype=accumulation_dtype(first.dtype))
        else:
            context.logits = first.new_empty(shape, dtype=accumulation_dtype(first.dtype))
        ctx.context = context
        return torch.zeros_like(anchor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_link: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of plain queries and keys; return those of all inputs."""
        context: RelationContext = ctx.context
        if "plain_query" in context.source:
            assert context.grad_attention is not None
            grad_logits = context.grad_attention.to(context.source["plain_query"].dtype)
            for name, other, grad in (
                ("plain_query", "plain_key", grad_logits),
                ("plain_key", "plain_query", grad_logits.transpose(2, 3)),
            ):
                if name in context.wanted:
                    product = torch.matmul(grad, _split_heads(context.source[other], context.heads))
                    product = product.transpose(1, 2).flatten(2)
                    # Another term, such as relative vectors, may already have added to this gradient.
                    context.grads[name] = context.grads[name] + product if name in context.grads else product
        dtype = next(iter(context.source.values())).dtype
        # An input has no gradient if it requires none, or if only the other output has a gradient.
        wanted = {name: grad.to(dtype) for name, grad in context.grads.items() if name in context.wanted}
        grads = [wanted.get(name) for name in SOURCES]
        context.release()
        return (None, grad_link, *grads)


class LogitTileFunction(Function):
    """Logits of the relations of one tile, from its query and key matrices."""

    @staticmethod
    def forward(
        ctx: Any, link: Tensor, context: RelationContext, first: int, query_kce: Tensor | None, key_kce: Tensor | None
    ) -> Tensor:
        """Link (1,) → link (1,); matrices of relations ``first`` to ``first + k − 1``, None for a plain role."""
        ctx.context, ctx.first = context, first
        ctx.query, ctx.key = query_kce, key_kce
        given = query_kce if query_kce is not None else key_kce
        assert given is not None
        ctx.count = count = len(given)
        assert context.logits is not None
        rest: Iterable[int] = range(first, first + count)
        if many := _many_relations(context, first, count):
            many.add_logits(query_kce, key_kce)
            rest = many.leftover
        for relation in rest:
            pairs, offset = context.geometry.pairs(relation), relation - first
            for piece in context.pieces(pairs, context.logits.shape[0]):
                query = _project(context, "query", 0, pairs.query, piece, query_kce, offset)
                key = _project(context, "key", 1, pairs.key, piece, key_kce, offset)
                product = torch.mul(query, key) if query.shape != key.shape else query.mul_(key)
                values = product.sum(-1)
                target = pair_values(context.logits, pairs, *piece)
                if context.adds_logits:
                    target.add_(values)
                else:
                    target.copy_(values)
        return link.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_link: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the matrices; add to those of queries and keys in the context."""
        context: RelationContext = ctx.context
        weights: dict[str, Tensor | None] = {"query": ctx.query, "key": ctx.key}
        grads: dict[str, Tensor | None] = {"query": None, "key": None}
        for index, name in enumerate(("query", "key")):
            weight = weights[name]
            if weight is not None and ctx.needs_input_grad[3 + index]:
                grads[name] = torch.empty_like(weight, memory_format=torch.contiguous_format)
        assert context.grad_attention is not None
        rest: Iterable[int] = range(ctx.first, ctx.first + ctx.count)
        if many := _many_relations(context, ctx.first, ctx.count):
            many.logits_backward(weights, grads)
            rest = many.leftover
        for relation in rest:
            pairs = context.geometry.pairs(relation)
            for piece in context.pieces(pairs, context.grad_attention.shape[0]):
                _logit_piece_backward(context, pairs, piece, relation - ctx.first, weights, grads)
        return grad_link, None, None, grads["query"], grads["key"]


def _matrix(tile_kce: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """Return one relation's matrix (c, e) in the dtype of the rows, which autocast makes differ from the tile's."""
    return tile_kce[offset].to(dtype)


def _project(
    context: RelationContext,
    name: str,
    slot: int,
    block: TokenBlock,
    piece: tuple[slice, slice],
    tile_kce: Tensor | None,
    offset: int,
) -> Tensor:
    """Multiply a role's rows by the relation's matrix, (b, …, h, d); copy the rows of a plain role.

    The result is in matrix ``2 + slot`` of the workspace, the copied rows in matrix ``slot``.
    """
    view = token_rows(context.source[name], block, *piece)
    rows = view.shape[:-1].numel()
    result = context.workspace().matrix(2 + slot, rows)
    if tile_kce is None:
        result.view(view.shape).copy_(view)
    else:
        torch.mm(context.workspace().copy_rows(slot, view), _matrix(tile_kce, offset, result.dtype), out=result)
    return result.view(*view.shape[:-1], context.heads, -1)


def _logit_piece_backward(
    context: RelationContext,
    pairs: RelationPairs,
    piece: tuple[slice, slice],
    offset: int,
    weights: dict[str, Tensor | None],
    grads: dict[str, Tensor | None],
) -> None:
    """Add one piece's part to the gradients of the matrices and of the inputs."""
    assert context.grad_attention is not None
    query = _project(context, "query", 0, pairs.query, piece, weights["query"], offset)
    key = _project(context, "key", 1, pairs.key, piece, weights["key"], offset)
    grad_logits = pair_values(context.grad_attention, pairs, *piece).to(query.dtype).unsqueeze(-1)
    if query.shape == key.shape:
        # The gradient of each role is the other role's rows times the logits' gradient, in place.
        grad_query, grad_key = key.mul_(grad_logits), query.mul_(grad_logits)
    else:
        grad_query, grad_key = key * grad_logits, query * grad_logits
    _input_backward(context, "query", 0, pairs.query, piece, grad_query, weights["query"], grads["query"], offset)
    _input_backward(context, "key", 1, pairs.key, piece, grad_key, weights["key"], grads["key"], offset)


def _input_backward(
    context: RelationContext,
    name: str,
    slot: int,
    block: TokenBlock,
    piece: tuple[slice, slice],
    grad_bxhd: Tensor,
    tile_kce: Tensor | None,
    grad_tile_kce: Tensor | None,
    offset: int,
) -> None:
    """Add to the gradients of a role's matrix and input, given the gradient of its projected rows."""
    grad_bxe = by_token(grad_bxhd.flatten(-2), block)
    if tile_kce is None:
        if name in context.wanted:
            _scatter_add(context, name, block, piece, grad_bxe)
        return
    view = token_rows(context.source[name], block, *piece)
    grad_rows = grad_bxe.reshape(-1, tile_kce.shape[2])
    if grad_tile_kce is not None:
        rows = context.workspace().copied_rows(slot, view)
        first = piece[0].start == piece[1].start == 0
        if grad_tile_kce.dtype != rows.dtype:
            product = torch.mm(rows.t(), grad_rows)
            grad_tile_kce[offset].copy_(product) if first else grad_tile_kce[offset].add_(product)
        elif first:
            torch.mm(rows.t(), grad_rows, out=grad_tile_kce[offset])
        else:
            grad_tile_kce[offset].addmm_(rows.t(), grad_rows)
    if name not in context.wanted:
        return
    matrix = _matrix(tile_kce, offset, grad_rows.dtype)
    grad_input = torch.mm(grad_rows, matrix.t(), out=context.workspace().matrix(slot, len(grad_rows)))
    _scatter_add(context, name, block, piece, grad_input.view(view.shape))


class SoftmaxFunction(Function):
    """Softmax of the logits, in place; backward turns the weights' gradient into the logits', in place."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, context: RelationContext, dtype: torch.dtype) -> Tensor:
        """Link (1,) → link (1,); the attention weights (b, h, n, n) have the given dtype."""
        logits = context.logits
        assert logits is not None
        ctx.context = context
        if context.adds_logits and not context.geometry.complete:
            logits.masked_fill_(missing_pairs(context.geometry, logits.device), -torch.inf)
        if context.key_padding is not None:
            logits.masked_fill_(context.key_padding[:, None, None, :], -torch.inf)
        logits.mul_(context.scale)
        # A query whose keys are all padding gets zero weights rather than NaN.
        limits = torch.finfo(logits.dtype)
        logits.sub_(logits.amax(-1, keepdim=True).clamp_(min=limits.min)).exp_()
        logits.div_(logits.sum(-1, keepdim=True).clamp_(min=limits.tiny))
        context.attention = logits.to(dtype)
        context.weights = context.apply_dropout(context.attention)
        context.logits = None
        return link.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_link: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of the logits, a·(g − Σ a·g)·scale with weights a and their gradient g."""
        context: RelationContext = ctx.context
        grad, attention = context.grad_attention, context.attention
        assert grad is not None and attention is not None
        if context.dropout:
            grad.mul_(context.noise(attention))
        context.weights = None
        grad.mul_(attention)
        total = grad.sum(-1, keepdim=True)
        grad.sub_(attention * total) if attention.dtype != grad.dtype else grad.addcmul_(attention, total, value=-1)
        grad.mul_(context.scale)
        return grad_link, None, None


class ValueTileFunction(Function):
    """Output of the relations of one tile, from its value matrices."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, context: RelationContext, first: int, value_kce: Tensor) -> Tensor:
        """Link (1,) → link (1,); matrices (k, c, e) of relations ``first`` to ``first + k − 1``."""
        ctx.context, ctx.first, ctx.value = context, first, value_kce
        source, weights = context.source["value"], context.weights
        assert weights is not None
        if context.out is None:
            shape = (*source.shape[:2], value_kce.shape[2])
            context.out = source.new_zeros(shape, dtype=accumulation_dtype(source.dtype))
        rest: Iterable[int] = range(first, first + len(value_kce))
        if many := _many_relations(context, first, len(value_kce)):
            many.add_values(value_kce)
            rest = many.leftover
        for relation in rest:
            pairs, offset = context.geometry.pairs(relation), relation - first
            for piece in context.pieces(pairs, source.shape[0]):
                value = _project(context, "value", 0, pairs.key, piece, value_kce, offset)
                weight = pair_values(weights, pairs, *piece).unsqueeze(-1)
                value = value.mul_(weight) if pairs.key.size == pairs.count else value * weight
                rows = by_token(value.flatten(-2), pairs.query)
                token_rows(context.out, pairs.query, *piece).add_(rows)
        return link.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_link: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of the matrices; add to those of weights and values in the context."""
        context: RelationContext = ctx.context
        tile: Tensor = ctx.value
        grad_tile = torch.empty_like(tile, memory_format=torch.contiguous_format) if ctx.needs_input_grad[3] else None
        assert context.grad_out is not None and context.weights is not None and context.grad_attention is not None
        rest: Iterable[int] = range(ctx.first, ctx.first + len(tile))
        if many := _many_relations(context, ctx.first, len(tile)):
            many.values_backward(tile, grad_tile)
            rest = many.leftover
        for relation in rest:
            pairs, offset = context.geometry.pairs(relation), relation - ctx.first
            for piece in context.pieces(pairs, len(context.grad_out)):
                value = _project(context, "value", 0, pairs.key, piece, tile, offset)
                grad_out = token_rows(context.grad_out, pairs.query, *piece)
                grad_out = grad_out.view(*grad_out.shape[:-1], context.heads, -1)
                in_place = pairs.key.size == pairs.count
                product = value.mul_(grad_out) if in_place else value * grad_out
                pair_values(context.grad_attention, pairs, *piece).add_(product.sum(-1))
                weight = pair_values(context.weights, pairs, *piece).unsqueeze(-1)
                grad_value = torch.mul(grad_out, weight, out=value) if in_place else grad_out * weight
                _input_backward(context, "value", 0, pairs.key, piece, grad_value, tile, grad_tile, offset)
        return grad_link, None, None, grad_tile


class CloseFunction(Function):
    """End of the chain: returns the outputs and saves the tensors of backward, once."""

    @staticmethod
    def forward(
        ctx: Any, link: Tensor, context: RelationContext, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """Link (1,) → outputs of the relative values and of the plain values, (b, n, width) each, or None."""
        attention, weights = context.attention, context.weights
        assert attention is not None and weights is not None
        relative = None if context.out is None else context.out.to(dtype)
        plain = None
        if "plain_value" in context.source:
            values = _split_heads(context.source["plain_value"], context.heads)
            plain = torch.matmul(weights, values).transpose(1, 2).flatten(2)
        ctx.context, ctx.names, ctx.has_relative = context, tuple(context.source), relative is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(attention, *context.source.values())
        context.release()
        return relative, plain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_relative: Tensor | None, grad_plain: Tensor | None) -> tuple[Tensor | None, ...]:
        """Unpack the saved tensors and start the gradient of the attention weights."""
        context: RelationContext = ctx.context
        attention, *sources = ctx.saved_tensors
        context.attention = attention
        context.weights = context.apply_dropout(attention)
        context.source = dict(zip(ctx.names, sources, strict=True))
        context.allocate_workspace()
        dtype = accumulation_dtype(attention.dtype)
        if grad_plain is not None:
            values = _split_heads(context.source["plain_value"], context.heads)
            grad = _split_heads(grad_plain.contiguous(), context.heads)
            context.grad_attention = torch.matmul(grad, values.transpose(2, 3)).to(dtype)
            if "plain_value" in context.wanted:
                weights = context.weights.transpose(2, 3)
                context.grads["plain_value"] = torch.matmul(weights, grad).transpose(1, 2).flatten(2)
        else:
            context.grad_attention = torch.zeros_like(attention, dtype=dtype)
        if ctx.has_relative:
            shape = (*sources[0].shape[:2], context.widths[1])
            context.grad_out = attention.new_zeros(shape) if grad_relative is None else grad_relative.contiguous()
        return attention.new_zeros(1), None, None
