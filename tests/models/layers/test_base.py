"""What a layer says of itself."""

from __future__ import annotations

from typing import Any

import pytest

from translution.models import AbsoluteTranslution, SelfAttention, Translution


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            Translution(6, 2, grid=(3, 2), class_token=True, tile_relations=6, dropout=0.1),
            "Translution(\n  dim=6, heads=2, head_dim=3, grid=(3, 2), class_token=True, roles='qkv', dropout=0.1, "
            "18 relations, 1,986 parameters\n",
        ),
        (
            Translution(6, 2, length=4, causal=True, roles="kv"),
            "dim=6, heads=2, head_dim=3, length=4, causal=True, roles='kv', 4 relations, 366 parameters\n",
        ),
        (
            SelfAttention(6, 2, grid=(3, 2), causal=False, bias=False),
            "SelfAttention(\n  dim=6, heads=2, head_dim=3, grid=(3, 2), 15 relations, 144 parameters\n",
        ),
    ],
    ids=["full", "sequence", "attention"],
)
def test_a_layer_prints_its_kind_geometry_sizes_and_parameters(layer: Any, text: str) -> None:
    assert text in repr(layer)


def test_equal_tiles_are_printed_once() -> None:
    text = repr(Translution(6, 2, grid=(3, 2), class_token=True, tile_relations=6))
    assert text.count("(0-2): 3 x LogitTile(6 relations, 6 x 6, query, key)") == 1
    assert "(0-1): 2 x PositionTile(3 positions, 6 x 6)" in repr(
        AbsoluteTranslution(6, 2, grid=(3, 2), tile_relations=3)
    )
