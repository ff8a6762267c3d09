"""Positions of a parameter's elements in the flat vectors of ZeRO's ranks.

A *fragment* is a range of consecutive elements of one parameter within a rank's flat vector. Resharding describes the
checkpoint's layout and the engine's layout as lists of fragments, so that it can read any layout into any other.

Sources: DeepSpeed 0.19.8, runtime/zero/partition_parameters.py (a partition has ceil(elements / ranks) elements) and
runtime/zero/stage3.py (the vector of a sub-group is the concatenation of its parameters' padded partitions).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from translution.planner.config import OwnedGeometry

_TILE = re.compile(r"(.*\.(?:logit_tiles|value_tiles|tables\.[qkv]))\.(\d+)\.(\w+)")
_RELATION_TABLES = ("query", "key", "value")
"""Last part of the names of tables that ranks may share out by relation."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """Consecutive elements of a flattened parameter."""

    name: str
    """Name of the parameter."""
    start: int
    """Index of the first element in the parameter."""
    numel: int
    """Number of elements."""
    offset: int
    """Index of the first element in the flat vector."""


def sub_group_fragments(numels: Mapping[str, int], world_size: int, rank: int) -> list[Fragment]:
    """Fragments of a rank's vector of one ZeRO-3 sub-group; padding is in no fragment.

    Args:
        numels: number of elements of each parameter, in the order of the sub-group.
        world_size: number of ranks over which each parameter is partitioned.
        rank: number of the rank.
    """
    fragments, offset = [], 0
    for name, numel in numels.items():
        partition_numel = -(-numel // world_size)
        start = min(rank * partition_numel, numel)
        count = min(start + partition_numel, numel) - start
        if count:
            fragments.append(Fragment(name, start, count, offset))
        offset += partition_numel
    return fragments


def successive_fragments(spans: Sequence[Mapping[str, tuple[int, int]]]) -> list[list[Fragment]]:
    """Fragments of each rank's vector under ZeRO-1 and 2, which partition one vector of all parameters.

    Args:
        spans: for each rank, offset in its vector and number of elements of each parameter that it holds a part of. The
            parts of a parameter are consecutive from rank to rank.
    """
    done: dict[str, int] = {}
    by_rank = []
    for own in spans:
        fragments = []
        for name, (offset, numel) in own.items():
            start = done.get(name, 0)
            fragments.append(Fragment(name, start, numel, offset))
            done[name] = start + numel
        by_rank.append(fragments)
    return by_rank


class Piece(NamedTuple):
    """Consecutive elements of a parameter of the untiled network."""

    start: int
    """Index of the first element in the parameter."""
    numel: int
    """Number of elements."""
    shift: int
    """Index of the first element in the range of which this is a piece."""


@dataclass(frozen=True, slots=True)
class UntiledPosition:
    """Position of a parameter within a parameter of the untiled network."""

    name: str
    """Name of the untiled parameter."""
    start: int
    """Index of the first element in the untiled parameter, or in the part of it that a rank owns."""
    matrix: int = 0
    """Elements of a relation's matrix, if ranks share out the relations."""
    owned: tuple[int, ...] = ()
    """Relations whose matrices the part has, if ranks share out the relations."""

    def pieces(self, start: int, numel: int) -> Iterator[Piece]:
        """Yield where a range of this parameter's elements is in the untiled one.

        Args:
            start: index of the first element in this parameter.
            numel: number of elements.
        """
        begin, end = self.start + start, self.start + start + numel
        if not self.owned:
            yield Piece(begin, numel, 0)
            return
        done = begin
        while done < end:
            place, inside = divmod(done, self.matrix)
            count = min(self.matrix - inside, end - done)
            yield Piece(self.owned[place] * self.matrix + inside, count, done - begin)
            done += count


def untiled_positions(numels: Mapping[str, int], owned: OwnedGeometry | None = None) -> dict[str, UntiledPosition]:
    """Position of each parameter in the network without tiles; a parameter that is not a tile keeps its name.

    Args:
        numels: number of elements of every parameter of a network.
        owned: the relations of the network's rank; None if it has all.
    """
    tiles: dict[tuple[str, str], list[tuple[int, str]]] = {}
    positions = {}
    for name in numels:
        match = _TILE.fullmatch(name)
        if match is None:
            positions[name] = UntiledPosition(name, 0)
        else:
            tiles.setdefault((match[1], match[3]), []).append((int(match[2]), name))
    for (prefix, role), known in tiles.items():
        relations = owned.owned if owned is not None and role in _RELATION_TABLES else ()
        matrix = sum(numels[name] for _, name in known) // len(relations) if relations else 0
        start = 0
        for _, name in sorted(known):
            positions[name] = UntiledPosition(f"{prefix}.0.{role}", start, matrix, relations)
            start += numels[name]
    return positions


def untiled_numels(numels: Mapping[str, int], owned: OwnedGeometry | None = None) -> dict[str, int]:
    """Number of elements of every parameter of the network without tiles, with all relations."""
    totals: dict[str, int] = {}
    for name, position in untiled_positions(numels, owned).items():
        end = position.start + numels[name]
        if owned is not None and position.owned:
            end = position.matrix * owned.whole.relations
        totals[position.name] = max(totals.get(position.name, 0), end)
    return totals
