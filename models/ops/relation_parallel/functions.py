"""Relation parallelism as autograd functions: the chain of grouped.py with exchanges between its parts.

Every rank has b samples. It owns some relations, and computes their pairs for the g·b samples of all ranks:

    forward     GatherFunction      rows of the relative roles: all-gather, (b, n, c) → (g·b, n, c)
                tiles of logits     this rank's pairs of all samples
                ExchangeFunction    logits to the samples' ranks, softmax there, weights to the owners of the pairs
                tiles of values     this rank's pairs of all samples
                SumFunction         parts of the output to the samples' ranks, (g·b, n, e) → (b, n, e), summed there
    backward    the same in reverse; gradients of tables are complete on their owner

Each call has two contexts: the local one, with all pairs of this rank's samples, and the owned one, with this rank's
pairs of all samples. Saved for backward: the local inputs and attention weights, as in one process, and the attention
weights of this rank's pairs, which are as many on average. Gathered rows are gathered again.

Every rank must make the same calls, with as many samples, and differentiate the same of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .. import grouped
from ..context import RelationContext, accumulation_dtype
from .group import RelationGroup

MOVING = ("query", "key", "value")
"""Sources whose rows travel to the owners of the relations."""


@dataclass(eq=False)
class RelationCall:
    """State of one call."""

    group: RelationGroup
    local: RelationContext
    """All pairs of this rank's samples."""
    owned: RelationContext
    """This rank's pairs of all samples."""
    shared: tuple[tuple[str, ...], ...]
    """Names of the sources that travel; those that are the same tensor stand together and travel once."""
    weights: Tensor | None = None
    """Attention weights of this rank's pairs, (g·b, h, q)."""

    @property
    def has_logits(self) -> bool:
        """True if queries or keys are relative."""
        return any("query" in names for names in self.shared)

    @property
    def has_values(self) -> bool:
        """True if values are relative."""
        return any("value" in names for names in self.shared)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows, in which everything travels."""
        return next(iter(self.local.source.values())).dtype

    def gather_sources(self) -> None:
        """Collect the rows of the relative roles from all ranks."""
        for names in self.shared:
            rows = self.group.gather_rows(self.local.source[names[0]])
            self.owned.source |= dict.fromkeys(names, rows)

    def new_pairs(self, dtype: torch.dtype) -> Tensor:
        """Return matrices of all samples without values, (g·b, h, n, n)."""
        rows = next(iter(self.owned.source.values()))
        tokens = self.owned.geometry.tokens
        return rows.new_empty(len(rows), self.owned.heads, tokens, tokens, dtype=dtype)

    def put_own(self, target_bhnn: Tensor, values_bhq: Tensor) -> Tensor:
        """Write the values of this rank's pairs, (g·b, h, q), into matrices (g·b, h, n, n)."""
        positions = self.group.own_positions(target_bhnn.device)
        target_bhnn.flatten(2).index_copy_(2, positions, values_bhq.to(target_bhnn.dtype))
        return target_bhnn


class GatherFunction(Function):
    """Start of the chain: gathers the rows; backward sends their gradients back and returns those of all inputs."""

    @staticmethod
    def forward(ctx: Any, call: RelationCall, anchor: Tensor, *sources: Tensor | None) -> Tensor:
        """Anchor (1,) → link (1,); sources in the order of SOURCES, (b, n, width) each, of this rank's samples."""
        ctx.call = call
        link = grouped.OpenFunction.forward(SimpleNamespace(), call.local, anchor, *sources)
        call.owned.wanted = call.local.wanted & set(MOVING)
        call.gather_sources()
        call.owned.allocate_workspace()
        if call.has_logits:
            call.owned.logits = call.new_pairs(accumulation_dtype(call.dtype))
        return link

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_link: Tensor) -> tuple[Tensor | None, ...]:
        """Add up the gradients of the rows from all owners, in the order of the ranks."""
        call: RelationCall = ctx.call
        owned, local = call.owned, call.local
        for names in call.shared:
            if names[0] not in owned.wanted:
                continue
            parts = [owned.grads[name] for name in names if name in owned.grads]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            # The first name stands for the tensor that they share; the others have no gradient.
            local.grads[names[0]] = call.group.sum_rows(total.to(call.dtype))
        owned.release()
        return grouped.OpenFunction.backward(SimpleNamespace(context=local), grad_link)


class ExchangeFunction(Function):
    """Middle of the chain: logits go to the ranks of the samples, attention weights to the owners of the pairs."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, call: RelationCall, dtype: torch.dtype) -> Tensor:
        """Link (1,) → link (1,)."""
        ctx.call = call
        owned, local, group = call.owned, call.local, call.group
        if call.has_logits:
            assert owned.logits is not None and local.logits is not None
            values = group.collect_pairs(owned.logits, dtype)
            owned.logits = None
            target, positions = local.logits.flatten(2), group.positions(values.device)
            values = values.to(target.dtype)
            if local.adds_logits:
                target.index_add_(2, positions, values)
            else:
                target.index_copy_(2, positions, values)
        link = grouped.SoftmaxFunction.forward(SimpleNamespace(), link, local, dtype)
        if call.has_values:
            assert local.weights is not None
            call.weights = group.spread_pairs(local.weights, dtype)
            owned.weights = call.put_own(call.new_pairs(dtype), call.weights)
        return link

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_link: Tensor) -> tuple[Tensor | None, ...]:
        """Send the weights' gradients to the ranks of the samples, and those of the logits to the owners."""
        call: RelationCall = ctx.call
        owned, local, group = call.owned, call.local, call.group
        assert local.grad_attention is not None
        if call.has_values:
            assert owned.grad_attention is not None
            values = group.collect_pairs(owned.grad_attention, call.dtype)
            target = local.grad_attention.flatten(2)
            target.index_add_(2, group.positions(values.device), values.to(target.dtype))
            owned.weights = owned.grad_out = None
        grouped.SoftmaxFunction.backward(SimpleNamespace(context=local), grad_link)
        if call.has_logits:
            values = group.spread_pairs(local.grad_attention, call.dtype)
            if owned.grad_attention is None:
                owned.grad_attention = call.new_pairs(local.grad_attention.dtype)
            call.put_own(owned.grad_attention, values)
        return grad_link, None, None


class SumFunction(Function):
    """End of the chain: adds up the owners' parts of the output, and saves the tensors of backward, once."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, call: RelationCall, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Link (1,) → outputs of the relative values and of the plain values, (b, n, width) each, or None."""
        if call.has_values:
            assert call.owned.out is not None
            call.local.out = call.group.sum_rows(call.owned.out.to(dtype))
        saved: list[Tensor] = []
        own = SimpleNamespace(
            set_materialize_grads=ctx.set_materialize_grads, save_for_backward=lambda *x: saved.extend(x)
        )
        outputs = grouped.CloseFunction.forward(own, link, call.local, dtype)
        ctx.call, ctx.names, ctx.has_relative = call, own.names, own.has_relative
        ctx.save_for_backward(*saved, call.weights)
        call.weights = None
        call.owned.release()
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_relative: Tensor | None, grad_plain: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gather the gradient of the output and the rows, and start the gradients of the attention weights."""
        call: RelationCall = ctx.call
        owned, local = call.owned, call.local
        *saved, weights = ctx.saved_tensors
        own = SimpleNamespace(context=local, names=ctx.names, has_relative=ctx.has_relative, saved_tensors=saved)
        result = grouped.CloseFunction.backward(own, grad_relative, grad_plain)
        call.gather_sources()
        owned.allocate_workspace()
        if call.has_values:
            assert local.grad_out is not None
            owned.grad_out = call.group.gather_rows(local.grad_out)
            local.grad_out = None
            owned.weights = call.put_own(call.new_pairs(call.dtype), weights)
            owned.grad_attention = call.new_pairs(accumulation_dtype(call.dtype)).zero_()
        return result


def attend_in_group(
    call: RelationCall,
    anchor: Tensor,
    sources: Iterable[Tensor | None],
    logit_tiles: Iterable[nn.Module],
    value_tiles: Iterable[nn.Module],
) -> tuple[Tensor | None, Tensor | None]:
    """Attention of this rank's samples, with the tables of all ranks.

    Args:
        call: state of the call.
        anchor: (1,); requires a gradient if anything does.
        sources: inputs in the order of `SOURCES`, (b, n, width) each, of this rank's samples.
        logit_tiles: tiles of this rank's relations, which add to the logits.
        value_tiles: tiles of this rank's relations, which add to the output.

    Returns:
        Outputs of the relative values and of the plain values, (b, n, width) each, or None.
    """
    given = list(sources)
    dtype = next(x.dtype for x in given if x is not None)
    link = GatherFunction.apply(call, anchor, *given)
    for tile in logit_tiles:
        link = tile(link, call.owned)
    link = ExchangeFunction.apply(link, call, dtype)
    for tile in value_tiles:
        link = tile(link, call.owned)
    relative, plain = SumFunction.apply(link, call, dtype)
    return relative, plain
