"""Relations between tokens: which pairs of tokens share a matrix, and where these pairs lie.

A *relation* is the relative offset of a pair of tokens (query i, key j). All pairs of one relation use the same
matrix of a table, so a grouped operator needs the list of pairs of each relation: `RelationGeometry.pairs`. On a
regular grid this list needs no index tensor. The queries form a box of the grid, the keys form the same box shifted,
and both are strided views of the tokens. A grid has any number of axes: one for text, two for images, three for video
and volumes.

Source: arXiv 2510.10060, section 3 (relative encoding). The class token's three relations follow the published ViT.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TypeAlias

from ..common.errors import InputError

Window: TypeAlias = int | tuple[int | None, ...] | None
"""Largest distance of a pair along every axis, or one for each axis, or None for all pairs."""


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """Tokens ``start + Σ index·stride`` for the indices of a box of this shape, an entry per axis.

    If all pairs share one token (the class token), the box has one place and is broadcast against the other side.
    """

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of distinct tokens."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class RelationPairs:
    """All pairs (i, j) of one relation: two blocks, read in parallel; a block of one token is broadcast."""

    query: TokenBlock
    key: TokenBlock

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents of the box of pairs."""
        return max(self.query.shape, self.key.shape)

    @property
    def rows(self) -> int:
        """Extent of the box of pairs along the first axis."""
        return self.shape[0]

    @property
    def cols(self) -> int:
        """Pairs of the box that share an index of the first axis."""
        return prod(self.shape[1:])

    @property
    def count(self) -> int:
        """Number of pairs, P(r)."""
        return prod(self.shape)


def _positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}: {value!r} is not allowed: must be an integer of at least 1")


def _is_reach(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


@dataclass(frozen=True)
class RelationGeometry:
    """Positions of tokens relative to each other. Build it with `sequence` or `grid`.

    The number of a relation counts the offsets from key to query in row-major order, the last axis fastest: on a grid
    of H x W it is ``(dy + H − 1)·(2W − 1) + dx + W − 1``. Then follow class→class, class query→patch and patch
    query→class. A class token is token 0.

    A causal geometry has no pair whose key lies later along the first axis: earlier tokens of a sequence, earlier and
    the same frames of a video. The first offset then counts from zero: in a sequence the number is ``i − j``. The class
    token sees all tokens, and none sees it, since it knows the later ones.

    With a window, pairs of patches that are farther apart along an axis do not exist. Offsets then range from −window
    to window and are numbered as on a grid of window + 1 along that axis. Pairs with the class token always exist.
    """

    axes: tuple[int, ...]
    """Extents of the grid, an entry per axis; tokens are in row-major order."""
    class_token: bool = False
    causal: bool = False
    window: Window = None
    is_sequence: bool = False
    """Whether the tokens are a text: a grid may have one axis, too."""

    def __post_init__(self) -> None:
        if not self.axes:
            raise InputError("grid: () is not allowed: must have at least one axis")
        for number, extent in enumerate(self.axes):
            _positive("length" if self.is_sequence else f"axis {number} of the grid", extent)
        windows = self.window if isinstance(self.window, tuple) else (self.window,)
        if not all(map(_is_reach, windows)):
            raise InputError(f"window: {self.window!r} is not allowed: must be an integer of at least 0, or None")
        if isinstance(self.window, tuple) and len(self.window) != len(self.axes):
            raise InputError(
                f"window: {self.window!r} is not allowed: must be one number, or one for each of {len(self.axes)} axes"
            )

    @classmethod
    def sequence(cls, length: int, *, causal: bool = False, window: Window = None) -> RelationGeometry:
        """A 1-D sequence; with ``causal`` only pairs with j ≤ i exist."""
        return cls((length,), causal=causal, window=window, is_sequence=True)

    @classmethod
    def grid(
        cls, *axes: int, class_token: bool = False, causal: bool = False, window: Window = None
    ) -> RelationGeometry:
        """A grid of patches with any number of axes, in row-major order, optionally after a class token."""
        return cls(axes, class_token=class_token, causal=causal, window=window)

    @cached_property
    def patches(self) -> int:
        """Number of tokens other than the class token."""
        return prod(self.axes)

    @property
    def tokens(self) -> int:
        """Number of tokens, N."""
        return self.patches + self.class_token

    @cached_property
    def layer_patches(self) -> int:
        """Patches that share an index of the first axis: the columns of a picture, the patches of a frame."""
        return prod(self.axes[1:])

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Distance of neighbouring tokens along each axis."""
        return tuple(prod(self.axes[number + 1 :]) for number in range(len(self.axes)))

    @cached_property
    def reach(self) -> tuple[int, ...]:
        """Largest offset along each axis."""
        windows = self.window if isinstance(self.window, tuple) else (self.window,) * len(self.axes)
        return tuple(
            extent - 1 if window is None else min(extent - 1, window)
            for extent, window in zip(self.axes, windows, strict=True)
        )

    @cached_property
    def lowest(self) -> tuple[int, ...]:
        """Smallest offset along each axis."""
        first, *rest = self.reach
        return (0 if self.causal else -first, *(-reach for reach in rest))

    @cached_property
    def spans(self) -> tuple[int, ...]:
        """Number of offsets along each axis."""
        return tuple(high - low + 1 for low, high in zip(self.lowest, self.reach, strict=True))

    @property
    def complete(self) -> bool:
        """True if every pair of tokens exists."""
        return self.total_pairs == self.tokens**2

    @cached_property
    def triangular(self) -> bool:
        """True if just the pairs with j ≤ i exist, apart from a window."""
        return self.causal and self.layer_patches == 1 and not self.class_token

    @cached_property
    def offsets(self) -> int:
        """Number of relations between patches."""
        return prod(self.spans)

    @property
    def class_relations(self) -> int:
        """Number of relations with the class token."""
        return (2 if self.causal else 3) * self.class_token

    @cached_property
    def relations(self) -> int:
        """Number of relations, R."""
        return self.offsets + self.class_relations

    def rotary_problem(self, head_dim: int) -> str | None:
        """Return which head widths rotary embedding takes if it does not take this one; every axis turns some pairs."""
        least = 2 * len(self.axes)
        if len(self.axes) == 2:
            return None if head_dim % 4 == 0 else "must be a multiple of 4"
        if head_dim % 2 == 0 and head_dim >= least:
            return None
        return "must be a multiple of 2" + (f" of at least {least}" if least > 2 else "")

    def reverse(self, relation: int) -> int:
        """Return the relation of the reversed pair.

        In a causal geometry the reversed pair does not exist. The query table is numbered by the pair's own offset
        there, so that a relation is its own reverse.
        """
        self._check(relation)
        if self.causal:
            return relation
        if relation < self.offsets:
            return self.offsets - 1 - relation
        return self.offsets + (0, 2, 1)[relation - self.offsets]

    def relation(self, query: int, key: int) -> int | None:
        """Return the relation from token ``query`` to token ``key``; None if the pair does not exist."""
        if self.class_token:
            if query == 0:
                return self.offsets if key == 0 else self.offsets + 1
            if key == 0:
                return None if self.causal else self.offsets + 2
            query, key = query - 1, key - 1
        number = 0
        for extent, stride, low, high in zip(self.axes, self.strides, self.lowest, self.reach, strict=True):
            offset = query // stride % extent - key // stride % extent
            if not low <= offset <= high:
                return None
            number = number * (high - low + 1) + offset - low
        return number

    def offset(self, relation: int) -> tuple[int, ...]:
        """Return the offset from key to query of a relation between patches, an entry per axis."""
        found: list[int] = []
        for span, low in zip(reversed(self.spans), reversed(self.lowest), strict=True):
            relation, step = divmod(relation, span)
            found.append(step + low)
        return tuple(reversed(found))

    def pairs(self, relation: int) -> RelationPairs:
        """Return the blocks of queries and keys of one relation's pairs.

        Raises:
            InputError: if the relation does not exist.
        """
        self._check(relation)
        strides, first = self.strides, int(self.class_token)
        if relation >= self.offsets:
            nothing = (0,) * len(self.axes)
            single = TokenBlock(0, (1,) * len(self.axes), nothing)
            everything = TokenBlock(1, self.axes, strides)
            sides = ((single, single), (single, everything), (everything, single))
            return RelationPairs(*sides[relation - self.offsets])
        offset = self.offset(relation)
        shape = tuple(extent - abs(step) for extent, step in zip(self.axes, offset, strict=True))
        query = sum(max(0, step) * stride for step, stride in zip(offset, strides, strict=True))
        key = sum(max(0, -step) * stride for step, stride in zip(offset, strides, strict=True))
        return RelationPairs(TokenBlock(first + query, shape, strides), TokenBlock(first + key, shape, strides))

    def extents(self) -> list[list[int]]:
        """Return the extents of the boxes of pairs along each axis, an entry per offset along it."""
        return [
            [extent - abs(step) for step in range(low, high + 1)]
            for extent, low, high in zip(self.axes, self.lowest, self.reach, strict=True)
        ]

    @cached_property
    def patch_pairs(self) -> int:
        """Number of existing pairs of patches."""
        return prod(map(sum, self.extents()))

    @cached_property
    def total_pairs(self) -> int:
        """Number of existing pairs, ΣP(r): N², or N(N+1)/2 in a causal sequence, without a window."""
        return self.patch_pairs + self.class_token * (1 + (1 if self.causal else 2) * self.patches)

    def table_rows(self, role: str) -> int:
        """Return the token rows that a grouped operator multiplies by one role's table, per sample.

        The number is ΣP(r) without the pairs that repeat the class token, since a broadcast side is multiplied once.

        Args:
            role: "q", "k" or "v".
        """
        if not self.class_token:
            return self.patch_pairs
        # The class token with itself; its side of the pairs with patches, or the patches' side; and the reverse.
        if self.causal:
            return self.patch_pairs + 1 + (1 if role == "q" else self.patches)
        return self.patch_pairs + 2 + self.patches

    def _check(self, relation: int) -> None:
        if not 0 <= relation < self.relations:
            raise InputError(f"relation: {relation} is not allowed: must be from 0 to {self.relations - 1}")
