"""Bytes that ranks send: real ranks are counted in tests/models/relation_parallel/test_training.py."""

from __future__ import annotations

from typing import Any

import pytest

from translution.planner.common.errors import InputError
from translution.planner.config import load_model, parse_model_spec
from translution.planner.costs.relation_traffic import relation_parallel_traffic, zero3_table_traffic

BASE = load_model("vit-base/16")


@pytest.mark.parametrize(
    ("batch", "ranks", "gigabytes"),
    [
        (1, 8, 0.13),
        (8, 8, 1.0),
        (32, 8, 4.1),
        (80, 8, 10.2),
        (1, 64, 1.1),
        (8, 64, 9.2),
        (32, 64, 36.6),
        (80, 64, 91.5),
    ],
)
def test_rows_of_five_passes_travel(batch: int, ranks: int, gigabytes: float) -> None:
    rows = relation_parallel_traffic(BASE, ranks=ranks, batch=batch).rows
    assert rows == 12 * 5 * (ranks - 1) * batch * 197 * 768 * 2
    assert rows / 1e9 == pytest.approx(gigabytes, abs=0.06)


def test_pairs_travel_four_times() -> None:
    """All ranks together send every value that is not their own, twice to owners and twice back."""
    sent = sum(relation_parallel_traffic(BASE, ranks=8, batch=3, rank=rank).pairs for rank in range(8))
    assert sent == 12 * 4 * 3 * 12 * 197**2 * 2 * 7


def test_zero3_moves_every_table_three_times() -> None:
    assert zero3_table_traffic(BASE, ranks=8) / 1e9 == pytest.approx(81.6, abs=0.05)
    assert zero3_table_traffic(BASE, ranks=64) / 1e9 == pytest.approx(91.8, abs=0.05)


def model(**options: Any) -> Any:
    sizes = {"family": "vit", "image": 8, "patch": 4, "channels": 1, "classes": 2, "dim": 8, "depth": 2, "heads": 2}
    return parse_model_spec(sizes | options)


@pytest.mark.parametrize(
    ("options", "widths", "pair_passes"),
    [
        ({}, 3 * 8 + 2 * 8, 4),
        ({"roles": "qk"}, 3 * 8, 2),
        ({"roles": "v"}, 3 * 8 + 2 * 8, 2),
        ({"roles": "kv", "head_dim": 3}, 3 * (8 + 6) + 2 * 6, 4),
        ({"operator": "alpha", "c1": 2, "c2": 3}, 3 * 3 * 4 + 2 * 6, 4),
        ({"operator": "alpha", "c1": 2, "c2": 3, "roles": "q"}, 3 * (4 + 6), 2),
        ({"operator": "alpha", "c1": 2, "c2": 3, "roles": "v"}, 3 * 4 + 2 * 6, 2),
        ({"operator": "shaw"}, 0, 0),
    ],
    ids=str,
)
def test_only_relative_roles_travel(options: dict[str, Any], widths: int, pair_passes: int) -> None:
    parts = [
        relation_parallel_traffic(model(**options), ranks=2, batch=3, value_bytes=4, rank=rank) for rank in range(2)
    ]
    assert [part.rows for part in parts] == [2 * 3 * 5 * widths * 4] * 2
    assert sum(part.pairs for part in parts) == 2 * 3 * 2 * 25 * pair_passes * 4
    assert all(part.seeds == 0 for part in parts)


def test_seeds_of_dropout_travel_and_plain_layers_send_nothing() -> None:
    found = relation_parallel_traffic(
        model(dropout=0.1, relative_layers="first:1", other_layers="attention"), ranks=4, batch=3
    )
    full = relation_parallel_traffic(model(dropout=0.1), ranks=4, batch=3)
    assert (found.seeds, full.seeds) == (8 * 3, 2 * 8 * 3)
    assert full.rows == 2 * found.rows
    assert found.total == found.rows + found.pairs + found.seeds


def test_a_wrong_rank_and_too_many_ranks_are_named() -> None:
    with pytest.raises(InputError, match="rank: 2 is not allowed: must be from 0 to 1"):
        relation_parallel_traffic(model(), ranks=2, batch=1, rank=2)
    with pytest.raises(
        InputError, match="relation ranks: 13 is not allowed: must be from 1 to the number of relations 12"
    ):
        relation_parallel_traffic(model(), ranks=13, batch=1)
