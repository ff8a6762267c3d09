"""Ranks that share out relations compute what one process does, and send the bytes that the planner says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import run_ranks_of
from programs import relation_ranks as program
from programs.relation_ranks import BATCH, CASES, DIM, HEADS

from translution.models import AlphaTranslution
from translution.planner.config import deal_relations
from translution.planner.config.geometry import RelationGeometry
from translution.planner.costs.relation_traffic import layer_relation_traffic

TOLERANCE = 1e-12
"""Largest difference in float64, relative to the largest value."""
ERRORS = {
    "does not divide": "relation_ranks: 3 is not allowed: must divide the number of ranks 4",
    "exceeds the relations": "relation_group: 4 ranks are not allowed: must be at most the number of relations 3",
    "owner": "relation_owners: 4 of relation 4 is not allowed: must be below 4",
    "owns nothing": "relation_owners: rank 1 without a relation is not allowed: must own at least one",
    "length": "relation_owners: 1 entries are not allowed: must be 5, one per relation",
    "no group": "relation_owners: owners without relation_group are not allowed: give both or neither",
    "naive": "implementation: 'naive' is not allowed: must be another one with relation_group",
    "vmap": "relation_group: a transform of torch.func is not allowed: it cannot follow other ranks",
    "table": "table: 'query' is not allowed: no rank of a relation group has a whole table",
    # The first rank owns three of nine relations.
    "state": "tables.logit_tiles: a key table of shape (3, 6, 6) is not allowed: must be (9, 6, 6)",
}


@pytest.mark.ranks
def test_ranks_that_share_out_relations_equal_one_process(tmp_path: Path) -> None:
    """One start of four ranks serves all checks."""
    run_ranks_of([program.__file__, tmp_path], 4, tmp_path / "log")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert_layers_equal(ranks)
    assert_networks_equal(ranks)
    for found in ranks:  # The output, and the gradient of the rows.
        differences = found["2 x 2 ranks: dropout"]["differences"]
        assert len(differences) == 2 and max(differences.values()) <= TOLERANCE
    assert_bytes_are_predicted(ranks)
    assert ranks[0]["errors"] == ERRORS
    assert ranks[3]["text"].strip() == "rank 3 of 4, 2 of 9 relations"
    assert all(rank["errors"].keys() == ERRORS.keys() for rank in ranks)


def assert_layers_equal(ranks: list[dict[str, Any]]) -> None:
    for relation_ranks in (4, 2):
        for name, (_, options) in CASES.items():
            for rank, found in enumerate(ranks):
                differences = found[f"{relation_ranks} ranks: {name}"]["differences"]
                # Initial values, a copy, the output and the gradient of the rows; the first rank compares all weights.
                least = 3 if "fixed_rows" in options else 4
                assert len(differences) >= least + (2 if rank % relation_ranks == 0 else 0), name
                tolerance = 2**-6 if "autocast" in options else TOLERANCE
                assert all(value <= tolerance for value in differences.values()), (name, rank, differences)


def assert_networks_equal(ranks: list[dict[str, Any]]) -> None:
    for name in ("4 ranks: network", "2 ranks: network", "2 x 2 ranks: network"):
        found = [rank[name]["differences"] for rank in ranks]
        assert len(found[0]) > 20  # All parameters, and the norm of the gradients in each step.
        assert all({"norm 0", "norm 1", "norm 2"} <= differences.keys() for differences in found)
        assert all(value <= TOLERANCE for differences in found for value in differences.values()), (name, found)


def assert_bytes_are_predicted(ranks: list[dict[str, Any]]) -> None:
    for relation_ranks in (4, 2):
        for name, (kind, options) in CASES.items():
            if {"checkpointing", "fixed_rows"} & options.keys():
                continue  # More, and less: the formula is for a step without them.
            sent = [found[f"{relation_ranks} ranks: {name}"]["sent"] for found in ranks]
            expected = [predicted_bytes(kind, options, relation_ranks, rank % relation_ranks) for rank in range(4)]
            assert sent == expected, name
            assert all(sent)


def geometry_of(options: dict[str, Any]) -> RelationGeometry:
    given = {name: options[name] for name in ("causal", "window") if name in options}
    if "length" in options:
        return RelationGeometry.sequence(options["length"], **given)
    return RelationGeometry.grid(*options["grid"], class_token=options.get("class_token", False), **given)


def predicted_bytes(kind: type[Any], options: dict[str, Any], ranks: int, rank: int) -> int:
    geometry, roles = geometry_of(options), options.get("roles", "qkv")
    coupled = bool({"q", "k"} & set(roles))
    if kind is AlphaTranslution:
        own, output = HEADS * options["c1"], HEADS * options["c2"]
        moved = [own if role in roles else output for role in "qkv" if role in roles or (coupled and role in "qk")]
    else:
        moved, output = [DIM, *([DIM] if len({"q", "k"} & set(roles)) == 1 else [])], DIM
    turned = tuple(relation % ranks for relation in reversed(range(geometry.relations)))
    return layer_relation_traffic(
        geometry,
        ranks=ranks,
        rank=rank,
        batch=BATCH,
        heads=HEADS,
        moved_widths=moved,
        output_width=output if "v" in roles else 0,
        has_logits=coupled,
        dropout="dropout" in options,
        value_bytes=2 if "autocast" in options else 8,
        owners=turned if "owners" in options else deal_relations(geometry, ranks),
    ).total
