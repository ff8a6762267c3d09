"""Sizes of one call of the relation operator: its tiles, its terms, its scratch matrices.

Source: models/context.py, models/tiles.py, models/batched.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

from .relations import RelationGeometry
from .tape import Weights
from .twins import Widths

DEFAULT_WORKSPACE_BYTES = 256 * 2**20

Implementation: TypeAlias = Literal["grouped", "gather"]
"""How tables meet rows: pairs of one relation together, or as published, a matrix for every pair."""


@dataclass(frozen=True, slots=True)
class TileTwin:
    """One tile: its relations and the parameters of its module."""

    first: int
    count: int
    weights: Weights
    rectangle: tuple[int, int] = (0, 0)
    """Rows and columns of its relation between patches with the most pairs."""


@dataclass(frozen=True, slots=True)
class TermTwin:
    """A scalar or a vector per relation (models/relative_terms.py)."""

    kind: Literal["bias", "key", "value"]
    weights: Weights


@dataclass(frozen=True, slots=True)
class RelationShape:
    """Sizes of one operator and one micro-batch."""

    geometry: RelationGeometry
    batch: int
    heads: int
    d_in: int
    d_out: int
    """Widths of a matrix."""
    inner: int
    """Width of the plain queries, keys and values beside the relative ones."""
    widths: Widths
    dropout: float = 0.0
    workspace_limit: int = DEFAULT_WORKSPACE_BYTES

    @property
    def rows(self) -> int:
        """Tokens of the micro-batch."""
        return self.batch * self.geometry.tokens

    @property
    def pairs(self) -> int:
        """Attention weights of the micro-batch."""
        return self.batch * self.heads * self.geometry.tokens**2

    @property
    def workspace_rows(self) -> int:
        """Rows of the scratch matrices."""
        row = 2 * (self.d_in + self.d_out) * self.widths.value
        return max(self.geometry.width, min(self.batch * self.geometry.patches, self.workspace_limit // row))

    @property
    def workspace_bytes(self) -> int:
        """The scratch matrices: gathered rows and their products, twice; on a GPU of as many pairs as fit."""
        if self.widths.device != "cpu":
            row = 3 * self.d_in + 2 * self.d_out + 2 * max(self.d_in, self.d_out)
            return min(self.workspace_limit, self.batch * self.geometry.total_pairs * row * self.widths.value)
        return self.workspace_rows * 2 * (self.d_in + self.d_out) * self.widths.value

    def piece(self, rows: int, cols: int) -> int:
        """Pairs of the largest piece into which a relation of a rectangle of pairs is split."""
        if not rows:
            return 0
        samples = self.workspace_rows // (rows * cols)
        if samples:
            return min(samples, self.batch) * rows * cols
        return max(1, self.workspace_rows // cols) * cols


@lru_cache(maxsize=4096)
def largest_rectangle(geometry: RelationGeometry, first: int, count: int) -> tuple[int, int]:
    """Rows and columns of the relation between patches with the most pairs among a tile's relations."""
    shapes = [
        (pairs.rows, pairs.cols)
        for r in range(first, min(first + count, geometry.offsets))
        for pairs in [geometry.pairs(r)]
    ]
    return max(shapes, key=lambda shape: shape[0] * shape[1], default=(0, 0))
