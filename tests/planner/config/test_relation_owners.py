"""Relations that are dealt to ranks, and the pairs of one rank."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from translution.models.ops.context import relation_index
from translution.planner.common.errors import InputError
from translution.planner.config.geometry import RelationGeometry
from translution.planner.config.relation_owners import OwnedGeometry, deal_relations, owned_geometry

GEOMETRIES = [
    RelationGeometry.sequence(7),
    RelationGeometry.sequence(7, causal=True, window=3),
    RelationGeometry.grid(3, 4, class_token=True),
    RelationGeometry.grid(2, 3, 2, class_token=True, causal=True, window=(None, 1, 0)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_pair_has_one_owner(geometry: RelationGeometry) -> None:
    owners = deal_relations(geometry, 3)
    parts = [owned_geometry(geometry, owners, rank) for rank in range(3)]
    assert sum(part.total_pairs for part in parts) == geometry.total_pairs
    whole = relation_index(geometry, torch.device("cpu"))
    for part in parts:
        index = relation_index(part, torch.device("cpu"))
        for i in range(geometry.tokens):
            for j in range(geometry.tokens):
                found, number = part.relation(i, j), int(whole[i, j])
                assert int(index[i, j]) == (-1 if found is None else found)
                assert (found is not None) == (number in part.owned)
                assert found is None or part.owned[found] == number
        counts = Counter(index.flatten().tolist())
        for relation in range(part.relations):
            assert part.pairs(relation).count == counts[relation] > 0
        assert part.offsets == sum(relation < geometry.offsets for relation in part.owned)
        assert part.patch_pairs + sum(part.pairs(r).count for r in range(part.offsets, part.relations)) == len(
            index[index >= 0]
        )
    for role in "qkv":
        assert sum(part.table_rows(role) for part in parts) == geometry.table_rows(role)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(
    "geometry",
    [RelationGeometry.grid(14, 14, class_token=True), RelationGeometry.sequence(1024, causal=True)],
    ids=["images", "text"],
)
def test_ranks_have_as_many_relations_and_pairs(geometry: RelationGeometry, ranks: int) -> None:
    owners = deal_relations(geometry, ranks)
    relations = Counter(owners)
    assert max(relations.values()) - min(relations.values()) <= 1
    pairs = [owned_geometry(geometry, owners, rank).total_pairs for rank in range(ranks)]
    assert max(pairs) * ranks / geometry.total_pairs < 1.02


@pytest.mark.parametrize("ranks", [0, 6, 7])
def test_there_is_a_relation_for_every_rank(ranks: int) -> None:
    geometry = RelationGeometry.sequence(5, causal=True)
    with pytest.raises(InputError, match=f"relation ranks: {ranks} is not allowed: must be from 1 to the number of"):
        deal_relations(geometry, ranks)
    assert deal_relations(geometry, 5) == (0, 1, 2, 3, 4)


def test_one_rank_knows_no_reverse_of_its_relations() -> None:
    part = OwnedGeometry.of(RelationGeometry.sequence(3), (0, 2))
    with pytest.raises(InputError, match="relation: 0 is not allowed: one rank's relations have no reverse"):
        part.reverse(0)
    with pytest.raises(InputError, match="relation: 2 is not allowed: must be from 0 to 1"):
        part.pairs(2)
