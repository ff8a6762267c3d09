"""Tables of relation matrices, stored as tiles, and the chain of modules that runs over them.

A *table* holds one matrix per relation for one role. ZeRO-3 gathers one full Parameter at a time, when
the module that owns it is called. So a table is cut into *tiles*, blocks of consecutive relations, each
a Parameter of its own submodule: only one tile, and one being prefetched, is then gathered at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from translution.planner.config import DEFAULT_WORKSPACE_BYTES, RelationGeometry
from translution.planner.costs import table_tiles

from ..ops import RelationBias, RelationVectors, grouped
from ..ops.compiled import describe_operator
from ..ops.context import RelationContext, dropout_noise
from ..ops.functional import RelationTerms, functional_attention
from ..ops.grouped_mm import Products
from ..ops.implementations import canonical_implementation, choose_implementation
from ..ops.naive import gather_attention

ROLE_NAMES = {"q": "query", "k": "key", "v": "value"}
"""Name of a role's tables and inputs by its letter in ``roles``."""


Fill = Callable[[Tensor, str, int], None]
"""Gives a new tile's table, (count, d_in, d_out), its values; further arguments are the role and the first relation."""


def draw_values(weight: Tensor, role: str = "", first: int = 0) -> None:
    """Draw the values of new matrices (count, d_in, d_out), the same way for every role and relation."""
    del role, first
    # The published layer's initialization of its (R, C, C') table. The bound does not depend on the number of
    # relations, so it is the same for a tile as for the full table.
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


class Tile(nn.Module):
    """Matrices of consecutive relations for the roles that are used together.

    Row ``n`` of each Parameter, (count, d_in, d_out), belongs to the pairs of relation ``first + n``. The
    paper numbers the query table by the reversed relation instead; see `RelationTables.table`.

    Args:
        first: first relation of the tile.
        count: number of relations in the tile.
        d_in: input width of a matrix.
        d_out: output width of a matrix.
        roles: names of the tile's tables: "query" and "key", one of the two, or "value".
        fill: gives the tables their values.
    """

    def __init__(
        self, first: int, count: int, d_in: int, d_out: int, roles: tuple[str, ...], fill: Fill = draw_values
    ) -> None:
        super().__init__()
        self.first, self.sizes = first, (count, d_in, d_out)
        for role in roles:
            weight = nn.Parameter(torch.empty(count, d_in, d_out))
            with torch.no_grad():
                fill(weight, role, first)
            self.register_parameter(role, weight)

    def tile(self, role: str) -> Tensor | None:
        """Return the Parameter of a role, (count, d_in, d_out), or None if the role has no table."""
        return self._parameters.get(role)

    def extra_repr(self) -> str:
        """Say how many matrices the tile holds, their sizes and roles; equal tiles are printed once."""
        count, d_in, d_out = self.sizes
        return f"{count} relations, {d_in} x {d_out}, {', '.join(self._parameters)}"


class LogitTile(Tile):
    """Query and key matrices of consecutive relations."""

    def forward(self, link: Tensor, context: RelationContext) -> Tensor:
        """Add the logits of the tile's relations to the context; link (1,) → link (1,)."""
        result: Tensor = grouped.LogitTileFunction.apply(
            link, context, self.first, self.tile("query"), self.tile("key")
        )
        return result


class ValueTile(Tile):
    """Value matrices of consecutive relations."""

    def forward(self, link: Tensor, context: RelationContext) -> Tensor:
        """Add the output of the tile's relations to the context; link (1,) → link (1,)."""
        result: Tensor = grouped.ValueTileFunction.apply(link, context, self.first, self.tile("value"))
        return result


class OperatorChain(nn.Module):
    """Attention as a chain of tiles, each of which adds to the logits or to the output.

    A call saves its inputs and the attention weights for backward, regardless of the tiling.

    Args:
        geometry: arrangement of the tokens.
        heads: number of attention heads.
        widths: input and output width of the tiles' matrices or vectors.
        scale: factor applied to the summed logits.
        dropout: probability of dropping an attention weight in training.
        workspace_bytes: limit of the scratch memory.
        relative: names of the inputs that are multiplied by a matrix per relation.
    """

    def __init__(
        self,
        geometry: RelationGeometry,
        heads: int,
        widths: tuple[int, int],
        *,
        scale: float,
        dropout: float = 0.0,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
        relative: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.geometry, self.heads, self.scale, self.widths = geometry, heads, scale, widths
        self.dropout, self.workspace_bytes, self.relative = dropout, workspace_bytes, relative
        self.implementation = "auto"
        """One of `IMPLEMENTATIONS`."""
        self.deterministic: bool | None = None
        """Whether fused kernels give the same result in every run, at some cost; None: if torch's algorithms must."""
        self.products: Products | None = None
        """Products of many relations at a time; None chooses the fastest that proves correct on the device."""
        self.logit_tiles = nn.ModuleList()
        self.value_tiles = nn.ModuleList()

    def forward(
        self, sources: dict[str, Tensor], key_padding: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Attention over all pairs.

        Args:
            sources: (b, n, width) each. "query", "key", "value": inputs of the role's table, or
                projected rows for a query or key without a table where the other one has a table.
                "plain_query", "plain_key", "plain_value": inputs of a term without tables.
            key_padding: (b, n), true where a token is padding and must not be attended to.

        Returns:
            Outputs of the relative values and of the plain values, (b, n, width) each, or None.
        """
        if torch.compiler.is_compiling():
            return self._attend_compiled(sources, key_padding)
        return self._attend(sources, key_padding)

    def _attend_compiled(
        self, sources: dict[str, Tensor], key_padding: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Attend inside a model that is being compiled: torch runs the chain without compiling it."""
        from ..ops.eager import call_eagerly

        found: tuple[Tensor | None, Tensor | None] = call_eagerly(self._attend, sources, key_padding)
        return found

    def _attend(self, sources: dict[str, Tensor], key_padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        device = next(iter(sources.values())).device.type
        run = self._run_transformed if torch._C._are_functorch_transforms_active() else self._run
        if not torch.amp.is_autocast_available(device):
            return run(sources, key_padding)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            sources = {name: x.to(dtype) for name, x in sources.items()}
        with torch.autocast(device, enabled=False):
            return run(sources, key_padding)

    def _implementation(self, sources: dict[str, Tensor]) -> str:
        """Return the implementation of a call: "fused", "batched", "grouped" or "naive"."""
        if not self.relative:
            return "grouped"  # Without tables there is nothing to choose.
        first = next(iter(sources.values()))
        return choose_implementation(self.implementation, first.device, first.dtype, self.widths, self.heads)

    def draw_seed(self) -> int:
        """Draw the seed of this call's dropout from torch's default generator; zero without dropout."""
        return int(torch.randint(2**63 - 1, (), dtype=torch.int64)) if self.dropout and self.training else 0

    def stored_tables(self) -> dict[str, Tensor]:
        """Return the tables by the names of their roles, (R, d_in, d_out) each, in the order of the tiles' pairs."""
        found: dict[str, Tensor] = {}
        for role in ROLE_NAMES.values():
            tiles = self.value_tiles if role == "value" else self.logit_tiles
            parts = [tile.tile(role) for tile in tiles if isinstance(tile, Tile)]
            if given := [part for part in parts if part is not None]:
                found[role] = torch.cat(given)
        return found

    def _run_transformed(
        self, sources: dict[str, Tensor], key_padding: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Attend under a transform of torch.func, such as vmap."""
        terms: dict[str, Tensor] = {}
        for tile in (*self.logit_tiles, *self.value_tiles):
            if isinstance(tile, RelationBias):
                terms["bias"] = tile.table
            elif isinstance(tile, RelationVectors):
                terms[f"{tile.role}_vectors"] = tile.vectors
        return functional_attention(
            self.geometry,
            self.heads,
            self.scale,
            sources,
            RelationTerms(self.stored_tables(), **terms),
            key_padding=key_padding,
            dropout=self.dropout if self.training else 0.0,
        )

    def _context(self, sources: dict[str, Tensor]) -> RelationContext:
        """Return the context of a call, without mask and dropout."""
        context = RelationContext(self.geometry, self.heads, self.scale, self.workspace_bytes)
        context.widths, context.relative = self.widths, self.relative
        context.implementation = self._implementation(sources)
        context.deterministic = (
            torch.are_deterministic_algorithms_enabled() if self.deterministic is None else self.deterministic
        )
        context.products = self.products
        return context

    def _anchor(self, sources: Iterable[Tensor | None]) -> Tensor:
        """Return the start of the link that orders a call, (1,)."""
        given = [x for x in sources if x is not None]
        trained = any(x.requires_grad for x in (*given, *self.parameters()))
        # ZeRO-3 releases a gathered tile after its backward only if one of the tile's inputs requires grad.
        return given[0].new_zeros(1, requires_grad=trained and torch.is_grad_enabled())

    def _run(self, sources: dict[str, Tensor], key_padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        context = self._context(sources)
        context.adds_logits, context.key_padding = "plain_query" in sources, key_padding
        context.dropout = self.dropout if self.training else 0.0
        context.seed = self.draw_seed()
        ordered = [sources[name].contiguous() if name in sources else None for name in grouped.SOURCES]
        first = next(x for x in ordered if x is not None)
        anchor = self._anchor(ordered)
        link = grouped.OpenFunction.apply(context, anchor, *ordered)
        for tile in self.logit_tiles:
            link = tile(link, context)
        link = grouped.SoftmaxFunction.apply(link, context, first.dtype)
        for tile in self.value_tiles:
            link = tile(link, context)
        relative, plain = grouped.CloseFunction.apply(link, context, first.dtype)
        return relative, plain


class RelationTables(OperatorChain):
    """The relation tables of one layer, and attention with them.

    Args:
        geometry, heads, scale, dropout, workspace_bytes: as in `OperatorChain`.
        d_in: input width of the matrices.
        d_out: output width of the matrices, all heads together.
        roles: roles with a table, a subset of "qkv".
        tile_relations: number of relations per tile; None stores each table as one tile.
        implementation: as in `Translution`.
        fill: gives new tables their values.
    """

    def __init__(
        self,
        geometry: RelationGeometry,
        heads: int,
        d_in: int,
        d_out: int,
        *,
        roles: str,
        scale: float,
        dropout: float = 0.0,
        tile_relations: int | None = None,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
        implementation: str = "auto",
        fill: Fill = draw_values,
    ) -> None:
        relative = frozenset(ROLE_NAMES[role] for role in roles)
        super().__init__(
            geometry,
            heads,
            (d_in, d_out),
            scale=scale,
            dropout=dropout,
            workspace_bytes=workspace_bytes,
            relative=relative,
        )
        self.implementation = canonical_implementation(implementation)
        logit_roles = tuple(ROLE_NAMES[role] for role in "qk" if role in roles)
        first = 0
        sizes = [size for size, copies in table_tiles(geometry.relations, tile_relations) for _ in range(copies)]
        for count in sizes:
            if logit_roles:
                self.logit_tiles.append(LogitTile(first, count, d_in, d_out, logit_roles, fill))
            if "v" in roles:
                self.value_tiles.append(ValueTile(first, count, d_in, d_out, ("value",), fill))
            first += count
        tiles = [tile for tile in (*self.logit_tiles, *self.value_tiles) if isinstance(tile, Tile)]
        described = [(tile.first, [name for name, _ in tile.named_parameters()]) for tile in tiles]
        self.description = describe_operator(geometry, heads, scale, (d_in, d_out), described)
        """What the custom operator needs to know."""

    def _attend_compiled(
        self, sources: dict[str, Tensor], key_padding: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Attend as one custom operator, unless the reference is asked for or ZeRO-3 gathers tile by tile."""
        tables = list(self.parameters())
        if self.implementation == "naive" or self.products is not None or any(hasattr(x, "ds_id") for x in tables):
            return super()._attend_compiled(sources, key_padding)
        names = [name for name in grouped.SOURCES if name in sources]
        rows = [sources[name] for name in names]
        device = rows[0].device.type
        if torch.is_autocast_enabled(device):
            rows = [x.to(torch.get_autocast_dtype(device)) for x in rows]
        dropout = self.dropout if self.training else 0.0
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64) if dropout else torch.zeros((), dtype=torch.int64)
        parts = (self.implementation, str(self.deterministic), str(self.workspace_bytes), str(dropout), *names)
        relative, plain, _ = torch.ops.translution.attend(
            rows, tables, key_padding, seed, self.description, " ".join(parts)
        )
        return relative if "value" in sources else None, plain if "plain_value" in sources else None

    def _run(self, sources: dict[str, Tensor], key_padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if self._implementation(sources) != "naive":
            return super()._run(sources, key_padding)
        first = next(iter(sources.values()))
        # Under autocast the rows have a narrower dtype than the tables.
        tables = {name: self.table(name).to(first.dtype) for name in self.relative}
        noise = None
        if self.dropout and self.training:
            tokens = self.geometry.tokens
            like = first.new_empty(len(first), self.heads, tokens, tokens)
            noise = dropout_noise(like, self.dropout, self.draw_seed())
        return gather_attention(self.geometry, self.heads, self.scale, sources, tables, key_padding, noise)

    def table(self, role: str) -> Tensor:
        """Return a role's table (R, d_in, d_out), numbered as in the paper; gradients flow to the tiles.

        Args:
            role: "query", "key" or "value".
        """
        return self.stored_tables()[role][self._order(role)]

    @torch.no_grad()
    def load_table(self, role: str, table: Tensor) -> None:
        """Copy a table (R, d_in, d_out), numbered as in the paper, into the tiles.

        Args:
            role: "query", "key" or "value".
            table: the matrices of all relations.
        """
        table = table[self._order(role)]
        for tile in self.value_tiles if role == "value" else self.logit_tiles:
            if isinstance(tile, Tile) and (weight := tile.tile(role)) is not None:
                weight.copy_(table[tile.first : tile.first + len(weight)])

    def _order(self, role: str) -> list[int]:
        """Return the paper's number of each relation in a role's table."""
        relations = range(self.geometry.relations)
        # Reversal is its own inverse, so the same order serves both directions.
        return [self.geometry.reverse(r) for r in relations] if role == "query" else list(relations)
