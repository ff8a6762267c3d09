"""Rotary embedding, against rotations in the complex plane."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from translution.models.layers.attention import RotaryEmbedding
from translution.models.ops.rotary import apply_rotary, rotary_angles
from translution.planner.common.errors import InputError
from translution.planner.config.geometry import RelationGeometry

pytestmark = pytest.mark.usefixtures("double")


def turned(x_nd: Tensor, angles: Tensor) -> Tensor:
    """Multiply the pairs (2k, 2k + 1) as complex numbers by exp(i·angle)."""
    pairs = torch.view_as_complex(x_nd.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def test_pairs_turn_like_complex_numbers() -> None:
    geometry = RelationGeometry.sequence(5)
    x = torch.randn(2, 3, 5, 8)
    angles = rotary_angles(geometry, 8)
    assert torch.equal(angles[3], 3 * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8))
    expected = turned(x, angles)
    torch.testing.assert_close(apply_rotary(x, angles.cos(), angles.sin()), expected)
    # The same pairs, stored as halves of a head.
    halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    result = apply_rotary(halves, angles.cos(), angles.sin(), halves=True)
    torch.testing.assert_close(result.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2), expected)


@pytest.mark.parametrize(("height", "width"), [(4, 1), (1, 4)])
def test_a_grid_of_one_row_or_column_turns_half_of_a_head(height: int, width: int) -> None:
    angles = rotary_angles(RelationGeometry.grid(height, width, class_token=True), 8)
    by_row, by_column = angles.split(2, dim=1)
    half = torch.arange(4).double()[:, None] * 10000.0 ** (-torch.arange(0, 4, 2).double() / 4)
    along, across = (by_row, by_column) if width == 1 else (by_column, by_row)
    assert torch.equal(across, torch.zeros(5, 2))
    torch.testing.assert_close(along, torch.cat([torch.zeros(1, 2), half]))


def test_every_axis_of_a_clip_turns_its_own_pairs() -> None:
    angles = rotary_angles(RelationGeometry.grid(2, 3, 4, class_token=True), 16)
    by_frame, by_row, by_column = angles.split((3, 3, 2), dim=1)
    assert not angles[0].any()
    places = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).double()
    for place, part, width in zip(places.unbind(1), (by_frame, by_row, by_column), (6, 6, 4), strict=True):
        frequencies = 10000.0 ** (-torch.arange(0, width, 2).double() / width)
        torch.testing.assert_close(part[1:], place[:, None] * frequencies)
    with pytest.raises(
        InputError, match="head_dim: 4 is not allowed: must be a multiple of 2 of at least 6 for rotary"
    ):
        RotaryEmbedding(RelationGeometry.grid(2, 3, 4), 4)


def test_angles_are_exact_in_float64_whatever_they_were_before() -> None:
    embedding = RotaryEmbedding(RelationGeometry.grid(3, 2), 8).float().double()
    angles = rotary_angles(RelationGeometry.grid(3, 2), 8)
    assert torch.equal(embedding.cosine, angles.cos())
    assert torch.equal(embedding.sine, angles.sin())


def test_unknown_pairs_are_refused() -> None:
    with pytest.raises(InputError, match="rotary_pairs: 'thirds' is not allowed: must be neighbours or halves"):
        RotaryEmbedding(RelationGeometry.sequence(3), 8, "thirds")
