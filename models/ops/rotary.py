"""Rotary position embedding for sequences and grids; a class token is not rotated.

Source: RoFormer (arXiv 2104.09864). On a grid, one half of each head rotates with the row and the
other half with the column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from translution.planner.config import RelationGeometry


def _angles(positions: Tensor, width: int, base: float) -> Tensor:
    # Start from integers: inside deepspeed.zero.Init every new floating-point tensor is bf16.
    frequencies = base ** (-torch.arange(0, width, 2).double() / width)
    return positions.double()[:, None] * frequencies


def rotary_angles(geometry: RelationGeometry, head_dim: int, base: float = 10000.0) -> Tensor:
    """Return the rotation angle of every token and pair of coordinates, (n, head_dim / 2), float64.

    Args:
        geometry: arrangement of the tokens; a sequence rotates with the position, a grid with row
            and column.
        head_dim: width per head, a multiple of 2 for a sequence and of 4 for a grid.
        base: longest wavelength divided by 2π.
    """
    patches = torch.arange(geometry.patches)
    if geometry.is_sequence:
        angles = _angles(patches, head_dim, base)
    else:
        rows = _angles(patches // geometry.width, head_dim // 2, base)
        angles = torch.cat([rows, _angles(patches % geometry.width, head_dim // 2, base)], dim=1)
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
