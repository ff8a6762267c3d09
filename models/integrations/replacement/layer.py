"""Translution with the terms of the attention that it starts from.

The logits of an attention with biases are (q_i + b_q)·(k_j + b_k). The terms q_i·b_k and b_q·b_k are the same for all
keys j, so the softmax does not see them. What remains is b_q·k_j = x_j·u with one vector u per head, a *key term*.
The attention weights of a query sum to one, so the bias of the values passes through to the output projection, whose
own bias takes it up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from translution.planner.common import InputError

from ...layers.tables import ROLE_NAMES
from ...layers.translution import Translution
from ...ops import RelationBias


class AdaptedTranslution(Translution):
    """Full Translution with a key term, a scalar per relation, and masks; its output projection always exists.

    Args:
        dim, heads, options: as in `Translution`.
        key_term: add x_j·u to the logits of key j, with a learned vector u for each head.
        relation_bias: add a learned scalar for each relation and head to the logits.

    Raises:
        InputError: naming the argument and the allowed values.
    """

    def __init__(
        self, dim: int, heads: int, *, key_term: bool = False, relation_bias: bool = False, **options: Any
    ) -> None:
        super().__init__(dim, heads, **options)
        if relation_bias and self.tables.implementation == "gather":
            raise InputError("implementation: 'gather' is not allowed: must be grouped or batched with a relation bias")
        self.output = nn.Linear(self.inner_dim, dim)
        self.key_term = nn.Linear(dim, heads, bias=False) if key_term else None
        if relation_bias:
            # A logit tile, so that the operator calls it in turn.
            self.tables.logit_tiles.append(RelationBias(self.geometry.relations, heads))
        self._mask: Tensor | None = None

    def attend(self, x_bnc: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
        """(B, N, C) → (B, N, C), with a mask.

        Args:
            x_bnc: the tokens.
            mask: added to the logits: (B, 1, N, N) or (B, h, N, N), or with B = 1 for all samples; or None.
            key_padding_mask: (B, N), true where a token is padding.
        """
        self._mask = mask
        try:
            result: Tensor = self(x_bnc, key_padding_mask)
        finally:
            self._mask = None
        return result

    def _sources(self, x_bnc: Tensor) -> dict[str, Tensor]:
        sources = super()._sources(x_bnc)
        batch, tokens, _ = x_bnc.shape
        queries, keys = [], []
        if "plain_query" in sources:
            queries.append(sources["plain_query"].unflatten(2, (self.heads, -1)))
            keys.append(sources["plain_key"].unflatten(2, (self.heads, -1)))
        if self.key_term is not None:
            keys.append(self.key_term(x_bnc).unsqueeze(-1))
            queries.append(torch.ones_like(keys[-1]))
        if self._mask is not None:
            # The product of the unit matrix with a matrix is that matrix.
            unit = torch.eye(tokens, dtype=x_bnc.dtype, device=x_bnc.device)
            queries.append(unit[None, :, None].expand(batch, -1, self.heads, -1))
            added = (self._mask / self.tables.scale).clamp(min=torch.finfo(x_bnc.dtype).min / 2)
            keys.append(added.to(x_bnc.dtype).permute(0, 3, 1, 2).expand(batch, -1, self.heads, -1))
        if queries:
            sources["plain_query"] = torch.cat(queries, dim=-1).flatten(2)
            sources["plain_key"] = torch.cat(keys, dim=-1).flatten(2)
        return sources

    @torch.no_grad()
    def start_from(
        self,
        weights: Mapping[str, tuple[Tensor, Tensor | None]],
        relation_bias: Tensor | None,
    ) -> None:
        """Let the layer compute what an attention does; its output projection must be the attention's already.

        Args:
            weights: role ("q", "k", "v") → the attention's projection (E, C) and its bias (E,) or None, E = h·D.
            relation_bias: (R, h), the attention's scalars by relation, or None.
        """
        for role, (weight, _) in weights.items():
            if role in self.roles:
                shape = (self.geometry.relations, self.dim, self.inner_dim)
                self.tables.load_table(ROLE_NAMES[role], weight.t().expand(shape))
            else:
                self.plain[role].get_parameter("weight").copy_(weight)
        query_bias, value_bias = weights["q"][1], weights["v"][1]
        if self.key_term is not None and query_bias is not None:
            by_head = weights["k"][0].unflatten(0, (self.heads, -1))
            self.key_term.weight.copy_(torch.einsum("hdc,hd->hc", by_head, query_bias.unflatten(0, (self.heads, -1))))
        if value_bias is not None:
            assert isinstance(self.output, nn.Linear)
            self.output.bias.add_(self.output.weight @ value_bias)
        if relation_bias is not None:
            self.tables.logit_tiles[-1].get_parameter("table").copy_(relation_bias)
