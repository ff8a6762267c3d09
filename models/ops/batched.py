"""Many relations at a time, for a GPU: a few large kernels instead of several small ones per relation.

The rows of a chunk of relations are copied into one matrix (pair by pair, sample by sample), multiplied
by all their matrices in one grouped product, and summed by token through index lists. A call saves the
same tensors for backward as grouped.py, and ``workspace_bytes`` bounds its scratch memory too. Relations
with the class token, and those too large for the limit, are left to grouped.py.

Legend of shape suffixes: b batch, n tokens, p pairs of a chunk and a row of zeros, m = p·b rows,
c input width, e inner width, h heads, d width per head, k relations of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .context import RelationContext, accumulation_dtype
from .grouped_mm import Products, choose_products
from .pair_index import PairChunk, Slots, cut_tile


class BatchedTile:
    """The products of one tile in one call, chunk by chunk.

    Args:
        context: state of the call.
        first: first relation of the tile.
        count: number of relations in the tile.
    """

    def __init__(self, context: RelationContext, first: int, count: int) -> None:
        self.context, self.first = context, first
        like = next(iter(context.source.values()))
        self.batch, self.dtype = len(like), like.dtype
        d_in, d_out = context.widths
        # Rows and products of two roles, one gradient, and up to two slots per pair.
        row_bytes = (3 * d_in + 2 * d_out + 2 * max(d_in, d_out)) * like.element_size()
        max_pairs = context.workspace_bytes * 3 // 4 // (row_bytes * self.batch)
        self.chunks, self.leftover = cut_tile(context.geometry, first, count, max_pairs, like.device)
        chosen = context.products or choose_products(like.device, like.dtype, d_in, d_out)
        self.products: Products = chosen

    def add_logits(self, query_kce: Tensor | None, key_kce: Tensor | None) -> None:
        """Write the logits of the chunks' pairs into the context, or add them.

        Args:
            query_kce: query matrices of the tile; None for a plain role.
            key_kce: key matrices of the tile; None for a plain role.
        """
        logits = self.context.logits
        assert logits is not None
        for chunk in self.chunks:
            query = self._project(chunk, self._select("query", chunk.query), query_kce)
            key = self._project(chunk, self._select("key", chunk.key), key_kce)
            values = self._by_heads(query.mul_(key))[: chunk.pairs].sum(-1, dtype=logits.dtype)
            self._put(logits, chunk, values, adds=self.context.adds_logits)

    def logits_backward(self, tiles: dict[str, Tensor | None], grads: dict[str, Tensor | None]) -> None:
        """Compute the gradients of the chunks' matrices and add to those of the queries and keys.

        Args:
            tiles: matrices (k, c, e) of "query" and "key"; None for a plain role.
            grads: gradients of the matrices, written in place; None where not required.
        """
        for chunk in self.chunks:
            rows = {"query": self._select("query", chunk.query), "key": self._select("key", chunk.key)}
            query, key = (self._project(chunk, rows[name], tiles[name]) for name in ("query", "key"))
            grad_pbh = self._weights(self.context.grad_attention, chunk)
            # The gradient of each role is the other role's rows times the logits' gradient, in place.
            self._by_heads(key).mul_(grad_pbh)
            self._by_heads(query).mul_(grad_pbh)
            for name, grad, slots in (("query", key, chunk.query_slots), ("key", query, chunk.key_slots)):
                self._input_backward(chunk, name, rows.pop(name), grad, tiles[name], grads[name], slots)

    def add_values(self, value_kce: Tensor) -> None:
        """Add the output of the chunks' pairs to the context, from value matrices (k, c, e)."""
        out = self.context.out
        assert out is not None
        for chunk in self.chunks:
            value = self._project(chunk, self._select("value", chunk.key), value_kce)
            self._by_heads(value).mul_(self._weights(self.context.weights, chunk))
            self._add_by_token(out, chunk.query_slots, value)

    def values_backward(self, value_kce: Tensor, grad_kce: Tensor | None) -> None:
        """Add to the gradients of the attention weights and values; compute those of the matrices.

        Args:
            value_kce: value matrices of the tile.
            grad_kce: gradients of the matrices, written in place; None where not required.
        """
        context = self.context
        assert context.grad_attention is not None and context.grad_out is not None
        for chunk in self.chunks:
            rows = self._select("value", chunk.key)
            value = self._project(chunk, rows, value_kce)
            grad = context.grad_out.transpose(0, 1).index_select(0, chunk.query).flatten(0, 1)
            products = self._by_heads(value.mul_(grad))[: chunk.pairs].sum(-1, dtype=context.grad_attention.dtype)
            del value
            self._put(context.grad_attention, chunk, products, adds=True)
            self._by_heads(grad).mul_(self._weights(context.weights, chunk))
            grad[-self.batch :] = 0
            self._input_backward(chunk, "value", rows, grad, value_kce, grad_kce, chunk.key_slots)

    def _select(self, name: str, tokens_p: Tensor) -> Tensor:
        """Copy the tokens' rows of a source (b, n, c) into a matrix (m, c)."""
        return self.context.source[name].transpose(0, 1).index_select(0, tokens_p).flatten(0, 1)

    def _project(self, chunk: PairChunk, rows_mc: Tensor, tile_kce: Tensor | None) -> Tensor:
        """Multiply rows by their relations' matrices; copy those of a plain role, already projected."""
        if tile_kce is None:
            rows_mc = rows_mc.clone()
            rows_mc[-self.batch :] = 0
            return rows_mc
        matrices = tile_kce[chunk.relations(self.first)].to(self.dtype)
        return self.products.multiply(rows_mc, matrices, self._counts(chunk), self._ends(chunk))

    def _counts(self, chunk: PairChunk) -> tuple[int, ...]:
        return tuple(count * self.batch for count in chunk.counts)

    def _ends(self, chunk: PairChunk) -> Tensor:
        return chunk.ends * self.batch

    def _by_heads(self, rows_me: Tensor) -> Tensor:
        """Return (m, e) as a (p, b, h, d) view."""
        return rows_me.view(-1, self.batch, self.context.heads, rows_me.shape[1] // self.context.heads)

    def _weights(self, source_bhnn: Tensor | None, chunk: PairChunk) -> Tensor:
        """Copy the pairs' values of (b, h, n, n) to (p, b, h, 1) in the rows' dtype; the last pair's are zero."""
        assert source_bhnn is not None
        values = source_bhnn.flatten(2).index_select(2, chunk.positions).to(self.dtype)
        return torch.nn.functional.pad(values, (0, 1)).permute(2, 0, 1).unsqueeze(-1)

    def _put(self, target_bhnn: Tensor, chunk: PairChunk, values_pbh: Tensor, *, adds: bool) -> None:
        """Write values to the pairs' positions in (b, h, n, n), or add them."""
        target = target_bhnn.view(*target_bhnn.shape[:2], -1)
        values = values_pbh.permute(1, 2, 0)
        if adds:
            values = values + target.index_select(2, chunk.positions)
        target.index_copy_(2, chunk.positions, values)

    def _add_by_token(self, target_bnc: Tensor, slots: Slots, rows_mc: Tensor) -> None:
        """Sum rows by token in the target's dtype, and add the sums to the tokens of (b, n, c)."""
        width = rows_mc.shape[1]
        by_slot = rows_mc.view(-1, self.batch * width).index_select(0, slots.pairs)
        sums = by_slot.view(len(slots.tokens), -1, self.batch * width).sum(1, dtype=target_bnc.dtype)
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
        """Compute the gradients of a role's matrices and add to that of its input.

        Args:
            chunk: chunk of relations.
            name: the role's input.
            rows_mc: rows of the input.
            grad_me: gradient of the projected rows.
            tile_kce: matrices of the role; None for a plain role.
            grad_kce: gradient of the matrices, written in place; None where not required.
            slots: pairs of each token of the role.
        """
        relations = chunk.relations(self.first)
        if tile_kce is not None and grad_kce is not None:
            self.products.matrix_gradients(
                rows_mc, grad_me, self._counts(chunk), self._ends(chunk), grad_kce[relations]
            )
        del rows_mc
        if name not in self.context.wanted:
            return
        if tile_kce is not None:
            matrices = tile_kce[relations].to(self.dtype).transpose(1, 2)
            grad_me = self.products.multiply(grad_me, matrices, self._counts(chunk), self._ends(chunk))
        source = self.context.source[name]
        if name not in self.context.grads:
            self.context.grads[name] = torch.zeros_like(source, dtype=accumulation_dtype(source.dtype))
        self._add_by_token(self.context.grads[name], slots, grad_me)
