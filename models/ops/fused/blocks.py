"""Lists of the work of the fused kernels: pairs by relation, and blocks of rows.

The rows of a relation are its pairs in all samples. The lists depend only on the geometry, the tile and the batch, and
are cached, so only the first call builds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from translution.planner.config import RelationGeometry

from ..pair_index import sorted_pairs


@dataclass(frozen=True, eq=False)
class PairLists:
    """Query and key token of every existing pair, sorted by relation, (ΣP,) int32 each."""

    query: Tensor
    key: Tensor


@lru_cache(maxsize=16)
def pair_lists(geometry: RelationGeometry, device: torch.device) -> PairLists:
    """Return the pairs of all relations on a device."""
    positions, _ = sorted_pairs(geometry)
    query, key = positions // geometry.tokens, positions % geometry.tokens
    return PairLists(query.to(device, torch.int32), key.to(device, torch.int32))


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """Blocks of rows of consecutive relations of a tile."""

    entries: Tensor
    """(blocks, 4) int32: relation within the tile, first row, rows of the relation, first pair in the lists."""
    bounds: tuple[tuple[int, int], ...]
    """Blocks that may run at the same time, each as first block and number of blocks."""


@lru_cache(maxsize=4096)
def row_blocks(
    geometry: RelationGeometry,
    tile: int,
    relations: tuple[int, ...],
    batch: int,
    size: int | None,
    separate: bool,
    device: torch.device,
) -> RowBlocks:
    """Cut the rows of relations into blocks.

    Args:
        geometry: arrangement of the tokens.
        tile: first relation of the tile.
        relations: the relations, of one tile.
        batch: number of samples.
        size: rows of a block; None takes each relation whole.
        separate: run one relation after the other; otherwise all blocks together, relations with most rows first.
        device: device of the list.
    """
    _, starts = sorted_pairs(geometry)
    rows = {relation: (starts[relation + 1] - starts[relation]) * batch for relation in relations}
    order = relations if separate else sorted(relations, key=lambda relation: -rows[relation])
    entries: list[tuple[int, int, int, int]] = []
    bounds: list[tuple[int, int]] = []
    for relation in order:
        begin = len(entries)
        for first in range(0, rows[relation], size or rows[relation]):
            entries.append((relation - tile, first, rows[relation], starts[relation]))
        bounds.append((begin, len(entries) - begin))
    listed = torch.tensor(entries, dtype=torch.int32).view(-1, 4).to(device)
    return RowBlocks(listed, tuple(bounds) if separate else ((0, len(entries)),))


@dataclass(frozen=True)
class RelationChunk:
    """Consecutive relations whose gradients are in the scratch memory at the same time."""

    relations: tuple[int, ...]
    first_pair: int
    """Number of the first pair among the pairs of all relations."""
    pairs: int


@lru_cache(maxsize=4096)
def relation_chunks(
    geometry: RelationGeometry, relations: tuple[int, ...], max_pairs: int
) -> tuple[tuple[RelationChunk, ...], tuple[int, ...]]:
    """Cut consecutive relations into chunks.

    Args:
        geometry: arrangement of the tokens.
        relations: consecutive relations of a tile.
        max_pairs: number of pairs that no chunk exceeds.

    Returns:
        The chunks, and the relations that are too large for one.
    """
    _, starts = sorted_pairs(geometry)
    chunks: list[RelationChunk] = []
    leftover: list[int] = []
    current: list[int] = []

    def close() -> None:
        if current:
            begin, end = starts[current[0]], starts[current[-1] + 1]
            chunks.append(RelationChunk(tuple(current), begin, end - begin))
            current.clear()

    for relation in relations:
        if starts[relation + 1] - starts[relation] > max_pairs:
            close()
            leftover.append(relation)
            continue
        if current and starts[relation + 1] - starts[current[0]] > max_pairs:
            close()
        current.append(relation)
    close()
    return tuple(chunks), tuple(leftover)
