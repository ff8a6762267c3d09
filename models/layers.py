"""The operators as layers: (B, N, C) in, (B, N, C) out.

Translution         a matrix per relation for each relative role (arXiv 2510.10060, section 3)
AlphaTranslution    plain attention plus a low-rank relative term (section 4)
SelfAttention       the baseline, plain or rotary
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from translution.planner.errors import InputError
from translution.planner.model_spec import canonical_roles
from translution.planner.relations import RelationGeometry

from .context import DEFAULT_WORKSPACE_BYTES, missing_pairs
from .rotary import rotary_angles, rotate
from .tiles import RelationTables

IMPLEMENTATIONS = ("grouped", "gather")


def _geometry(
    grid: tuple[int, int] | None, class_token: bool, length: int | None, causal: bool, window: int | None
) -> RelationGeometry:
    if (grid is None) == (length is None):
        raise InputError(f"grid: {grid!r} with length {length!r} is not allowed: give exactly one of grid and length")
    if grid is not None:
        if causal:
            raise InputError("causal: True is not allowed: must be False for a grid")
        return RelationGeometry.grid(*grid, class_token=class_token, window=window)
    if class_token:
        raise InputError("class_token: True is not allowed: must be False for a sequence")
    assert length is not None
    return RelationGeometry.sequence(length, causal=causal, window=window)


def _roles(roles: str) -> str:
    try:
        return canonical_roles(roles)
    except ValueError as error:
        raise InputError(f"roles: {error}") from None


class OperatorLayer(nn.Module):
    """What the three layers share: the geometry, the heads and the output projection.

    Args:
        dim: model width, C.
        heads: attention heads, h.
        head_dim: width per head, D; dim / heads unless given.
        grid: (height, width) of the patches, for images.
        class_token: whether a class token stands before the patches.
        length: number of tokens, for sequences; give either grid or length.
        causal: whether a token sees only itself and earlier ones.
        window: pairs of tokens farther apart than this, in rows or columns, do not exist; tables
            then hold the nearer relations only. None: all pairs exist.

    Raises:
        InputError: naming the argument and what is allowed.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        grid: tuple[int, int] | None = None,
        class_token: bool = False,
        length: int | None = None,
        causal: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("heads", heads), ("head_dim", head_dim)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name}: {value!r} is not allowed: must be an integer of at least 1")
        if head_dim is None and dim % heads:
            raise InputError(f"heads: {heads} is not allowed: must divide dim {dim} when head_dim is not given")
        self.geometry = _geometry(grid, class_token, length, causal, window)
        self.dim, self.heads = dim, heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.inner_dim = heads * self.head_dim

    def _make_output(self) -> nn.Module:
        if self.heads == 1 and self.head_dim == self.dim:
            return nn.Identity()
        return nn.Linear(self.inner_dim, self.dim)

    def _check(self, x_bnc: Tensor, key_padding: Tensor | None) -> None:
        tokens = self.geometry.tokens
        if x_bnc.ndim != 3 or x_bnc.shape[1:] != (tokens, self.dim):
            raise InputError(f"x: shape {tuple(x_bnc.shape)} is not allowed: must be (batch, {tokens}, {self.dim})")
        if key_padding is not None and (key_padding.dtype != torch.bool or key_padding.shape != x_bnc.shape[:2]):
            found = f"{key_padding.dtype} {tuple(key_padding.shape)}"
            raise InputError(f"key_padding_mask: {found} is not allowed: must be bool {tuple(x_bnc.shape[:2])}")


def _table_options(tile_relations: int | None, workspace_bytes: int, implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            f"implementation: {implementation!r} is not allowed: must be one of {', '.join(IMPLEMENTATIONS)}"
        )
    if workspace_bytes < 1:
        raise InputError(f"workspace_bytes: {workspace_bytes} is not allowed: must be at least 1")


class Translution(OperatorLayer):
    """Full Translution: every relation between two tokens has its own matrix for each relative role.

    Args:
        dim, heads, head_dim, grid, class_token, length, causal, window: as in `OperatorLayer`.
        roles: the relative roles, a subset of "qkv"; the others are plain projections.
        tile_relations: relations per tile of a table; None keeps each table one Parameter.
        workspace_bytes: limit of the scratch memory, whatever the batch.
        implementation: "grouped", or "gather" for the published way (slow and enormous).

    Example:
        >>> layer = Translution(192, 3, grid=(14, 14), class_token=True)
        >>> layer(torch.randn(2, 197, 192)).shape
        torch.Size([2, 197, 192])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        grid: tuple[int, int] | None = None,
        class_token: bool = False,
        length: int | None = None,
        causal: bool = False,
        window: int | None = None,
        roles: str = "qkv",
        tile_relations: int | None = None,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
        implementation: str = "grouped",
    ) -> None:
        super().__init__(
            dim,
            heads,
            head_dim=head_dim,
            grid=grid,
            class_token=class_token,
            length=length,
            causal=causal,
            window=window,
        )
        _table_options(tile_relations, workspace_bytes, implementation)
        self.roles = _roles(roles)
        self.plain = nn.ModuleDict(
            {role: nn.Linear(dim, self.inner_dim, bias=False) for role in "qkv" if role not in self.roles}
        )
        self.tables = RelationTables(
            self.geometry,
            heads,
            dim,
            self.inner_dim,
            roles=self.roles,
            scale=self.head_dim**-0.5,
            tile_relations=tile_relations,
            workspace_bytes=workspace_bytes,
            implementation=implementation,
        )
        self.output = self._make_output()

    def forward(self, x_bnc: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) → (B, N, C); the mask (B, N) is true where a token is padding that none may see."""
        self._check(x_bnc, key_padding_mask)
        rows = {role: x_bnc if role in self.roles else self.plain[role](x_bnc) for role in "qkv"}
        if "q" in self.roles or "k" in self.roles:
            sources = {"query": rows["q"], "key": rows["k"]}
        else:
            sources = {"plain_query": rows["q"], "plain_key": rows["k"]}
        sources["value" if "v" in self.roles else "plain_value"] = rows["v"]
        relative, plain = self.tables(sources, key_padding_mask)
        result: Tensor = self.output(relative if relative is not None else plain)
        return result


class AlphaTranslution(OperatorLayer):
    """α-Translution: plain attention plus a relative term of low rank, averaged.

    Args:
        dim, heads, head_dim, grid, class_token, length, causal, window: as in `OperatorLayer`.
        c1: first low width per head.
        c2: second low width per head.
        roles: the relative roles, a subset of "qkv".
        rotary: turn the plain queries and keys by rotary embedding.
        tile_relations, workspace_bytes, implementation: as in `Translution`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        c1: int = 16,
        c2: int = 16,
        head_dim: int | None = None,
        grid: tuple[int, int] | None = None,
        class_token: bool = False,
        length: int | None = None,
        causal: bool = False,
        window: int | None = None,
        roles: str = "qkv",
        rotary: bool = False,
        tile_relations: int | None = None,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
        implementation: str = "grouped",
    ) -> None:
        super().__init__(
            dim,
            heads,
            head_dim=head_dim,
            grid=grid,
            class_token=class_token,
            length=length,
            causal=causal,
            window=window,
        )
        _table_options(tile_relations, workspace_bytes, implementation)
        for name, value in (("c1", c1), ("c2", c2)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name}: {value!r} is not allowed: must be an integer of at least 1")
        self.roles = _roles(roles)
        low1, low2 = heads * c1, heads * c2
        coupled = bool({"q", "k"} & set(self.roles))
        self.plain = nn.Linear(dim, 3 * self.inner_dim, bias=False)
        # A logit role without a table meets the other's low rows directly, so it needs their width.
        widths = {role: low1 if role in self.roles else low2 for role in "qk" if coupled}
        if "v" in self.roles:
            widths["v"] = low1
        self.low = nn.ModuleDict({role: nn.Linear(dim, width, bias=False) for role, width in widths.items()})
        self.tables = RelationTables(
            self.geometry,
            heads,
            low1,
            low2,
            roles=self.roles,
            scale=self.head_dim**-0.5 / (2 if coupled else 1),
            tile_relations=tile_relations,
            workspace_bytes=workspace_bytes,
            implementation=implementation,
        )
        self.low_output = nn.Linear(low2, self.inner_dim, bias=False) if "v" in self.roles else None
        self.turn = RotaryTurn(self.geometry, self.head_dim) if rotary else None
        self.output = self._make_output()

    def forward(self, x_bnc: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) → (B, N, C); the mask (B, N) is true where a token is padding that none may see."""
        self._check(x_bnc, key_padding_mask)
        query, key, value = self.plain(x_bnc).chunk(3, dim=-1)
        if self.turn is not None:
            query, key = (
                self.turn(rows.unflatten(2, (self.heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
                for rows in (query, key)
            )
        sources = {"plain_query": query, "plain_key": key, "plain_value": value}
        names = {"q": "query", "k": "key", "v": "value"}
        sources |= {names[role]: low(x_bnc) for role, low in self.low.items()}
        relative, plain = self.tables(sources, key_padding_mask)
        if self.low_output is not None:
            plain = (plain + self.low_output(relative)) / 2
        result: Tensor = self.output(plain)
        return result


class RotaryTurn(nn.Module):
    """Turns queries or keys (B, h, N, D) by the rotary angles of their tokens."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, geometry: RelationGeometry, head_dim: int) -> None:
        super().__init__()
        multiple = 2 if geometry.width == 1 else 4
        if head_dim % multiple:
            raise InputError(f"head_dim: {head_dim} is not allowed: must be a multiple of {multiple} for rotary")
        angles = rotary_angles(geometry, head_dim)
        dtype = torch.get_default_dtype()
        self.register_buffer("cosine", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sine", angles.sin().to(dtype), persistent=False)

    def forward(self, x_bhnd: Tensor) -> Tensor:
        """(B, h, N, D) → (B, h, N, D)."""
        return rotate(x_bhnd, self.cosine, self.sine)


class SelfAttention(OperatorLayer):
    """Multi-head self-attention, the baseline.

    Args:
        dim, heads, head_dim, grid, class_token, length, causal: as in `OperatorLayer`.
        rotary: turn queries and keys by rotary embedding, 1-D for a sequence, 2-D for a grid.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        grid: tuple[int, int] | None = None,
        class_token: bool = False,
        length: int | None = None,
        causal: bool = False,
        rotary: bool = False,
    ) -> None:
        super().__init__(
            dim, heads, head_dim=head_dim, grid=grid, class_token=class_token, length=length, causal=causal
        )
        self.projections = nn.Linear(dim, 3 * self.inner_dim, bias=False)
        self.turn = RotaryTurn(self.geometry, self.head_dim) if rotary else None
        self.output = self._make_output()

    def forward(self, x_bnc: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) → (B, N, C); the mask (B, N) is true where a token is padding that none may see."""
        self._check(x_bnc, key_padding_mask)
        query, key, value = self.projections(x_bnc).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.turn is not None:
            query, key = self.turn(query), self.turn(key)
        seen = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
        causal = self.geometry.causal
        if seen is not None and causal:
            seen, causal = seen & ~missing_pairs(self.geometry, x_bnc.device), False
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=causal)
        result: Tensor = self.output(out.transpose(1, 2).flatten(2))
        return result
