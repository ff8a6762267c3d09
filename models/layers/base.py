"""Base class of all layers: common arguments and their checks, the geometry, the output projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from translution.planner.common import InputError
from translution.planner.config import RelationGeometry, Window, canonical_roles

from ..ops.implementations import canonical_implementation


def make_geometry(
    grid: tuple[int, ...] | None, class_token: bool, length: int | None, causal: bool, window: Window
) -> RelationGeometry:
    """Return the geometry given by a layer's arguments.

    Raises:
        InputError: naming the argument that is not allowed.
    """
    if (grid is None) == (length is None):
        raise InputError(f"grid: {grid!r} with length {length!r} is not allowed: give exactly one of grid and length")
    if grid is not None:
        return RelationGeometry.grid(*grid, class_token=class_token, causal=causal, window=window)
    if class_token:
        raise InputError("class_token: True is not allowed: must be False for a sequence")
    assert length is not None
    return RelationGeometry.sequence(length, causal=causal, window=window)


def check_roles(roles: str) -> str:
    """Return the roles in the order "qkv".

    Raises:
        InputError: if they are not a non-empty subset of "qkv".
    """
    try:
        return canonical_roles(roles)
    except ValueError as error:
        raise InputError(f"roles: {error}") from None


class OperatorLayer(nn.Module):
    """Base class of all layers: geometry, heads and output projection.

    Args:
        dim: model width, C.
        heads: number of attention heads, h.
        head_dim: width per head, D; dim / heads by default.
        grid: extents of the grid of patches: (height, width) for images, (frames, height, width) for video or volumes,
            or any number of axes; give either grid or length.
        class_token: True if a class token precedes the patches.
        length: number of tokens, for sequences.
        causal: True if a token attends to no token that lies later along the first axis. A causal class token attends
            to all, and none to it.
        window: maximum distance of a pair of tokens along every axis, or one for each axis. Pairs farther apart do not
            exist, and tables hold only the remaining relations. None: all pairs exist.
        dropout: probability of dropping an attention weight in training.
        bias: whether the output projection has a bias.

    Raises:
        InputError: naming the argument and the allowed values.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        grid: tuple[int, ...] | None = None,
        class_token: bool = False,
        length: int | None = None,
        causal: bool = False,
        window: Window = None,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("heads", heads), ("head_dim", head_dim)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name}: {value!r} is not allowed: must be an integer of at least 1")
        if head_dim is None and dim % heads:
            raise InputError(f"heads: {heads} is not allowed: must divide dim {dim} when head_dim is not given")
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise InputError(f"dropout: {dropout!r} is not allowed: must be at least 0 and below 1")
        self.dropout, self.bias = float(dropout), bias
        self.geometry = make_geometry(grid, class_token, length, causal, window)
        # torch's compiler reads no cached property that is not yet computed.
        self._tokens = self.geometry.tokens
        self.dim, self.heads = dim, heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.inner_dim = heads * self.head_dim

    def _make_output(self) -> nn.Module:
        """Return the output projection; the identity for one head of full width."""
        if self.heads == 1 and self.head_dim == self.dim:
            return nn.Identity()
        return nn.Linear(self.inner_dim, self.dim, bias=self.bias)

    def extra_repr(self) -> str:
        """Say the sizes, the geometry, the options that differ from the defaults, and the number of parameters."""
        geometry = self.geometry
        place = f"length={geometry.tokens}" if geometry.is_sequence else f"grid={geometry.axes}"
        options = {
            "class_token": geometry.class_token or None,
            "causal": geometry.causal or None,
            "window": geometry.window,
            "roles": getattr(self, "roles", None),
            "dropout": self.dropout or None,
        }
        given = [f"{name}={value!r}" for name, value in options.items() if value is not None]
        # Under ZeRO-3 a Parameter is empty until its module is called.
        parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.parameters())
        sizes = f"dim={self.dim}, heads={self.heads}, head_dim={self.head_dim}"
        counts = f"{geometry.relations} relations, {parameters:,} parameters"
        return ", ".join([sizes, place, *given, counts])

    def _check(self, x_bnc: Tensor, key_padding: Tensor | None) -> None:
        """Check the shapes of a call's arguments."""
        tokens = self._tokens
        if x_bnc.ndim != 3 or x_bnc.shape[1:] != (tokens, self.dim):
            raise InputError(f"x: shape {tuple(x_bnc.shape)} is not allowed: must be (batch, {tokens}, {self.dim})")
        if key_padding is not None and (key_padding.dtype != torch.bool or key_padding.shape != x_bnc.shape[:2]):
            found = f"{key_padding.dtype} {tuple(key_padding.shape)}"
            raise InputError(f"key_padding_mask: {found} is not allowed: must be bool {tuple(x_bnc.shape[:2])}")


def check_operator_options(workspace_bytes: int, implementation: str) -> None:
    """Check the options that a layer passes to its operator.

    Raises:
        InputError: naming the option that is not allowed.
    """
    canonical_implementation(implementation)
    if workspace_bytes < 1:
        raise InputError(f"workspace_bytes: {workspace_bytes} is not allowed: must be at least 1")
