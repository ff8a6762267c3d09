"""Lists of pairs, blocks of rows and chunks of relations for the fused kernels."""

from __future__ import annotations

import pytest
import torch

from translution.models.ops.fused.blocks import pair_lists, relation_chunks, row_blocks
from translution.planner.config.geometry import RelationGeometry

CPU = torch.device("cpu")
GEOMETRIES = [
    RelationGeometry.sequence(7, causal=True),
    RelationGeometry.grid(3, 4, class_token=True),
    RelationGeometry.grid(2, 3, 2, window=1),
]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_blocks_contain_every_row_of_every_relation_once(
    geometry: RelationGeometry, size: int | None, separate: bool
) -> None:
    batch, lists = 3, pair_lists(geometry, CPU)
    relations = tuple(range(2, geometry.relations))
    blocks = row_blocks(geometry, 2, relations, batch, size, separate, CPU)
    found = []
    for start, count in blocks.bounds:
        entries = blocks.entries[start : start + count].tolist()
        assert not separate or len({entry[0] for entry in entries}) == 1
        for relation, first, rows, pair in entries:
            for row in range(first, min(first + (size or rows), rows)):
                place = pair + row // batch
                found.append((relation + 2, int(lists.query[place]), int(lists.key[place]), row % batch))
    tokens = range(geometry.tokens)
    pairs = [(geometry.relation(i, j), i, j) for i in tokens for j in tokens]
    assert sorted(found) == sorted((r, i, j, s) for r, i, j in pairs if r is not None and r >= 2 for s in range(batch))
    rows_in_order = blocks.entries[:, 2].tolist()
    assert separate or rows_in_order == sorted(rows_in_order, reverse=True)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_chunks_hold_consecutive_relations_within_the_limits(geometry: RelationGeometry) -> None:
    relations = tuple(range(geometry.relations))
    counts = {relation: geometry.pairs(relation).count for relation in relations}
    chunks, leftover = relation_chunks(geometry, relations, 10)
    assert sorted([*leftover, *(r for chunk in chunks for r in chunk.relations)]) == list(relations)
    assert all(counts[relation] > 10 for relation in leftover)
    for chunk in chunks:
        assert chunk.relations == tuple(range(chunk.relations[0], chunk.relations[-1] + 1))
        assert chunk.first_pair == sum(counts[relation] for relation in range(chunk.relations[0]))
        assert chunk.pairs == sum(counts[relation] for relation in chunk.relations)
        assert chunk.pairs <= 10
