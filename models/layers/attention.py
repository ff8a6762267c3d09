"""The baselines as layers: self-attention with each kind of position encoding, and absolute matrices.

SelfAttention         no position encoding, or rotary embedding
BiasAttention         a scalar per relation and head, added to the logits (Swin Transformer)
ShawAttention         a vector per relation, added to keys and values (Shaw et al.)
AbsoluteTranslution   a matrix per position instead of one per relation
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from translution.planner.common import InputError
from translution.planner.config import DEFAULT_WORKSPACE_BYTES, RelationGeometry
from translution.planner.costs import table_tiles

from ..ops.context import missing_pairs
from ..ops.relative_terms import RelationBias, RelationVectors
from ..ops.rotary import apply_rotary, rotary_angles
from .base import OperatorLayer, check_operator_options, check_roles
from .tables import OperatorChain


class RotaryEmbedding(nn.Module):
    """Rotates queries or keys by the rotary angles of their tokens.

    Args:
        geometry: arrangement of the tokens.
        head_dim: width per head, D.
        pairs: the coordinates that turn together: "neighbours" (2k and 2k + 1) or "halves" (k and k + D/2).

    Raises:
        InputError: if head_dim is not a multiple of 2, or of 4 on a grid of two axes, or too small for the axes.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, geometry: RelationGeometry, head_dim: int, pairs: str = "neighbours") -> None:
        super().__init__()
        if pairs not in ("neighbours", "halves"):
            raise InputError(f"rotary_pairs: {pairs!r} is not allowed: must be neighbours or halves")
        self.halves = pairs == "halves"
        if problem := geometry.rotary_problem(head_dim):
            raise InputError(f"head_dim: {head_dim} is not allowed: {problem} for rotary")
        self.geometry, self.head_dim = geometry, head_dim
        self.reset()

    def reset(self) -> None:
        """Compute the angles, also for a network that was built on the meta device, without values."""
        angles = rotary_angles(self.geometry, self.head_dim)
        dtype = torch.get_default_dtype()
        self.register_buffer("cosine", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sine", angles.sin().to(dtype), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert the buffers, as ``Module.double`` does, and compute them anew in float64."""
        super()._apply(fn, recurse)
        if self.cosine.dtype is torch.float64 and not self.cosine.is_meta:
            angles = rotary_angles(self.geometry, self.head_dim).to(self.cosine.device)
            self.cosine, self.sine = angles.cos(), angles.sin()
        return self

    def forward(self, x_bhnd: Tensor) -> Tensor:
        """(B, h, N, D) → (B, h, N, D)."""
        return apply_rotary(x_bhnd, self.cosine, self.sine, halves=self.halves)


class DenseAttention(OperatorLayer):
    """Base class of the baselines: attention of projected queries, keys and values.

    Args:
        dim, heads, options: as in `OperatorLayer`.
        workspace_bytes: limit of the scratch memory.
    """

    def __init__(self, dim: int, heads: int, *, workspace_bytes: int = DEFAULT_WORKSPACE_BYTES, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        check_operator_options(workspace_bytes, "grouped")
        self.chain = OperatorChain(
            self.geometry,
            self.heads,
            (0, self.inner_dim),
            scale=self.head_dim**-0.5,
            dropout=self.dropout,
            workspace_bytes=workspace_bytes,
        )
        self.output = self._make_output()

    def attend(self, rows_bne: Sequence[Tensor], key_padding: Tensor | None) -> Tensor:
        """Attend with the chain's terms, without saving a dropout mask for backward.

        Args:
            rows_bne: queries, keys and values, (B, N, h·D) each.
            key_padding: (B, N), true where a token is padding.

        Returns:
            (B, N, C).
        """
        sources = dict(zip(("plain_query", "plain_key", "plain_value"), rows_bne, strict=True))
        relative, plain = self.chain(sources, key_padding)
        result: Tensor = self.output(plain if relative is None else plain + relative)
        return result

    def attend_fused(self, rows_bhnd: Sequence[Tensor], key_padding: Tensor | None) -> Tensor:
        """Attend with torch's fused attention, without the chain.

        Args:
            rows_bhnd: queries, keys and values, (B, h, N, D) each; keys and values may have fewer heads.
            key_padding: (B, N), true where a token is padding.

        Returns:
            (B, N, C).
        """
        query, key, value = rows_bhnd
        seen = None if key_padding is None else ~key_padding[:, None, None, :]
        causal = self.geometry.causal
        # On a grid a token sees its whole frame, and a class token all: torch's kernels know only the triangle.
        if causal and (seen is not None or not self.geometry.triangular):
            exists, causal = ~missing_pairs(self.geometry, query.device), False
            seen = exists if seen is None else seen & exists
        grouped = key.shape[1] < query.shape[1]
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=causal, enable_gqa=grouped
        )
        result: Tensor = self.output(out.transpose(1, 2).flatten(2))
        return result

    @property
    def dropout_active(self) -> bool:
        """True if attention weights are dropped, which they are only in training."""
        return self.training and self.dropout > 0


class SelfAttention(DenseAttention):
    """Multi-head self-attention, the baseline.

    Args:
        dim, heads, head_dim, grid, class_token, length, causal, dropout, bias: as in `OperatorLayer`.
        rotary: apply rotary embedding to queries and keys, 1-D for a sequence, 2-D for a grid.
        rotary_pairs: as in `RotaryEmbedding`.
        kv_heads: heads of keys and values, each shared by heads / kv_heads heads of queries (arXiv 2305.13245);
            heads by default.
        workspace_bytes: limit of the scratch memory.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        rotary: bool = False,
        rotary_pairs: str = "neighbours",
        kv_heads: int | None = None,
        **options: Any,
    ) -> None:
        if options.get("window") is not None:
            raise InputError(f"window: {options['window']!r} is not allowed: must be None for self-attention")
        super().__init__(dim, heads, **options)
        if kv_heads is not None and (not isinstance(kv_heads, int) or kv_heads < 1 or heads % kv_heads):
            raise InputError(f"kv_heads: {kv_heads!r} is not allowed: must divide heads {heads}")
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.projections = nn.Linear(dim, self.inner_dim + 2 * self.kv_heads * self.head_dim, bias=False)
        self.rotary = RotaryEmbedding(self.geometry, self.head_dim, rotary_pairs) if rotary else None

    def forward(self, x_bnc: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) → (B, N, C); the mask (B, N) is true where a token is padding and must not be attended to."""
        self._check(x_bnc, key_padding_mask)
        query, key, value = self._project(x_bnc)
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        if not self.dropout_active:
            return self.attend_fused([query, key, value], key_padding_mask)
        if self.kv_heads < self.heads:
            key, value = (rows.repeat_interleave(self.heads // self.kv_heads, dim=1) for rows in (key, value))
        rows = [x_bhnd.transpose(1, 2).flatten(2) for x_bhnd in (query, key, value)]
        return self.attend(rows, key_padding_mask)

    def _project(self, x_bnc: Tensor) -> tuple[Tensor, ...]:
        """Project (B, N, C) to queries (B, h, N, D), and keys and values (B, kv_heads, N, D)."""
        joint = self.projections(x_bnc)
        if self.kv_heads == self.heads:
            return tuple(joint.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind())
        parts = joint.unflatten(2, (self.heads + 2 * self.kv_heads, -1)).transpose(1, 2)
        return tuple(parts.split([self.heads, self.kv_heads, self.kv_heads], dim=1))


class BiasAttention(DenseAttention):
    """Self-attention with a learned scalar for each relation and head, added to the scaled logits.

    Args:
        dim, heads, head_dim, grid, class_token, length, causal, window, dropout, bias: as in `OperatorLayer`.
        workspace_bytes: limit of the scratch memory.
    """

    def __init__(self, dim: int, heads: int, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        self.projections = nn.Linear(dim, 3 * self.inner_dim, bias=False)
        self.chain.logit_tiles.append(RelationBias(self.geometry.relations, heads))

    def forward(self, x_bnc: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) → (B, N, C); the mask (B, N) is true where a token is padding and must not be attended to."""
        self._check(x_bnc, key_padding_mask)
        return self.attend(self.projections(x_bnc).chunk(3, dim=-1), key_padding_mask)


class ShawAttention(DenseAttention):
    """Self-attention with a learned vector per relation added to the keys and another added to the values.

    The vectors, (R, D) each, are shared by all heads: logits q·(k + a[r]) / √D, output Σ w (v + b[r]).

    Args:
        dim, heads, head_dim, grid, class_token, length, causal, window, dropout, bias: as in `OperatorLayer`.
        workspace_bytes: limit of the scratch memory.
    """

    def __init__(self, dim: int, heads: int, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        self.projections = nn.Linear(dim, 3 * self.inner_dim, bias=False)
        relations = self.geometry.relations
        self.chain.logit_tiles.append(RelationVectors(relations, self.head_dim, "key"))
        self.chain.value_tiles.append(RelationVectors(relations, self.head_dim, "value"))

    def forward(self, x_bnc: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) → (B, N, C); the mask (B, N) is true where a token is padding and must not be attended to."""
        self._check(x_bnc, key_padding_mask)
        return self.attend(self.projections(x_bnc).chunk(3, dim=-1), key_padding_mask)


class PositionTile(nn.Module):
    """Matrices of consecutive positions for one role.

    Args:
        first: first position of the tile.
        count: number of positions in the tile.
        d_in: input width of a matrix.
        d_out: output width of a matrix.
    """

    def __init__(self, first: int, count: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.positions, self.sizes = slice(first, first + count), (d_in, d_out)
        self.weight = nn.Parameter(torch.empty(count, d_in, d_out))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def extra_repr(self) -> str:
        """Say how many matrices the tile holds, and their sizes."""
        return f"{self.positions.stop - self.positions.start} positions, {self.sizes[0]} x {self.sizes[1]}"

    def forward(self, x_bnc: Tensor) -> Tensor:
        """Multiply the tile's tokens of (B, N, C) by their own matrices; returns a (B, count, C') view."""
        return torch.bmm(x_bnc[:, self.positions].transpose(0, 1), self.weight).transpose(0, 1)


class AbsoluteTranslution(DenseAttention):
    """The absolute-matrix ablation: every position has its own matrices, independent of relative offsets.

    q_i = x_i·Wq[i], k_j = x_j·Wk[j], v_j = x_j·Wv[j], then self-attention (arXiv 2510.10060, ablations).

    Args:
        dim, heads, head_dim, grid, class_token, length, causal, dropout, bias: as in `OperatorLayer`.
        roles: roles with a matrix per position, a subset of "qkv"; the others are plain projections.
        tile_relations: number of positions per tile of a table; None stores each table as one Parameter.
        workspace_bytes: limit of the scratch memory.
    """

    def __init__(
        self, dim: int, heads: int, *, roles: str = "qkv", tile_relations: int | None = None, **options: Any
    ) -> None:
        if options.get("window") is not None:
            raise InputError(f"window: {options['window']!r} is not allowed: must be None for absolute matrices")
        super().__init__(dim, heads, **options)
        self.roles = check_roles(roles)
        self.plain = nn.ModuleDict(
            {role: nn.Linear(dim, self.inner_dim, bias=False) for role in "qkv" if role not in self.roles}
        )
        tokens = self.geometry.tokens
        self.tables = nn.ModuleDict()
        for role in self.roles:
            sizes = [size for size, copies in table_tiles(tokens, tile_relations) for _ in range(copies)]
            firsts = [sum(sizes[:n]) for n in range(len(sizes))]
            self.tables[role] = nn.ModuleList(
                PositionTile(first, size, dim, self.inner_dim) for first, size in zip(firsts, sizes, strict=True)
            )

    def _project(self, role: str, x_bnc: Tensor) -> Tensor:
        """Project (B, N, C) to the rows of a role, (B, N, h·D)."""
        if role not in self.roles:
            plain: Tensor = self.plain[role](x_bnc)
            return plain
        tiles = self.tables[role]
        assert isinstance(tiles, nn.ModuleList)
        return torch.cat([tile(x_bnc) for tile in tiles], dim=1).contiguous()

    def forward(self, x_bnc: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) → (B, N, C); the mask (B, N) is true where a token is padding and must not be attended to."""
        self._check(x_bnc, key_padding_mask)
        rows = [self._project(role, x_bnc) for role in "qkv"]
        if self.dropout_active:
            return self.attend(rows, key_padding_mask)
        heads = [x_bne.unflatten(2, (self.heads, -1)).transpose(1, 2) for x_bne in rows]
        return self.attend_fused(heads, key_padding_mask)
