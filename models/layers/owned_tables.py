"""The relation tables of one rank of a group, each rank with the relations that it owns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from translution.planner.common import InputError
from translution.planner.config import RelationGeometry

from ..ops import grouped
from ..ops.context import RelationContext
from ..ops.implementations import canonical_implementation
from ..ops.relation_parallel import RelationCall, RelationGroup, all_gather_equal, attend_in_group
from .tables import OperatorChain, RelationTables, Tile
from .whole_draws import WholeDraws, WholeTile, whole_tiles


class OwnedTables(RelationTables):
    """The tables of this rank's relations, and attention with the tables of all ranks of the group.

    The matrices are drawn as those of `RelationTables` with all relations and tiles of the same size: every rank draws
    all and keeps its own, so that ranks with the same random state have together the tables of one process.

    Args:
        group: the ranks, and the relations of each.
        heads, d_in, d_out, options: as in `RelationTables`.

    Raises:
        InputError: if the implementation is "naive", which copies matrices of all relations.
    """

    def __init__(
        self, group: RelationGroup, heads: int, d_in: int, d_out: int, *, tile_relations: int | None, **options: Any
    ) -> None:
        if canonical_implementation(options.get("implementation", "auto")) == "naive":
            raise InputError("implementation: 'naive' is not allowed: must be another one with relation_group")
        whole, owned = group.geometry, group.owned.owned
        draws = WholeDraws(whole_tiles(whole, options["roles"], tile_relations))

        def fill(weight: Tensor, role: str, first: int) -> None:
            draws.fill(weight, role, owned[first : first + len(weight)])

        super().__init__(group.owned, heads, d_in, d_out, tile_relations=tile_relations, fill=fill, **options)
        draws.finish()
        self.group, self.tile_relations, self.roles = group, tile_relations, options["roles"]

    def extra_repr(self) -> str:
        """Say which part of the relations this rank owns."""
        owned, relations = self.geometry.relations, self.whole.relations
        return f"rank {self.group.rank} of {self.group.size}, {owned} of {relations} relations"

    @property
    def whole(self) -> RelationGeometry:
        """The geometry with the relations of all ranks."""
        return self.group.geometry

    def whole_tiles(self) -> Iterator[WholeTile]:
        """Yield the tiles that one process would have, in the order in which it makes them."""
        return whole_tiles(self.whole, self.roles, self.tile_relations)

    def _matrices(self, role: str) -> list[Tensor]:
        """Return this rank's matrices of a role as views, (d_in, d_out) each."""
        tiles = self.value_tiles if role == "value" else self.logit_tiles
        weights = [tile.tile(role) for tile in tiles if isinstance(tile, Tile)]
        return [matrix for weight in weights if weight is not None for matrix in weight.unbind()]

    @torch.no_grad()
    def gather_tables(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the roles and their whole tables, (R, d_in, d_out) in stored order; all ranks must take part."""
        size, relations = self.group.size, self.whole.relations
        places = [[r for r, owner in enumerate(self.group.owners) if owner == rank] for rank in range(size)]
        most = max(map(len, places))
        for role, table in self.stored_tables().items():
            padded = table.new_zeros(most, *table.shape[1:])
            padded[: len(table)] = table
            parts = table.new_empty(size * most, *table.shape[1:])
            all_gather_equal(parts, padded, self.group.process_group)
            whole = table.new_empty(relations, *table.shape[1:])
            for own, part in zip(places, parts.split(most), strict=True):
                whole[own] = part[: len(own)]
            yield role, whole

    def select_tables(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's part of whole tables, by the names of its Parameters.

        Args:
            tables: (R, d_in, d_out) in stored order, by role.
        """
        found: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            kind, number, role = name.split(".")
            tile = (self.value_tiles if kind == "value_tiles" else self.logit_tiles)[int(number)]
            assert isinstance(tile, Tile)
            found[name] = tables[role][list(self.group.owned.owned[tile.first : tile.first + len(parameter)])]
        return found

    def table(self, role: str) -> Tensor:
        """Refuse: no rank has a whole table; `gather_tables` collects it.

        Raises:
            InputError: always.
        """
        raise InputError(f"table: {role!r} is not allowed: no rank of a relation group has a whole table")

    def load_table(self, role: str, table: Tensor) -> None:
        """Copy this rank's part of a table (R, d_in, d_out), numbered as in the paper, into its tiles."""
        geometry = self.whole
        order = [geometry.reverse(r) if role == "query" else r for r in range(geometry.relations)]
        stored = table[order]
        with torch.no_grad():
            for relation, matrix in zip(self.group.owned.owned, self._matrices(role), strict=True):
                matrix.copy_(stored[relation])

    def _attend_compiled(
        self, sources: dict[str, Tensor], key_padding: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        return OperatorChain._attend_compiled(self, sources, key_padding)

    def _attend(self, sources: dict[str, Tensor], key_padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if torch._C._are_functorch_transforms_active():
            return self._run_transformed(sources, key_padding)
        sources = _joined(sources)
        device = next(iter(sources.values())).device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            # Once for each tensor: roles with the same input share its rows, which then travel once.
            dtype = torch.get_autocast_dtype(device)
            cast = {id(x): x.to(dtype) for x in sources.values()}
            sources = {name: cast[id(x)] for name, x in sources.items()}
        return super()._attend(sources, key_padding)

    def _run_transformed(
        self, sources: dict[str, Tensor], key_padding: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        raise InputError("relation_group: a transform of torch.func is not allowed: it cannot follow other ranks")

    def _run(self, sources: dict[str, Tensor], key_padding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        same = {id(x): x.contiguous() for x in sources.values()}
        sources = {name: same[id(x)] for name, x in sources.items()}
        first = next(iter(sources.values()))
        owned, local = self._context(sources), RelationContext(self.whole, self.heads, self.scale, self.workspace_bytes)
        local.widths, local.adds_logits, local.key_padding = self.widths, "plain_query" in sources, key_padding
        if self.dropout and self.training:
            local.dropout, local.first_sample = self.dropout, self.group.dropout_rank * len(first)
            local.seed = self.group.share_seed(self.draw_seed(), first.device)
        call = RelationCall(self.group, local, owned, _shared(sources))
        return attend_in_group(
            call,
            self._anchor(sources.values()),
            [sources.get(name) for name in grouped.SOURCES],
            self.logit_tiles,
            self.value_tiles,
        )


def _joined(sources: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the sources with one tensor for those that are the same rows.

    ZeRO-3 passes every input of a module through a function of its own, which returns a view: roles with the same input
    no longer have the same tensor, and its rows would travel once for each of them.
    """
    found: dict[object, Tensor] = {}
    return {
        name: found.setdefault((x.data_ptr(), x.shape, x.stride(), x.requires_grad), x) for name, x in sources.items()
    }


def _shared(sources: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """Return the names of the sources that travel; those of one tensor together."""
    names: dict[int, list[str]] = {}
    for name in ("query", "key", "value"):
        if name in sources:
            names.setdefault(id(sources[name]), []).append(name)
    return tuple(map(tuple, names.values()))


def make_tables(
    geometry: RelationGeometry,
    relation_group: ProcessGroup | None,
    relation_owners: Sequence[int] | None,
    heads: int,
    d_in: int,
    d_out: int,
    **options: Any,
) -> RelationTables:
    """Return all tables of a layer, or with a group those of this rank's relations.

    Args:
        geometry: arrangement of the tokens.
        relation_group, relation_owners: as in `Translution`.
        heads, d_in, d_out, options: as in `RelationTables`.

    Raises:
        InputError: if there are owners without a group, or the group cannot have this layer.
    """
    if relation_group is None:
        if relation_owners is not None:
            raise InputError("relation_owners: owners without relation_group are not allowed: give both or neither")
        return RelationTables(geometry, heads, d_in, d_out, **options)
    return OwnedTables(RelationGroup(relation_group, geometry, relation_owners), heads, d_in, d_out, **options)
