"""Positions of elements of tables that ranks share out, in the tables of the whole network."""

from __future__ import annotations

from helpers.chance import examples
from hypothesis import given
from hypothesis import strategies as st

from translution.distributed.checkpoint.shard_layout import untiled_numels, untiled_positions
from translution.planner.config.geometry import RelationGeometry
from translution.planner.config.parallel import deal_relations, owned_geometry
from translution.planner.costs.parameters import table_tiles

MATRIX = 3
"""Elements of a matrix."""
TABLE = "blocks.0.operator.tables.value_tiles.0.value"


@examples(30)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(1, 5), st.data())
def test_pieces_of_all_ranks_are_the_elements_of_the_whole_table(
    length: int, ranks: int, tile: int, data: st.DataObject
) -> None:
    geometry = RelationGeometry.sequence(length)
    ranks = min(ranks, geometry.relations)
    found: dict[int, tuple[int, int]] = {}
    for place in range(ranks):
        owned = owned_geometry(geometry, deal_relations(geometry, ranks), place)
        sizes = [size for size, copies in table_tiles(owned.relations, tile) for _ in range(copies)]
        numels = {f"blocks.0.operator.tables.value_tiles.{n}.value": size * MATRIX for n, size in enumerate(sizes)}
        numels["head.bias"] = 7
        positions = untiled_positions(numels, owned)
        assert untiled_numels(numels, owned) == {TABLE: geometry.relations * MATRIX, "head.bias": 7}
        assert [(piece.start, piece.numel) for piece in positions["head.bias"].pieces(2, 4)] == [(2, 4)]
        first = 0
        for name, size in list(numels.items())[:-1]:
            assert positions[name].name == TABLE
            cut = data.draw(st.integers(0, size))
            for start, numel in ((0, cut), (cut, size - cut)):
                pieces = list(positions[name].pieces(start, numel))
                assert [piece.shift for piece in pieces] == [
                    sum(p.numel for p in pieces[:n]) for n in range(len(pieces))
                ]
                for piece in pieces:
                    for step in range(piece.numel):
                        assert piece.start + step not in found
                        found[piece.start + step] = (place, first + start + piece.shift + step)
            first += size
    for element, (place, index) in found.items():
        owned = owned_geometry(geometry, deal_relations(geometry, ranks), place)
        assert divmod(element, MATRIX) == (owned.owned[index // MATRIX], index % MATRIX)
    assert len(found) == geometry.relations * MATRIX
