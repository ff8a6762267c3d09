"""Many relations at a time, for a GPU: a few large kernels instead of several small ones per relation.

The rows of a chunk of relations are gathered as one matrix (pair by pair, sample by sample), multiplied
with all their matrices in one grouped product, and summed by token through index lists. What a call
keeps is what the way of grouped.py keeps; the scratch memory is bounded by the same knob. Relations
with a class token, and any too large for the knob, are left to grouped.py.

Legend of shape suffixes: b batch, n tokens, p pairs of a chunk and a row of zeros, m = p·b rows,
c input width, e inner width, h heads, d width per head, k relations of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .context import RelationContext, accumulation_dtype
from .grouped_mm import Products, choose_products
from .pair_index import PairChunk, Slots, cut_tile


class Batch:
    """One tile's work on one call.

    Args:
        context: the call.
        first: first relation of the tile.
        count: relations in it.
    """

    def __init__(self, context: RelationContext, first: int, count: int) -> None:
        self.context, self.first = context, first
        like = next(iter(context.source.values()))
        self.batch, self.dtype = len(like), like.dtype
        d_in, d_out = context.widths
        # Gathered rows and products of two roles, a gradient, and slots up to twice as many as pairs.
        row_bytes = (3 * d_in + 2 * d_out + 2 * max(d_in, d_out)) * like.element_size()
        most_pairs = context.workspace_bytes * 3 // 4 // (row_bytes * self.batch)
        self.chunks, self.others = cut_tile(context.geometry, first, count, most_pairs, like.device)
        self.products: Products = choose_products(like.device, like.dtype, d_in, d_out)

    def add_logits(self, query_kce: Tensor | None, key_kce: Tensor | None) -> None:
        """Put the logits of the chunks' pairs where they belong."""
        logits = self.context.logits
        assert logits is not None
        for chunk in self.chunks:
            query = self._project(chunk, self._select("query", chunk.query), query_kce)
            key = self._project(chunk, self._select("key", chunk.key), key_kce)
            values = self._by_heads(query.mul_(key))[: chunk.pairs].sum(-1, dtype=logits.dtype)
            self._put(logits, chunk, values, adds=self.context.adds_logits)

    def logits_backward(self, tiles: dict[str, Tensor | None], grads: dict[str, Tensor | None]) -> None:
        """Gradients of the chunks' matrices and their part of the inputs'."""
        for chunk in self.chunks:
            rows = {"query": self._select("query", chunk.query), "key": self._select("key", chunk.key)}
            query, key = (self._project(chunk, rows[name], tiles[name]) for name in ("query", "key"))
            grad_pbh = self._weights(self.context.grad_attention, chunk)
            # Each role's gradient is the other's rows times the logits' gradient: done in their place.
            self._by_heads(key).mul_(grad_pbh)
            self._by_heads(query).mul_(grad_pbh)
            for name, grad, slots in (("query", key, chunk.query_slots), ("key", query, chunk.key_slots)):
                self._input_backward(chunk, name, rows.pop(name), grad, tiles[name], grads[name], slots)

    def add_values(self, value_kce: Tensor) -> None:
        """Add the chunks' share of the output."""
        out = self.context.out
        assert out is not None
        for chunk in self.chunks:
            value = self._project(chunk, self._select("value", chunk.key), value_kce)
            self._by_heads(value).mul_(self._weights(self.context.weights, chunk))
            self._add_by_token(out, chunk.query_slots, value)

    def values_backward(self, value_kce: Tensor, grad_kce: Tensor | None) -> None:
        """Gradients of the attention weights, of the chunks' matrices, and their part of the input's."""
        context = self.context
        assert context.grad_attention is not None and context.grad_out is not None
        for chunk in self.chunks:
            rows = self._select("value", chunk.key)
            value = self._project(chunk, rows, value_kce)
            grad = context.grad_out.transpose(0, 1).index_select(0, chunk.query).flatten(0, 1)
            shares = self._by_heads(value.mul_(grad))[: chunk.pairs].sum(-1, dtype=context.grad_attention.dtype)
            del value
            self._put(context.grad_attention, chunk, shares, adds=True)
            self._by_heads(grad).mul_(self._weights(context.weights, chunk))
            grad[-self.batch :] = 0
            self._input_backward(chunk, "value", rows, grad, value_kce, grad_kce, chunk.key_slots)

    def _select(self, name: str, tokens_p: Tensor) -> Tensor:
        """The tokens' rows of a source (b, n, c), as (m, c)."""
        return self.context.source[name].transpose(0, 1).index_select(0, tokens_p).flatten(0, 1)

    def _project(self, chunk: PairChunk, rows_mc: Tensor, tile_kce: Tensor | None) -> Tensor:
        """Rows times their relations' matrices; a copy of a plain role's, which are projected already."""
        if tile_kce is None:
            rows_mc = rows_mc.clone()
            rows_mc[-self.batch :] = 0
            return rows_mc
        matrices = tile_kce[chunk.relations(self.first)].to(self.dtype)
        return self.products.rows(rows_mc, matrices, self._counts(chunk), self._ends(chunk))

    def _counts(self, chunk: PairChunk) -> tuple[int, ...]:
        return tuple(count * self.batch for count in chunk.counts)

    def _ends(self, chunk: PairChunk) -> Tensor:
        return chunk.ends * self.batch

    def _by_heads(self, rows_me: Tensor) -> Tensor:
        """(m, e) as a (p, b, h, d) view."""
        return rows_me.view(-1, self.batch, self.context.heads, rows_me.shape[1] // self.context.heads)

    def _weights(self, source_bhnn: Tensor | None, chunk: PairChunk) -> Tensor:
        """What an (b, h, n, n) tensor holds for the pairs, as (p, b, h, 1) in the rows' dtype, zero in the last."""
        assert source_bhnn is not None
        found = source_bhnn.flatten(2).index_select(2, chunk.places).to(self.dtype)
        return torch.nn.functional.pad(found, (0, 1)).permute(2, 0, 1).unsqueeze(-1)

    def _put(self, target_bhnn: Tensor, chunk: PairChunk, values_pbh: Tensor, *, adds: bool) -> None:
        target = target_bhnn.view(*target_bhnn.shape[:2], -1)
        values = values_pbh.permute(1, 2, 0)
        if adds:
            values = values + target.index_select(2, chunk.places)
        target.index_copy_(2, chunk.places, values)

    def _add_by_token(self, target_bnc: Tensor, slots: Slots, rows_mc: Tensor) -> None:
        """Sum rows by token, in the accumulator's width, and add the sums to the tokens of (b, n, c)."""
        width = rows_mc.shape[1]
        gathered = rows_mc.view(-1, self.batch * width).index_select(0, slots.pairs)
        sums = gathered.view(len(slots.tokens), -1, self.batch * width).sum(1, dtype=target_bnc.dtype)
        target_bnc.index_add_(1, slots.tokens, sums.view(-1, self.batch, width).transpose(0, 1))

    def _input_backward(
        self,
        chunk: PairChunk,
        name: str,
        rows_mc: Tensor,
        grad_me: Tensor,
        tile_kce: Tensor | None,
        grad_kce: Tensor | None,
        slots: Slots,
    ) -> None:
        """From the gradient of a role's rows to that of its matrices and of its input."""
        relations = chunk.relations(self.first)
        if tile_kce is not None and grad_kce is not None:
            self.products.matrices(rows_mc, grad_me, self._counts(chunk), self._ends(chunk), grad_kce[relations])
        del rows_mc
        if name not in self.context.wanted:
            return
        if tile_kce is not None:
            matrices = tile_kce[relations].to(self.dtype).transpose(1, 2)
            grad_me = self.products.rows(grad_me, matrices, self._counts(chunk), self._ends(chunk))
        source = self.context.source[name]
        if name not in self.context.grads:
            self.context.grads[name] = torch.zeros_like(source, dtype=accumulation_dtype(source.dtype))
        self._add_by_token(self.context.grads[name], slots, grad_me)
