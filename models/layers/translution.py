"""Translution and α-Translution as layers, (B, N, C) → (B, N, C).

Translution         a matrix per relation for each relative role (arXiv 2510.10060, section 3)
AlphaTranslution    plain attention plus a low-rank relative term (section 4)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from translution.planner.common import InputError
from translution.planner.config import DEFAULT_WORKSPACE_BYTES, Window

from .attention import RotaryEmbedding
from .base import OperatorLayer, check_operator_options, check_roles
from .owned_tables import make_tables
from .tables import ROLE_NAMES


class Translution(OperatorLayer):
    """Full Translution: every relation between two tokens has its own matrix in each relative role.

    Args:
        dim, heads, head_dim, grid, class_token, length, causal, window, dropout, bias: as in `OperatorLayer`.
        roles: the relative roles, a subset of "qkv"; the others are plain projections.
        tile_relations: number of relations per tile of a table; None stores each table as one Parameter.
        workspace_bytes: limit of the scratch memory of one call, independent of the batch size.
        implementation: "fused", kernels for NVIDIA GPUs; "batched", many relations at a time; "grouped", one relation
            at a time; "naive" (or "gather"), the published algorithm, a slow reference that needs memory for a matrix
            per pair and sample. "auto" takes the first of the first three that serves, or the one that the environment
            variable TRANSLUTION_IMPLEMENTATION names.
        relation_group: ranks that share out the relations: each holds the matrices of its own, and computes their pairs
            for the samples of all. They must make the same calls, with equally many samples. None: all matrices are
            here.
        relation_owners: the rank within the group that owns each relation; by default they are dealt so that all have
            as many relations and pairs (`planner.config.deal_relations`).

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
        grid: tuple[int, ...] | None = None,
        class_token: bool = False,
        length: int | None = None,
        causal: bool = False,
        window: Window = None,
        dropout: float = 0.0,
        bias: bool = True,
        roles: str = "qkv",
        tile_relations: int | None = None,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
        implementation: str = "auto",
        relation_group: ProcessGroup | None = None,
        relation_owners: Sequence[int] | None = None,
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
            dropout=dropout,
            bias=bias,
        )
        check_operator_options(workspace_bytes, implementation)
        self.roles = check_roles(roles)
        self.plain = nn.ModuleDict(
            {role: nn.Linear(dim, self.inner_dim, bias=False) for role in "qkv" if role not in self.roles}
        )
        self.tables = make_tables(
            self.geometry,
            relation_group,
            relation_owners,
            heads,
            dim,
            self.inner_dim,
            roles=self.roles,
            scale=self.head_dim**-0.5,
            dropout=dropout,
            tile_relations=tile_relations,
            workspace_bytes=workspace_bytes,
            implementation=implementation,
        )
        self.output = self._make_output()

    def forward(self, x_bnc: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) → (B, N, C); the mask (B, N) is true where a token is padding and must not be attended to."""
        self._check(x_bnc, key_padding_mask)
        relative, plain = self.tables(self._sources(x_bnc), key_padding_mask)
        result: Tensor = self.output(relative if relative is not None else plain)
        return result

    def _sources(self, x_bnc: Tensor) -> dict[str, Tensor]:
        """Return the inputs of the operator, (B, N, width) each, named as in `OperatorChain.forward`."""
        rows = {role: x_bnc if role in self.roles else self.plain[role](x_bnc) for role in "qkv"}
        if "q" in self.roles or "k" in self.roles:
            sources = {"query": rows["q"], "key": rows["k"]}
        else:
            sources = {"plain_query": rows["q"], "plain_key": rows["k"]}
        sources["value" if "v" in self.roles else "plain_value"] = rows["v"]
        return sources


class AlphaTranslution(OperatorLayer):
    """α-Translution: the average of plain attention and a relative term of low rank.

    Args:
        dim, heads, head_dim, grid, class_token, length, causal, window, dropout, bias: as in `OperatorLayer`.
        c1: input width of the relation matrices per head.
        c2: output width of the relation matrices per head.
        roles: the relative roles, a subset of "qkv".
        rotary: apply rotary embedding to the plain queries and keys.
        rotary_pairs: as in `RotaryEmbedding`.
        tile_relations, workspace_bytes, implementation, relation_group, relation_owners: as in `Translution`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        c1: int = 16,
        c2: int = 16,
        head_dim: int | None = None,
        grid: tuple[int, ...] | None = None,
        class_token: bool = False,
        length: int | None = None,
        causal: bool = False,
        window: Window = None,
        dropout: float = 0.0,
        bias: bool = True,
        roles: str = "qkv",
        rotary: bool = False,
        rotary_pairs: str = "neighbours",
        tile_relations: int | None = None,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
        implementation: str = "auto",
        relation_group: ProcessGroup | None = None,
        relation_owners: Sequence[int] | None = None,
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
            dropout=dropout,
            bias=bias,
        )
        check_operator_options(workspace_bytes, implementation)
        for name, value in (("c1", c1), ("c2", c2)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name}: {value!r} is not allowed: must be an integer of at least 1")
        self.roles = check_roles(roles)
        low1, low2 = heads * c1, heads * c2
        coupled = bool({"q", "k"} & set(self.roles))
        self.plain = nn.Linear(dim, 3 * self.inner_dim, bias=False)
        # A logit role without a table is multiplied by the other role's projected rows, so it needs their width.
        widths = {role: low1 if role in self.roles else low2 for role in "qk" if coupled}
        if "v" in self.roles:
            widths["v"] = low1
        self.low = nn.ModuleDict({role: nn.Linear(dim, width, bias=False) for role, width in widths.items()})
        self.tables = make_tables(
            self.geometry,
            relation_group,
            relation_owners,
            heads,
            low1,
            low2,
            roles=self.roles,
            scale=self.head_dim**-0.5 / (2 if coupled else 1),
            dropout=dropout,
            tile_relations=tile_relations,
            workspace_bytes=workspace_bytes,
            implementation=implementation,
        )
        self.low_output = nn.Linear(low2, self.inner_dim, bias=False) if "v" in self.roles else None
        self.rotary = RotaryEmbedding(self.geometry, self.head_dim, rotary_pairs) if rotary else None
        self.output = self._make_output()

    def forward(self, x_bnc: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) → (B, N, C); the mask (B, N) is true where a token is padding and must not be attended to."""
        self._check(x_bnc, key_padding_mask)
        query, key, value = self.plain(x_bnc).chunk(3, dim=-1)
        if self.rotary is not None:
            query, key = (
                self.rotary(rows.unflatten(2, (self.heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
                for rows in (query, key)
            )
        sources = {"plain_query": query, "plain_key": key, "plain_value": value}
        sources |= {ROLE_NAMES[role]: low(x_bnc) for role, low in self.low.items()}
        relative, plain = self.tables(sources, key_padding_mask)
        if self.low_output is not None:
            plain = (plain + self.low_output(relative)) / 2
        result: Tensor = self.output(plain)
        return result
