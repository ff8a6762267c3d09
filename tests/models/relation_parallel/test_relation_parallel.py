"""Ranks that share out relations compute what one process does, and send the bytes that the planner says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import run_ranks_of
from programs.relation_ranks import BATCH, CASES, DIM, HEADS
from programs import relation_ranks as program
from pytest import TempPathFactory

from translution.models import AlphaTranslution
from translution.planner.config import deal_relations
from translution.planner.config.geometry import RelationGeometry
from translution.planner.costs.relation_traffic import layer_relation_traffic

Results = list[dict[str, Any]]
TOLERANCE = 1e-12
"""Largest difference in float64, relative to the largest value."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: TempPathFactory) -> Results:
    """What each of four ranks found: one start of ranks serves all tests."""
    out = tmp_path_factory.mktemp("relation_ranks")
    run_ranks_of([program.__file__, out], 4, out / "log")
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("relation_ranks", [4, 2])
def test_a_layer_equals_that_of_one_process(ranks: Results, relation_ranks: int, name: str) -> None:
    for rank, found in enumerate(ranks):
        differences = found[f"{relation_ranks} ranks: {name}"]["differences"]
        # The output and the gradient of the rows; the first rank of each group compares the weights of all.
        fixed = "fixed_rows" in CASES[name][1]
        assert len(differences) >= (2 if fixed else 3) + (2 if rank % relation_ranks == 0 else 0)
        assert all(value <= TOLERANCE for value in differences.values()), (rank, differences)


@pytest.mark.parametrize("name", ["4 ranks: network", "2 ranks: network", "2 x 2 ranks: network"])
def test_three_steps_of_a_plain_loop_equal_those_of_one_process(ranks: Results, name: str) -> None:
    found = [rank[name]["differences"] for rank in ranks]
    assert len(found[0]) > 20  # All parameters, and the norm of the gradients in each step.
    assert all({"norm 0", "norm 1", "norm 2"} <= differences.keys() for differences in found)
    assert all(value <= TOLERANCE for differences in found for value in differences.values()), found


def geometry(options: dict[str, Any]) -> RelationGeometry:
    given = {name: options[name] for name in ("causal", "window") if name in options}
    if "length" in options:
        return RelationGeometry.sequence(options["length"], **given)
    return RelationGeometry.grid(*options["grid"], class_token=options.get("class_token", False), **given)


@pytest.mark.parametrize("name", [name for name in CASES if not {"checkpointing", "fixed_rows"} & CASES[name][1].keys()])
@pytest.mark.parametrize("relation_ranks", [4, 2])
def test_the_bytes_sent_are_those_of_the_planner(ranks: Results, relation_ranks: int, name: str) -> None:
    kind, options = CASES[name]
    roles = options.get("roles", "qkv")
    coupled = bool({"q", "k"} & set(roles))
    inner = HEADS * options.get("head_dim", DIM // HEADS)
    if kind is AlphaTranslution:
        own, output = HEADS * options["c1"], HEADS * options["c2"]
        moved = [own if role in roles else output for role in "qkv" if role in roles or (coupled and role in "qk")]
    else:
        moved, output = [DIM, *([inner] if len({"q", "k"} & set(roles)) == 1 else [])], inner
    for rank, found in enumerate(ranks):
        owners = deal_relations(geometry(options), relation_ranks)
        if "owners" in options:
            owners = tuple(r % relation_ranks for r in reversed(range(geometry(options).relations)))
        traffic = layer_relation_traffic(
            geometry(options),
            ranks=relation_ranks,
            rank=rank % relation_ranks,
            batch=BATCH,
            heads=HEADS,
            moved_widths=moved,
            output_width=output if "v" in roles else 0,
            has_logits=coupled,
            dropout="dropout" in options,
            value_bytes=8,
            owners=owners,
        )
        assert found[f"{relation_ranks} ranks: {name}"]["sent"] == traffic.total > 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("does not divide", "relation_ranks: 3 is not allowed: must divide the number of ranks 4"),
        (
            "exceeds the relations",
            "relation_group: 4 ranks are not allowed: must be at most the number of relations 3",
        ),
        ("owner", "relation_owners: 4 of relation 4 is not allowed: must be below 4"),
        ("owns nothing", "relation_owners: rank 1 without a relation is not allowed: must own at least one"),
        ("length", "relation_owners: 1 entries are not allowed: must be 5, one per relation"),
        ("no group", "relation_owners: owners without relation_group are not allowed: give both or neither"),
        ("naive", "implementation: 'naive' is not allowed: must be another one with relation_group"),
        ("vmap", "relation_group: a transform of torch.func is not allowed: it cannot follow other ranks"),
        ("table", "table: 'query' is not allowed: no rank of a relation group has a whole table"),
    ],
)
def test_a_wrong_call_gets_one_line(ranks: Results, name: str, text: str) -> None:
    assert [found["errors"][name] for found in ranks] == [text] * 4


def test_a_state_dict_of_one_rank_is_not_taken_for_a_whole_one(ranks: Results) -> None:
    assert "a key table of shape" in ranks[0]["errors"]["state"]
    assert "is not allowed: must be (9, 6, 6)" in ranks[0]["errors"]["state"]
