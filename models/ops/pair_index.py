"""Relations a few at a time, as index lists: what the batched operator works on.

The lists depend on the geometry alone and are kept, so no call waits for them.

Legend of shape suffixes: p pairs of a chunk, t tokens that have a pair in it, l most pairs of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from translution.planner.config.geometry import RelationGeometry

from .context import relation_index


@dataclass(frozen=True, eq=False)
class Slots:
    """Which pairs of a chunk a token has, so that sums over them need no atomics.

    Atomic additions come in another order every time, and so do their rounding errors.
    """

    tokens: Tensor
    """(t,), each once."""
    pairs: Tensor
    """(t·l,): numbers of the pairs of each token, filled up with p, the number of a row of zeros."""


@dataclass(frozen=True, eq=False)
class PairChunk:
    """The pairs of consecutive relations between patches, relation by relation."""

    first: int
    """First of its relations."""
    counts: tuple[int, ...]
    """Pairs of each relation."""
    ends: Tensor
    """(relations,), int32: where each relation's pairs end."""
    query: Tensor
    """(p + 1,): the query token of each pair; the last entry stands for the row of zeros."""
    key: Tensor
    """(p + 1,): the key token."""
    places: Tensor
    """(p,): where each pair lies in a flattened (n, n) matrix."""
    query_slots: Slots
    key_slots: Slots

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return len(self.places)

    def relations(self, first: int) -> slice:
        """The chunk's relations within a tile that begins with relation ``first``."""
        return slice(self.first - first, self.first - first + len(self.counts))


@lru_cache(maxsize=16)
def _sorted_places(geometry: RelationGeometry) -> tuple[Tensor, list[int]]:
    """Places of all pairs that exist, by relation; and where each relation begins, with the end."""
    index = relation_index(geometry, torch.device("cpu")).flatten()
    order = index.argsort(stable=True)
    counts = torch.bincount(index[index >= 0], minlength=geometry.relations)
    missing = int((index < 0).sum())
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return order[missing:], starts.tolist()


def _slots(tokens: Tensor, device: torch.device) -> Slots:
    order = tokens.argsort(stable=True)
    found, counts = torch.unique_consecutive(tokens[order], return_counts=True)
    begins = counts.cumsum(0) - counts
    within = torch.arange(len(tokens)) - begins.repeat_interleave(counts)
    table = torch.full((len(found), int(counts.max())), len(tokens))
    table[torch.arange(len(found)).repeat_interleave(counts), within] = order
    return Slots(found.to(device), table.flatten().to(device))


def _make(geometry: RelationGeometry, first: int, count: int, device: torch.device) -> PairChunk:
    order, starts = _sorted_places(geometry)
    begin, end = starts[first], starts[first + count]
    places = order[begin:end]
    query, key = places // geometry.tokens, places % geometry.tokens
    ends = torch.tensor([starts[first + n + 1] - begin for n in range(count)], dtype=torch.int32)
    return PairChunk(
        first,
        tuple(starts[first + n + 1] - starts[first + n] for n in range(count)),
        ends.to(device),
        torch.nn.functional.pad(query, (0, 1)).to(device),
        torch.nn.functional.pad(key, (0, 1)).to(device),
        places.to(device),
        _slots(query, device),
        _slots(key, device),
    )


def _cut(geometry: RelationGeometry, first: int, count: int, device: torch.device) -> list[PairChunk]:
    """A chunk, or its halves where tokens have so unequal numbers of pairs that half of the slots are idle."""
    chunk = _make(geometry, first, count, device)
    slots = max(len(chunk.query_slots.pairs), len(chunk.key_slots.pairs))
    if count == 1 or slots <= 2 * chunk.pairs:
        return [chunk]
    half = count // 2
    return _cut(geometry, first, half, device) + _cut(geometry, first + half, count - half, device)


@lru_cache(maxsize=4096)
def cut_tile(
    geometry: RelationGeometry, first: int, count: int, most_pairs: int, device: torch.device
) -> tuple[tuple[PairChunk, ...], tuple[int, ...]]:
    """Cut a tile's relations into chunks.

    Args:
        geometry: how the tokens lie.
        first: first relation of the tile.
        count: relations in it.
        most_pairs: pairs that a chunk may have.
        device: where the index lists are to lie.

    Returns:
        The chunks; and the relations that are in none: those with a class token, whose rows are
        one token's, and those with too many pairs.
    """
    _, starts = _sorted_places(geometry)
    chunks: list[PairChunk] = []
    others: list[int] = []
    begin = first
    for relation in range(first, first + count + 1):
        ends = relation == first + count
        single = not ends and (relation >= geometry.offsets or starts[relation + 1] - starts[relation] > most_pairs)
        if ends or single or starts[relation + 1] - starts[begin] > most_pairs:
            if relation > begin:
                chunks += _cut(geometry, begin, relation - begin, device)
            begin = relation
        if single:
            others.append(relation)
            begin = relation + 1
    return tuple(chunks), tuple(others)
