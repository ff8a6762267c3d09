"""Strided blocks of the pairs of each relation, compared with the definition pair by pair."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from translution.models.ops.context import missing_pairs
from translution.planner.common.errors import InputError
from translution.planner.config.geometry import RelationGeometry, RelationPairs, TokenBlock


def geometries() -> st.SearchStrategy[RelationGeometry]:
    size, length = st.integers(1, 5), st.integers(1, 9)
    window = st.one_of(st.none(), st.integers(0, 9))
    return st.one_of(
        st.builds(lambda n, c, w: RelationGeometry.sequence(n, causal=c, window=w), length, st.booleans(), window),
        st.builds(
            lambda h, w, c, r: RelationGeometry.grid(h, w, class_token=c, window=r), size, size, st.booleans(), window
        ),
    )


def token(block: TokenBlock, row: int, col: int) -> int:
    row, col = min(row, block.rows - 1), min(col, block.cols - 1)
    return block.start + row * block.row_stride + col * block.col_stride


def listed(pairs: RelationPairs) -> Iterator[tuple[int, int]]:
    for row in range(pairs.rows):
        for col in range(pairs.cols):
            yield token(pairs.query, row, col), token(pairs.key, row, col)


@given(geometries())
def test_blocks_list_exactly_the_pairs_of_their_relation(geometry: RelationGeometry) -> None:
    expected: dict[int, set[tuple[int, int]]] = {r: set() for r in range(geometry.relations)}
    for i in range(geometry.tokens):
        for j in range(geometry.tokens):
            relation = geometry.relation(i, j)
            if relation is not None:
                expected[relation].add((i, j))
    for relation, pairs in expected.items():
        found = list(listed(geometry.pairs(relation)))
        assert len(found) == geometry.pairs(relation).count == len(pairs)
        assert set(found) == pairs
    assert geometry.total_pairs == sum(len(pairs) for pairs in expected.values())


@given(geometries())
def test_table_rows_count_the_distinct_tokens_of_queries_and_keys(geometry: RelationGeometry) -> None:
    pairs = [geometry.pairs(relation) for relation in range(geometry.relations)]
    assert geometry.table_rows == sum(p.query.size for p in pairs) == sum(p.key.size for p in pairs)


@given(geometries())
def test_reverse_is_the_relation_of_the_reversed_pair(geometry: RelationGeometry) -> None:
    for i in range(geometry.tokens):
        for j in range(geometry.tokens):
            relation, back = geometry.relation(i, j), geometry.relation(j, i)
            if relation is not None and back is not None:
                assert geometry.reverse(relation) == back
    for relation in range(geometry.relations):
        assert geometry.reverse(geometry.reverse(relation)) == relation


@given(geometries())
def test_the_mask_of_missing_pairs_follows_the_relations(geometry: RelationGeometry) -> None:
    tokens = range(geometry.tokens)
    expected = [[geometry.relation(i, j) is None for j in tokens] for i in tokens]
    assert missing_pairs(geometry, torch.device("cpu")).tolist() == expected
    assert geometry.complete == (not any(map(any, expected)))


def test_a_window_shrinks_the_tables() -> None:
    assert RelationGeometry.grid(14, 14, class_token=True, window=1).relations == 9 + 3
    assert RelationGeometry.sequence(100, causal=True, window=7).relations == 8
    with pytest.raises(InputError, match="window: -1 is not allowed"):
        RelationGeometry.sequence(5, window=-1)


def test_relation_counts_follow_the_definition() -> None:
    assert RelationGeometry.sequence(7).relations == 13
    assert RelationGeometry.sequence(7, causal=True).relations == 7
    assert RelationGeometry.grid(3, 4).relations == 35
    assert RelationGeometry.grid(14, 14, class_token=True).relations == 27 * 27 + 3


@pytest.mark.parametrize("length", [0, -1, 2.5, True])
def test_the_error_for_a_bad_length_names_it(length: object) -> None:
    with pytest.raises(InputError, match=r"height|length"):
        RelationGeometry.sequence(length)  # type: ignore[arg-type]  # the test passes bad lengths


def test_the_error_for_an_absent_relation_names_it() -> None:
    with pytest.raises(InputError, match="relation: 9 is not allowed: must be from 0 to 8"):
        RelationGeometry.grid(2, 2).pairs(9)
