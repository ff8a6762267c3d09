"""Where the elements of a parameter lie in the flat vectors of ZeRO's ranks.

A *fragment* is a run of consecutive elements of one parameter within a rank's flat vector. Both sides of a reshard
are lists of fragments, so that any layout is read into any other.

Sources: DeepSpeed 0.19.8, runtime/zero/partition_parameters.py (a share is ceil(elements / ranks)) and
runtime/zero/stage3.py (a sub-group's vector is its parameters' shares, one after another, padding included).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_TILE = re.compile(r"(.*\.(?:logit_tiles|value_tiles|tables\.[qkv]))\.(\d+)\.(\w+)")


@dataclass(frozen=True, slots=True)
class Fragment:
    """Consecutive elements of a flattened parameter."""

    name: str
    start: int
    """The first of them, within the parameter."""
    numel: int
    offset: int
    """Where it lies within the flat vector."""


def sub_group_fragments(numels: Mapping[str, int], ranks: int, rank: int) -> list[Fragment]:
    """What a rank's vector of one ZeRO-3 sub-group holds; padding is in no fragment.

    Args:
        numels: elements of each parameter of the sub-group, in its order.
        ranks: over how many ranks each is cut.
        rank: whose vector.
    """
    fragments, offset = [], 0
    for name, numel in numels.items():
        share = -(-numel // ranks)
        start = min(rank * share, numel)
        count = min(start + share, numel) - start
        if count:
            fragments.append(Fragment(name, start, count, offset))
        offset += share
    return fragments


def successive_fragments(spans: Sequence[Mapping[str, tuple[int, int]]]) -> list[list[Fragment]]:
    """What each rank's vector holds under ZeRO-1 and 2, where one vector is cut, not every parameter.

    Args:
        spans: for each rank, the place within its vector and the number of elements of every parameter that it has
            a part of; a parameter's parts follow each other from rank to rank.
    """
    done: dict[str, int] = {}
    ranks = []
    for own in spans:
        fragments = []
        for name, (offset, numel) in own.items():
            start = done.get(name, 0)
            fragments.append(Fragment(name, start, numel, offset))
            done[name] = start + numel
        ranks.append(fragments)
    return ranks


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter begins within the parameter of an untiled network."""

    name: str
    start: int


def whole_places(numels: Mapping[str, int]) -> dict[str, Place]:
    """Where each parameter lies in a network whose tables are whole; only tiles move.

    Args:
        numels: elements of every parameter of a network.
    """
    tiles: dict[tuple[str, str], list[tuple[int, str]]] = {}
    places = {}
    for name in numels:
        match = _TILE.fullmatch(name)
        if match is None:
            places[name] = Place(name, 0)
        else:
            tiles.setdefault((match[1], match[3]), []).append((int(match[2]), name))
    for (prefix, role), known in tiles.items():
        start = 0
        for _, name in sorted(known):
            places[name] = Place(f"{prefix}.0.{role}", start)
            start += numels[name]
    return places


def whole_numels(numels: Mapping[str, int]) -> dict[str, int]:
    """Elements of every parameter of the network with whole tables."""
    totals: dict[str, int] = {}
    for name, place in whole_places(numels).items():
        totals[place.name] = max(totals.get(place.name, 0), place.start + numels[name])
    return totals
