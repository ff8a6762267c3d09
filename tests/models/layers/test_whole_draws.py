"""Ranks that own relations draw the values that one process with all relations draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from translution.models.layers.tables import ROLE_NAMES, RelationTables
from translution.models.layers.whole_draws import WholeDraws, whole_tiles
from translution.planner.config.geometry import RelationGeometry
from translution.planner.config.parallel import deal_relations, owned_geometry

GEOMETRY = RelationGeometry.grid(3, 2, class_token=True)


@pytest.mark.parametrize("tile", [None, 4, 1])
@pytest.mark.parametrize("roles", ["qkv", "v", "q"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_owned_tables_have_the_values_of_whole_ones_and_leave_torch_in_the_same_state(
    ranks: int, roles: str, tile: int | None
) -> None:
    options: dict[str, Any] = {"roles": roles, "scale": 1.0, "tile_relations": tile}
    torch.manual_seed(3)
    whole = RelationTables(GEOMETRY, 1, 2, 5, **options)
    after = torch.rand(1)
    for rank in range(ranks):
        owned = owned_geometry(GEOMETRY, deal_relations(GEOMETRY, ranks), rank)
        torch.manual_seed(3)
        draws = WholeDraws(whole_tiles(GEOMETRY, roles, tile))

        def fill(weight: Tensor, role: str, first: int) -> None:
            draws.fill(weight, role, owned.owned[first : first + len(weight)])  # noqa: B023  # called in this pass

        tables = RelationTables(owned, 1, 2, 5, **options, fill=fill)
        draws.finish()
        assert torch.equal(torch.rand(1), after)
        expected, found = whole.stored_tables(), tables.stored_tables()
        assert set(found) == {ROLE_NAMES[role] for role in roles}
        for role, table in found.items():
            assert torch.equal(table, expected[role][list(owned.owned)])


def test_tables_without_values_draw_nothing() -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    draws = WholeDraws(whole_tiles(GEOMETRY, "qkv", 2))
    draws.fill(torch.empty(2, 2, 5, device="meta"), "key", (0, 3))
    draws.finish()
    assert torch.equal(torch.get_rng_state(), before)
