"""Relations that are dealt to ranks, and the pairs of one rank."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from translution.models.ops.context import relation_index
from translution.planner.common.errors import InputError
from translution.planner.config.geometry import RelationGeometry
from translution.planner.config.loading import preset
from translution.planner.config.model import parse_model_spec
from translution.planner.config.parallel import OwnedGeometry, ParallelSpec, deal_relations, owned_geometry
from translution.planner.config.training import TrainingSpec
from translution.planner.hardware.cluster import load_cluster
from translution.planner.plans.build import make_plan
from translution.planner.plans.plan import load_plan

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


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        (3, {}, "relation_parallel: 3 is not allowed: must divide the number of ranks 8"),
        (
            8,
            {"image": [2, 1], "patch": 1, "operator": "alpha", "class_token": False, "pool": "mean"},
            "must be at most the number of relati",
        ),
        (2, {"operator": "shaw"}, "relation_parallel: 2 is not allowed: must be 1 for a model without relation tables"),
    ],
)
def test_a_group_that_the_run_cannot_have_is_refused(ranks: int, changes: dict[str, Any], message: str) -> None:
    model = {"family": "vit", "image": 16, "patch": 4, "channels": 1, "classes": 10, "dim": 16, "depth": 2, "heads": 2}
    spec, cluster = parse_model_spec(model | changes), load_cluster("8xH100")
    with pytest.raises(InputError, match=message):
        make_plan(spec, cluster, TrainingSpec(data="synthetic"), relation_parallel=ranks)


def test_nothing_but_deepspeed_trains_with_a_group() -> None:
    spec, cluster, training = preset("vit-tiny/56"), load_cluster("2x8xH100"), TrainingSpec(data="synthetic")
    with pytest.raises(InputError, match="relation_parallel: 2 is not allowed: must be 1 with FSDP2"):
        make_plan(spec, cluster, training, relation_parallel=2, engine="fsdp2")
    with pytest.raises(InputError, match="relation_parallel: 2 is not allowed: must be 1 with hpz_ranks: 8"):
        make_plan(spec, cluster, training, relation_parallel=2, zero_overrides={"hpz_ranks": 8})


def test_the_plan_stores_its_group(tmp_path: Path) -> None:
    spec = preset("vit-tiny/56")
    plan = make_plan(spec, load_cluster("8xH100"), TrainingSpec(data="synthetic"), relation_parallel=4)
    assert plan.run_config.replicas == 2
    plan.write(tmp_path / "plan")
    assert load_plan(tmp_path / "plan").parallel == ParallelSpec(relation=4)
    assert load_plan(tmp_path / "plan") == plan
