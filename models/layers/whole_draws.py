"""Values of new tables: a rank that owns some of the relations draws what one process with all of them would.

One process draws the tables tile by tile. A tile of a rank has relations of several such tiles, and under ZeRO-3 it
must be filled before the next one is made. So the state of torch's generator is kept at the start of every table of a
whole tile, and draws are repeated from there. A rank draws every matrix once, and those near its own ones again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from translution.planner.config import RelationGeometry
from translution.planner.costs import table_tiles

from .tables import ROLE_NAMES, draw_values


class WholeTile(NamedTuple):
    """A tile of a layer that has all relations."""

    name: str
    """Name of its module."""
    roles: tuple[str, ...]
    """Names of its tables."""
    relations: range
    """Its relations."""


def whole_tiles(geometry: RelationGeometry, roles: str, tile_relations: int | None) -> Iterator[WholeTile]:
    """Yield the tiles of a layer with all relations, in the order in which it makes them.

    Args:
        geometry: arrangement of the tokens.
        roles: roles with a table, a subset of "qkv".
        tile_relations: number of relations per tile; None stores each table as one tile.
    """
    logit_roles = tuple(ROLE_NAMES[role] for role in "qk" if role in roles)
    sizes = [count for count, copies in table_tiles(geometry.relations, tile_relations) for _ in range(copies)]
    first = 0
    for number, count in enumerate(sizes):
        relations = range(first, first + count)
        if logit_roles:
            yield WholeTile(f"logit_tiles.{number}", logit_roles, relations)
        if "v" in roles:
            yield WholeTile(f"value_tiles.{number}", ("value",), relations)
        first += count


class WholeDraws:
    """Draws the matrices of a rank's relations as one process does that draws those of all relations.

    Args:
        tiles: the tiles of that process in its order.
    """

    def __init__(self, tiles: Iterable[WholeTile]) -> None:
        self._tables = [(role, tile.relations) for tile in tiles for role in tile.roles]
        self._states: list[Tensor] = []
        """State of the generator before each table that was reached."""
        self._scratch: Tensor | None = None

    def fill(self, weight: Tensor, role: str, relations: Sequence[int]) -> None:
        """Draw the matrices of some relations.

        Args:
            weight: receives them, (count, d_in, d_out).
            role: name of the table.
            relations: their numbers among all relations, ascending.
        """
        if weight.is_meta:
            return
        if self._scratch is None:
            self._scratch = weight.new_empty(1, *weight.shape[1:])
            self._states.append(self._generator.get_state())
        for number, (own_role, run) in enumerate(self._tables):
            begin, end = bisect_left(relations, run.start), bisect_left(relations, run.stop)
            if own_role == role and begin < end:
                self._reach(number)
                wanted = dict(zip(relations[begin:end], range(begin, end), strict=True))
                self._draw(number, {relation: weight[place] for relation, place in wanted.items()})

    def finish(self) -> None:
        """Leave the generator as it is after all tables are drawn."""
        if self._scratch is not None:
            self._reach(len(self._tables))
            self._generator.set_state(self._states[-1])

    @property
    def _generator(self) -> torch.Generator:
        assert self._scratch is not None
        device = self._scratch.device
        if device.type == "cpu":
            return torch.default_generator
        return torch.cuda.default_generators[device.index or 0]

    def _reach(self, number: int) -> None:
        for passed in range(len(self._states) - 1, number):
            self._draw(passed, {})

    def _draw(self, number: int, wanted: dict[int, Tensor]) -> None:
        """Draw all matrices of a table of a whole tile, and copy those that are wanted."""
        assert self._scratch is not None
        self._generator.set_state(self._states[number])
        for relation in self._tables[number][1]:
            draw_values(self._scratch)
            if relation in wanted:
                wanted[relation].copy_(self._scratch[0])
        if number + 1 == len(self._states):
            self._states.append(self._generator.get_state())
