"""Relations between tokens: which pairs of tokens share a matrix, and where these pairs lie.

A *relation* is the relative offset of a pair of tokens (query i, key j). All pairs of one relation use the same
matrix of a table, so a grouped operator needs the list of pairs of each relation: `RelationGeometry.pairs`. On a
regular grid this list needs no index tensor. The queries form a rectangle of the grid, the keys form the same
rectangle shifted, and both are strided views of the tokens.

Source: arXiv 2510.10060, section 3 (relative encoding). The class token's three relations follow the published ViT.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..common.errors import InputError


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """Tokens ``start + row·row_stride + col·col_stride`` for row < rows and col < cols.

    If all pairs share one token (the class token), the block has one row and one column and is broadcast against the
    other side.
    """

    start: int
    rows: int
    cols: int
    row_stride: int
    col_stride: int

    @property
    def size(self) -> int:
        """Number of distinct tokens."""
        return self.rows * self.cols


@dataclass(frozen=True, slots=True)
class RelationPairs:
    """All pairs (i, j) of one relation: two blocks, read in parallel; a block of one token is broadcast."""

    query: TokenBlock
    key: TokenBlock

    @property
    def rows(self) -> int:
        """Rows of the rectangle of pairs."""
        return max(self.query.rows, self.key.rows)

    @property
    def cols(self) -> int:
        """Columns of the rectangle of pairs."""
        return max(self.query.cols, self.key.cols)

    @property
    def count(self) -> int:
        """Number of pairs, P(r)."""
        return self.rows * self.cols


def _positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name}: {value!r} is not allowed: must be an integer of at least 1")


@dataclass(frozen=True)
class RelationGeometry:
    """Positions of tokens relative to each other. Build it with `sequence` or `grid`.

    Numbers of relations: on a grid ``(dy + H − 1)·(2W − 1) + dx + W − 1`` for the offset
    (dy, dx) from key to query, then class→class, class query→patch, patch query→class; in a
    causal sequence ``i − j``. A class token is token 0.

    With a window, pairs of patches that are farther apart in rows or in columns do not exist. Offsets then range from
    −window to window and are numbered as on a grid of window + 1 rows and columns. Pairs with the class token always
    exist.
    """

    height: int
    width: int
    class_token: bool = False
    causal: bool = False
    window: int | None = None
    is_sequence: bool = False
    """Whether the tokens have one axis: a grid may have one column, too."""

    def __post_init__(self) -> None:
        if self.window is not None and (not isinstance(self.window, int) or self.window < 0):
            raise InputError(f"window: {self.window!r} is not allowed: must be an integer of at least 0, or None")
        _positive("height", self.height)
        _positive("width", self.width)
        if self.causal and (self.width != 1 or self.class_token):
            raise InputError("causal: True is not allowed: only a sequence without class token can be causal")

    @classmethod
    def sequence(cls, length: int, *, causal: bool = False, window: int | None = None) -> RelationGeometry:
        """A 1-D sequence; with ``causal`` only pairs with j ≤ i exist."""
        _positive("length", length)
        return cls(height=length, width=1, causal=causal, window=window, is_sequence=True)

    @classmethod
    def grid(cls, height: int, width: int, *, class_token: bool = False, window: int | None = None) -> RelationGeometry:
        """A 2-D grid of patches, in row-major order, optionally after a class token."""
        return cls(height=height, width=width, class_token=class_token, window=window)

    @property
    def patches(self) -> int:
        """Number of tokens other than the class token."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Number of tokens, N."""
        return self.patches + self.class_token

    @property
    def reach(self) -> tuple[int, int]:
        """Largest offset in rows and in columns."""
        rows, cols = self.height - 1, self.width - 1
        return (rows, cols) if self.window is None else (min(rows, self.window), min(cols, self.window))

    @property
    def complete(self) -> bool:
        """True if every pair of tokens exists."""
        return self.total_pairs == self.tokens**2

    @property
    def offsets(self) -> int:
        """Number of relations between patches."""
        rows, cols = self.reach
        return rows + 1 if self.causal else (2 * rows + 1) * (2 * cols + 1)

    @property
    def relations(self) -> int:
        """Number of relations, R."""
        return self.offsets + 3 * self.class_token

    def reverse(self, relation: int) -> int:
        """Return the relation of the reversed pair.

        In a causal sequence the reversed pair does not exist. The query table is numbered by the pair's own offset
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
                return self.offsets + 2
            query, key = query - 1, key - 1
        rows, cols = self.reach
        if self.causal:
            return query - key if 0 <= query - key <= rows else None
        dy = query // self.width - key // self.width
        dx = query % self.width - key % self.width
        if abs(dy) > rows or abs(dx) > cols:
            return None
        return (dy + rows) * (2 * cols + 1) + dx + cols

    def pairs(self, relation: int) -> RelationPairs:
        """Return the blocks of queries and keys of one relation's pairs.

        Raises:
            InputError: if the relation does not exist.
        """
        self._check(relation)
        if relation >= self.offsets:
            single = TokenBlock(0, 1, 1, 0, 0)
            everything = TokenBlock(1, self.height, self.width, self.width, 1)
            sides = ((single, single), (single, everything), (everything, single))
            return RelationPairs(*sides[relation - self.offsets])
        if self.causal:
            dy, dx = relation, 0
        else:
            reach_rows, reach_cols = self.reach
            dy, dx = divmod(relation, 2 * reach_cols + 1)
            dy, dx = dy - reach_rows, dx - reach_cols
        rows, cols = self.height - abs(dy), self.width - abs(dx)
        first = int(self.class_token)
        query_start = first + max(0, dy) * self.width + max(0, dx)
        key_start = first + max(0, -dy) * self.width + max(0, -dx)
        return RelationPairs(
            TokenBlock(query_start, rows, cols, self.width, 1),
            TokenBlock(key_start, rows, cols, self.width, 1),
        )

    @cached_property
    def total_pairs(self) -> int:
        """Number of existing pairs, ΣP(r): N², or N(N+1)/2 when causal, without a window."""
        rows, cols = self.reach
        if self.causal:
            return self.height * (rows + 1) - rows * (rows + 1) // 2
        # Along an axis of n, the offsets from −a to a have n(2a + 1) − a(a + 1) pairs.
        along_rows = self.height * (2 * rows + 1) - rows * (rows + 1)
        along_cols = self.width * (2 * cols + 1) - cols * (cols + 1)
        return along_rows * along_cols + (1 + 2 * self.patches if self.class_token else 0)

    @cached_property
    def table_rows(self) -> int:
        """Token rows that a grouped operator multiplies by one role's table, per sample.

        The number is ΣP(r) without the pairs that repeat the class token, since a broadcast side is multiplied once.
        The query side and the key (or value) side have the same number.
        """
        return self.total_pairs - (self.patches - 1 if self.class_token else 0)

    def _check(self, relation: int) -> None:
        if not 0 <= relation < self.relations:
            raise InputError(f"relation: {relation} is not allowed: must be from 0 to {self.relations - 1}")
