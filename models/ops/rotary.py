"""Rotary position embedding for sequences and grids; a class token is not rotated.

Source: RoFormer (arXiv 2104.09864). On a grid, every axis turns a part of each head: one half turns with the row and
the other half with the column, and on three axes the parts are thirds, as nearly as whole pairs allow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from translution.planner.config import RelationGeometry


def _angles(positions: Tensor, width: int, base: float) -> Tensor:
    # Start from integers: inside deepspeed.zero.Init every new floating-point tensor is bf16.
    frequencies = base ** (-torch.arange(0, width, 2).double() / width)
    return positions.double()[:, None] * frequencies


def axis_widths(geometry: RelationGeometry, head_dim: int) -> list[int]:
    """Return how many coordinates of a head turn with each axis: whole pairs, shared out as evenly as they can be."""
    pairs, axes = head_dim // 2, len(geometry.axes)
    return [2 * (pairs // axes + (axis < pairs % axes)) for axis in range(axes)]


def rotary_angles(geometry: RelationGeometry, head_dim: int, base: float = 10000.0) -> Tensor:
    """Return the rotation angle of every token and pair of coordinates, (n, head_dim / 2), float64.

    Args:
        geometry: arrangement of the tokens; a sequence rotates with the position, a grid with the place along each
            axis.
        head_dim: width per head, a multiple of `rotary_multiple`.
        base: longest wavelength divided by 2π.
    """
    patches = torch.arange(geometry.patches)
    parts = []
    for width, extent, stride in zip(axis_widths(geometry, head_dim), geometry.axes, geometry.strides, strict=True):
        parts.append(_angles(patches // stride % extent, width, base))
    angles = torch.cat(parts, dim=1)
    if geometry.class_token:
        angles = torch.nn.functional.pad(angles, (0, 0, 1, 0))
    return angles


def apply_rotary(x_bhnd: Tensor, cosine_nd: Tensor, sine_nd: Tensor, *, halves: bool = False) -> Tensor:
    """Rotate pairs of coordinates of each token by its angles.

    Args:
        x_bhnd: queries or keys, (b, h, n, d).
        cosine_nd: cosines of the angles, (n, d / 2).
        sine_nd: sines of the angles, (n, d / 2).
        halves: pair the coordinates k and k + d/2, not 2k and 2k + 1.

    Returns:
        (b, h, n, d), in the dtype of ``x_bhnd``.
    """
    axis, shape = (-2, (2, -1)) if halves else (-1, (-1, 2))
    even, odd = x_bhnd.unflatten(-1, shape).unbind(axis)
    # fp32 angles promote a bf16 product to fp32, so it is rounded only once, at the end.
    rotated = (even * cosine_nd - odd * sine_nd, even * sine_nd + odd * cosine_nd)
    return torch.stack(rotated, dim=axis).flatten(-2).to(x_bhnd.dtype)
