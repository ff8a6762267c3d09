"""Sizes of one call of the relation operator: its tiles, its terms, its scratch matrices.

Source: models/ops/context.py, models/layers/tables.py, models/ops/batched.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from math import prod
from typing import Literal, TypeAlias

from ...config.geometry import RelationGeometry
from ...config.model_base import DEFAULT_WORKSPACE_BYTES, fits_fused_kernels
from ...config.parallel import OwnedGeometry
from ..core import ModuleParams
from .ops import DtypeSizes, product_scratch_bytes

Implementation: TypeAlias = Literal["grouped", "gather"]
"""How rows are multiplied by tables: the pairs of a relation together, or, as published, a matrix per pair."""


@dataclass(frozen=True, slots=True)
class SimulatedTile:
    """One tile of a table: its relations and the parameters of its module."""

    first: int
    """Index of its first relation."""
    count: int
    """Number of its relations."""
    weights: ModuleParams


@dataclass(frozen=True, slots=True)
class TileSizes:
    """Sizes of the products of one tile with one shape. Tiles of every layer and pass have them in common."""

    rows: int
    """Pairs of the largest piece into which its largest relation between patches is split."""
    class_rows: int
    """Pairs of a piece of its relations of the class token; 0 without one."""
    class_relations: int
    """Number of its relations that join the class token and patches, 0 to 2."""
    has_last: bool
    """Whether it has the last relation of all."""
    matrix_bytes: int
    """Bytes that autocast casts at a time."""
    batched: dict[tuple[bool, bool], int]
    """Upper bound of the scratch of a chunk of its pairs on a GPU, by (values, backward)."""
    scratch: int
    """Scratch bytes of multiplying the rows of a piece by a relation's matrix."""
    gradient_scratch: int
    """Scratch bytes of the gradient of that matrix."""


@dataclass(frozen=True, slots=True)
class SimulatedTerm:
    """A scalar or a vector per relation (models/ops/relative_terms.py)."""

    kind: Literal["bias", "key", "value"]
    weights: ModuleParams


_BLOCK_BYTES = 16
"""Bytes of a block of rows in the fused kernels' lists: four numbers of four bytes."""


@dataclass(frozen=True, slots=True)
class RelationShape:
    """Sizes of one operator call on one micro-batch."""

    geometry: RelationGeometry
    batch: int
    heads: int
    d_in: int
    d_out: int
    """Columns of a relation's (d_in, d_out) matrix."""
    inner: int
    """Width of the plain queries, keys and values."""
    sizes: DtypeSizes
    dropout: float = 0.0
    workspace_limit: int = DEFAULT_WORKSPACE_BYTES
    _tiles: dict[tuple[int, int], TileSizes] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def rows(self) -> int:
        """Number of tokens of the micro-batch."""
        return self.batch * self.geometry.tokens

    @property
    def pairs(self) -> int:
        """Number of attention weights of the micro-batch."""
        return self.batch * self.heads * self.geometry.tokens**2

    @property
    def workspace_rows(self) -> int:
        """Number of rows of the scratch matrices."""
        row = 2 * (self.d_in + self.d_out) * self.sizes.value
        limit = self.workspace_limit // (4 if self.sizes.batched else 1)
        return max(self.geometry.layer_patches, min(self.batch * self.geometry.patches, limit // row))

    @property
    def fused(self) -> bool:
        """Whether the fused kernels compute it: half precision, widths that are multiples of 16."""
        fit = fits_fused_kernels(self.d_in, self.d_out, self.heads)
        return self.sizes.fused and self.sizes.value == 2 and fit

    def _fused_pairs(self, roles: int) -> int:
        """Maximum number of pairs whose gradients of projected rows are in the scratch memory (models/ops/fused)."""
        return self.workspace_limit * 3 // 4 // (roles * self.d_out * self.sizes.value * self.batch)

    @property
    def max_pairs(self) -> int:
        """Maximum number of pairs that a GPU multiplies at a time (models/ops/batched.py)."""
        row = 3 * self.d_in + 2 * self.d_out + 2 * max(self.d_in, self.d_out)
        return self.workspace_limit * 3 // 4 // (row * self.batch * self.sizes.value)

    @property
    def _too_large(self) -> bool:
        return self.geometry.patches > (self._fused_pairs(2) if self.fused else self.max_pairs)

    def tile_sizes(self, tile: SimulatedTile) -> TileSizes:
        """Return the sizes of the products of a tile; each is computed once."""
        key = tile.first, tile.count
        found = self._tiles.get(key)
        if found is None:
            found = self._tiles[key] = self._tile_sizes(*key)
        return found

    def _tile_sizes(self, first: int, count: int) -> TileSizes:
        geometry = self.geometry
        rows = self._piece(*_largest_box(geometry, first, count))
        found, has_last = _class_relations(geometry, first, count)
        joined = geometry.class_token and found
        pairs = _pairs_of(geometry, first, count)
        return TileSizes(
            rows=rows,
            class_rows=self._piece(geometry.axes[0], geometry.layer_patches) if joined else 0,
            class_relations=found if geometry.class_token else 0,
            has_last=has_last,
            matrix_bytes=self._matrix_bytes(count),
            batched={
                (values, backward): self._batched_bytes(pairs, count, values=values, backward=backward)
                for values in (False, True)
                for backward in (False, True)
            },
            scratch=product_scratch_bytes(rows, self.d_in, self.d_out, self.sizes),
            gradient_scratch=product_scratch_bytes(self.d_in, rows, self.d_out, self.sizes, transposed=True),
        )

    def _matrix_bytes(self, count: int) -> int:
        """Return the bytes that autocast casts at a time: one relation's matrix; on a GPU at most a tile's.

        The fused kernels cast what they read.
        """
        if self.fused or not self.sizes.casts:
            return 0
        return (count if self.sizes.batched else 1) * self.d_in * self.d_out * self.sizes.value

    def _batched_bytes(self, pairs: int, count: int, *, values: bool, backward: bool) -> int:
        """Return an upper bound of the scratch of a chunk of a tile's pairs on a GPU: rows, products, sums by token.

        Tokens have at most twice as many slots as a chunk has pairs (models/ops/pair_index.py).
        """
        if self.fused:
            # Rows stay on the chip, but for the gradients of projected ones: those of values, or of queries and keys.
            roles = 1 if values else 2
            rows = min(pairs, self._fused_pairs(roles)) * self.batch
            return rows * roles * self.d_out * self.sizes.value if backward else 0
        pairs = min(pairs, self.max_pairs)
        if not pairs or not self.sizes.batched:
            return 0
        value, wide = self.sizes.value, self.sizes.accumulator
        if backward:
            row = self.d_out + 3 * self.d_in if values else 4 * self.d_in + 2 * self.d_out
            row, summed = max(row, self.d_in + 2 * self.d_out), self.d_in
        else:
            row, summed = (
                (max(self.d_in + self.d_out, 3 * self.d_out), self.d_out) if values else (self.d_in + 2 * self.d_out, 0)
            )
        rows = (pairs + 1) * self.batch
        by_heads = 3 * rows * self.heads * wide
        # torch's grouped product returns a tile's gradients in its own tensor.
        product = count * self.d_in * self.d_out * value if backward and self.sizes.copies_products else 0
        return rows * row * value + self.rows * summed * wide + by_heads + product

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the scratch matrices: gathered rows and their products, twice.

        On a GPU they serve the relations that are multiplied one at a time, and have a quarter of the limit.
        """
        if self.sizes.batched and not (self._too_large or (self.geometry.class_token and not self.fused)):
            return 0
        return self.workspace_rows * 2 * (self.d_in + self.d_out) * self.sizes.value

    def _piece(self, rows: int, cols: int) -> int:
        """Return the pairs of the largest piece into which a relation is split; 0 if none is computed by itself.

        Args:
            rows: extent of its box of pairs along the first axis.
            cols: pairs of the box with one index of the first axis.
        """
        if not rows or (self.fused and not self._too_large):
            return 0
        samples = self.workspace_rows // (rows * cols)
        if samples:
            return min(samples, self.batch) * rows * cols
        return max(1, self.workspace_rows // cols) * cols


@lru_cache(maxsize=64)
def shared_shape(shape: RelationShape) -> RelationShape:
    """Return the same object for equal shapes, so that all layers and passes find the tiles' sizes."""
    return shape


def fused_list_bytes(pairs: int, relations: int, batch: int) -> int:
    """Return the bytes of the fused kernels' lists of blocks of rows, which all layers share.

    Source: models/ops/fused/blocks.py. There are lists of blocks of 64, 128 and 256 rows and of whole relations, for
    three ways to cut a tile into chunks.

    Args:
        pairs: number of pairs of tokens.
        relations: number of relations.
        batch: samples of the micro-batch.
    """
    blocks = sum(pairs * batch // rows + relations for rows in (64, 128, 256)) + relations
    return 3 * blocks * _BLOCK_BYTES


@lru_cache(maxsize=64)
def _boxes(geometry: RelationGeometry) -> tuple[tuple[int, int], ...]:
    """Return the extent along the first axis, and the pairs per index of it, of each relation between patches."""
    if isinstance(geometry, OwnedGeometry):
        boxes = _boxes(geometry.whole)
        return tuple(boxes[relation] for relation in geometry.owned[: geometry.offsets])
    first, *rest = geometry.extents()
    layers = [prod(extents) for extents in product(*rest)]
    return tuple((rows, cols) for rows in first for cols in layers)


@lru_cache(maxsize=64)
def _counts(geometry: RelationGeometry) -> tuple[int, ...]:
    return tuple(rows * cols for rows, cols in _boxes(geometry))


@lru_cache(maxsize=4096)
def _pairs_of(geometry: RelationGeometry, first: int, count: int) -> int:
    """Return the number of pairs of a tile's relations between patches."""
    return sum(_counts(geometry)[first : first + count])


@lru_cache(maxsize=4096)
def _largest_box(geometry: RelationGeometry, first: int, count: int) -> tuple[int, int]:
    """Return the extent along the first axis, and the pairs per index of it, of a tile's largest relation.

    A relation of the class token with all patches may be the largest one that a rank of a group owns; one process also
    has that of each patch with itself, which is as large.
    """
    if isinstance(geometry, OwnedGeometry) and _class_relations(geometry, first, count)[0]:
        return geometry.axes[0], geometry.layer_patches
    counts = _counts(geometry)
    own = counts[first : first + count]
    return _boxes(geometry)[counts.index(max(own), first)] if own else (0, 0)


def _class_relations(geometry: RelationGeometry, first: int, count: int) -> tuple[int, bool]:
    """Return how many of a tile's relations join the class token and patches (0 to 2), and whether it has the last one.

    The last relation of all is that of patches as queries and the class token as key, unless the geometry is causal.
    """
    numbers: Sequence[int] = range(first, first + count)
    whole = geometry
    if isinstance(geometry, OwnedGeometry):
        numbers, whole = geometry.owned[first : first + count], geometry.whole
    return sum(whole.offsets + n in numbers for n in (1, 2)), whole.relations - 1 in numbers
