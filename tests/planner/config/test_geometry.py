"""Strided blocks of the pairs of each relation, compared with the definition pair by pair."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from translution.models.ops.context import missing_pairs
from translution.planner.common.errors import InputError
from translution.planner.config.geometry import RelationGeometry, RelationPairs, TokenBlock


@st.composite
def grids(draw: st.DrawFn) -> RelationGeometry:
    axes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4).filter(lambda axes: prod(axes) <= 40))
    reach = st.one_of(st.none(), st.integers(0, 6))
    window = draw(st.one_of(reach, st.tuples(*(reach for _ in axes))))
    return RelationGeometry.grid(*axes, class_token=draw(st.booleans()), causal=draw(st.booleans()), window=window)


def geometries() -> st.SearchStrategy[RelationGeometry]:
    length, window = st.integers(1, 9), st.one_of(st.none(), st.integers(0, 9))
    return st.one_of(
        st.builds(lambda n, c, w: RelationGeometry.sequence(n, causal=c, window=w), length, st.booleans(), window),
        grids(),
    )


def token(block: TokenBlock, place: tuple[int, ...]) -> int:
    inside = zip(place, block.shape, block.strides, strict=True)
    return block.start + sum(min(index, extent - 1) * stride for index, extent, stride in inside)


def listed(pairs: RelationPairs) -> Iterator[tuple[int, int]]:
    for place in product(*map(range, pairs.shape)):
        yield token(pairs.query, place), token(pairs.key, place)


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
    assert geometry.table_rows("q") == sum(p.query.size for p in pairs)
    assert geometry.table_rows("k") == geometry.table_rows("v") == sum(p.key.size for p in pairs)


@given(geometries())
def test_reverse_is_the_relation_of_the_reversed_pair(geometry: RelationGeometry) -> None:
    for i in range(geometry.tokens):
        for j in range(geometry.tokens):
            relation, back = geometry.relation(i, j), geometry.relation(j, i)
            if geometry.causal and relation is not None:
                assert geometry.reverse(relation) == relation
            elif relation is not None and back is not None:
                assert geometry.reverse(relation) == back
    for relation in range(geometry.relations):
        assert geometry.reverse(geometry.reverse(relation)) == relation


@given(geometries())
def test_the_mask_of_missing_pairs_follows_the_relations(geometry: RelationGeometry) -> None:
    tokens = range(geometry.tokens)
    expected = [[geometry.relation(i, j) is None for j in tokens] for i in tokens]
    assert missing_pairs(geometry, torch.device("cpu")).tolist() == expected
    assert geometry.complete == (not any(map(any, expected)))


@given(grids())
def test_offsets_of_a_grid_are_differences_of_places(geometry: RelationGeometry) -> None:
    places = list(product(*map(range, geometry.axes)))
    first = int(geometry.class_token)
    windows = geometry.window if isinstance(geometry.window, tuple) else (geometry.window,) * len(geometry.axes)
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            offset = tuple(a - b for a, b in zip(query, key, strict=True))
            near = all(w is None or abs(step) <= w for step, w in zip(offset, windows, strict=True))
            relation = geometry.relation(first + i, first + j)
            assert (relation is not None) == (near and not (geometry.causal and offset[0] < 0))
            if relation is not None:
                assert geometry.offset(relation) == offset


def test_a_class_token_of_a_causal_clip_sees_all_and_is_seen_by_none() -> None:
    geometry = RelationGeometry.grid(2, 2, 2, class_token=True, causal=True)
    assert geometry.relations == 2 * 3 * 3 + 2
    assert all(geometry.relation(0, token) is not None for token in range(9))
    assert all(geometry.relation(token, 0) is None for token in range(1, 9))
    assert geometry.relation(1, 4) is not None
    assert geometry.relation(1, 5) is None


def test_a_window_shrinks_the_tables() -> None:
    assert RelationGeometry.grid(14, 14, class_token=True, window=1).relations == 9 + 3
    assert RelationGeometry.sequence(100, causal=True, window=7).relations == 8
    with pytest.raises(InputError, match="window: -1 is not allowed"):
        RelationGeometry.sequence(5, window=-1)


def test_relation_counts_follow_the_definition() -> None:
    assert RelationGeometry.sequence(7).relations == 13
    assert RelationGeometry.sequence(7, causal=True).relations == 7
    assert RelationGeometry.grid(3, 4).relations == 35
    assert RelationGeometry.grid(3, 4, 5).relations == 5 * 7 * 9
    assert RelationGeometry.grid(8, 14, 14, causal=True, window=(None, 3, 3)).relations == 8 * 7 * 7
    assert RelationGeometry.grid(14, 14, class_token=True).relations == 27 * 27 + 3


@pytest.mark.parametrize("length", [0, -1, 2.5, True])
def test_the_error_for_a_bad_length_names_it(length: object) -> None:
    with pytest.raises(InputError, match="length"):
        RelationGeometry.sequence(length)  # type: ignore[arg-type]  # the test passes bad lengths


def test_a_window_for_other_axes_is_refused() -> None:
    with pytest.raises(InputError, match=r"window: \(1, 2\) is not allowed: must be one number, or one for each of 3"):
        RelationGeometry.grid(2, 2, 2, window=(1, 2))
    with pytest.raises(InputError, match=r"grid: \(\) is not allowed: must have at least one axis"):
        RelationGeometry.grid()


def test_the_error_for_an_absent_relation_names_it() -> None:
    with pytest.raises(InputError, match="relation: 9 is not allowed: must be from 0 to 8"):
        RelationGeometry.grid(2, 2).pairs(9)
