"""Index lists of the pairs of several relations at a time, for the batched operator.

The lists depend only on the geometry and are cached, so only the first call builds them.

Legend of shapes: p pairs of a chunk, t tokens that have a pair in the chunk, l maximum number of pairs
of one token, n tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from translution.planner.config import RelationGeometry

from .context import relation_index


@dataclass(frozen=True, eq=False)
class Slots:
    """The pairs of each token in a chunk, padded to equal length, so that sums over them need no atomics.

    Atomic additions run in a different order every time, which makes rounding errors irreproducible.
    """

    tokens: Tensor
    """(t,): tokens that have a pair in the chunk, each once."""
    pairs: Tensor
    """(t·l,): pair numbers of each token, padded with p, the index of a row of zeros."""


@dataclass(frozen=True, eq=False)
class PairChunk:
    """The pairs of consecutive relations between patches, sorted by relation."""

    first: int
    """First relation of the chunk."""
    counts: tuple[int, ...]
    """Number of pairs of each relation."""
    ends: Tensor
    """(relations,), int32: index after the last pair of each relation."""
    query: Tensor
    """(p + 1,): query token of each pair; the last entry belongs to the row of zeros."""
    key: Tensor
    """(p + 1,): key token of each pair; the last entry belongs to the row of zeros."""
    positions: Tensor
    """(p,): position of each pair in a flattened (n, n) matrix."""
    query_slots: Slots
    """Pairs of each query token."""
    key_slots: Slots
    """Pairs of each key token."""

    @property
    def pairs(self) -> int:
        """Number of pairs, p."""
        return len(self.positions)

    def relations(self, first: int) -> slice:
        """Return the chunk's relations as a slice of a tile that begins with relation ``first``."""
        return slice(self.first - first, self.first - first + len(self.counts))


@lru_cache(maxsize=16)
def sorted_pairs(geometry: RelationGeometry) -> tuple[Tensor, list[int]]:
    """Return the positions of all existing pairs, sorted by relation, and the R + 1 bounds of the relations."""
    index = relation_index(geometry, torch.device("cpu")).flatten()
    order = index.argsort(stable=True)
    counts = torch.bincount(index[index >= 0], minlength=geometry.relations)
    missing = int((index < 0).sum())
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return order[missing:], starts.tolist()


def _make_slots(tokens: Tensor, device: torch.device) -> Slots:
    """Group the pairs by their token, (p,)."""
    order = tokens.argsort(stable=True)
    found, counts = torch.unique_consecutive(tokens[order], return_counts=True)
    begins = counts.cumsum(0) - counts
    within = torch.arange(len(tokens)) - begins.repeat_interleave(counts)
    table = torch.full((len(found), int(counts.max())), len(tokens))
    table[torch.arange(len(found)).repeat_interleave(counts), within] = order
    return Slots(found.to(device), table.flatten().to(device))


def _make_chunk(geometry: RelationGeometry, first: int, count: int, device: torch.device) -> PairChunk:
    order, starts = sorted_pairs(geometry)
    begin, end = starts[first], starts[first + count]
    positions = order[begin:end]
    query, key = positions // geometry.tokens, positions % geometry.tokens
    ends = torch.tensor([starts[first + n + 1] - begin for n in range(count)], dtype=torch.int32)
    return PairChunk(
        first,
        tuple(starts[first + n + 1] - starts[first + n] for n in range(count)),
        ends.to(device),
        torch.nn.functional.pad(query, (0, 1)).to(device),
        torch.nn.functional.pad(key, (0, 1)).to(device),
        positions.to(device),
        _make_slots(query, device),
        _make_slots(key, device),
    )


def _balanced_chunks(geometry: RelationGeometry, first: int, count: int, device: torch.device) -> list[PairChunk]:
    """Return one chunk, or split it in halves until at most half of its slots are padding."""
    chunk = _make_chunk(geometry, first, count, device)
    slots = max(len(chunk.query_slots.pairs), len(chunk.key_slots.pairs))
    if count == 1 or slots <= 2 * chunk.pairs:
        return [chunk]
    half = count // 2
    left = _balanced_chunks(geometry, first, half, device)
    return left + _balanced_chunks(geometry, first + half, count - half, device)


@lru_cache(maxsize=4096)
def cut_tile(
    geometry: RelationGeometry, first: int, count: int, max_pairs: int, device: torch.device
) -> tuple[tuple[PairChunk, ...], tuple[int, ...]]:
    """Cut a tile's relations into chunks.

    Args:
        geometry: arrangement of the tokens.
        first: first relation of the tile.
        count: number of relations in the tile.
        max_pairs: maximum number of pairs in a chunk.
        device: device of the index lists.

    Returns:
        The chunks, and the relations outside every chunk: those with the class token, which multiply
        the rows of a single token, and those with more than ``max_pairs`` pairs.
    """
    _, starts = sorted_pairs(geometry)
    chunks: list[PairChunk] = []
    leftover: list[int] = []
    begin = first
    for relation in range(first, first + count + 1):
        ends = relation == first + count
        single = not ends and (relation >= geometry.offsets or starts[relation + 1] - starts[relation] > max_pairs)
        if ends or single or starts[relation + 1] - starts[begin] > max_pairs:
            if relation > begin:
                chunks += _balanced_chunks(geometry, begin, relation - begin, device)
            begin = relation
        if single:
            leftover.append(relation)
            begin = relation + 1
    return tuple(chunks), tuple(leftover)
