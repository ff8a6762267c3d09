"""Relation parallelism: how many ranks share out the relations, which of them owns which, and the pairs of a rank.

The ranks of a group share out the relations of every table. A pair of tokens has one relation, so it has one owner.
Memory is the number of relations of a rank, and work the number of their pairs; both are to be the same on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from ..common.errors import InputError
from ..common.schema import Schema
from ..common.types import Positive
from .geometry import RelationGeometry, RelationPairs


class ParallelSpec(Schema):
    """What ranks share out in addition to what ZeRO partitions."""

    relation: Positive = 1
    """Ranks of a group that share out the relations of every table, G. Consecutive ranks are a group; ranks with the
    same place in their groups own the same relations, and ZeRO partitions over those. 1 disables it."""


NOT_PARALLEL = ParallelSpec()
"""Every rank has all relations."""


@lru_cache(maxsize=64)
def deal_relations(geometry: RelationGeometry, ranks: int) -> tuple[int, ...]:
    """Return the rank that owns each relation, an entry per relation.

    The relations, sorted by their number of pairs, are dealt in snake order: to the ranks from first to last, then from
    last to first. The numbers of relations then differ by one at most, and the numbers of pairs by that of the most
    frequent relation at most.

    Args:
        geometry: arrangement of the tokens.
        ranks: number of ranks of the group, G.

    Raises:
        InputError: if there are no ranks, or more than relations.
    """
    relations = geometry.relations
    if not 1 <= ranks <= relations:
        raise InputError(
            f"relation ranks: {ranks} is not allowed: must be from 1 to the number of relations {relations}"
        )
    order = sorted(range(relations), key=lambda relation: -geometry.pairs(relation).count)
    owners = [0] * relations
    for place, relation in enumerate(order):
        turn, rank = divmod(place, ranks)
        owners[relation] = rank if turn % 2 == 0 else ranks - 1 - rank
    return tuple(owners)


def check_owners(geometry: RelationGeometry, owners: tuple[int, ...], ranks: int) -> None:
    """Check owners that a user gives.

    Raises:
        InputError: if there is not one rank of the group per relation, or a rank owns nothing.
    """
    relations = geometry.relations
    if len(owners) != relations:
        raise InputError(
            f"relation_owners: {len(owners)} entries are not allowed: must be {relations}, one per relation"
        )
    for relation, rank in enumerate(owners):
        if not isinstance(rank, int) or not 0 <= rank < ranks:
            raise InputError(f"relation_owners: {rank!r} of relation {relation} is not allowed: must be below {ranks}")
    for rank in range(ranks):
        if rank not in owners:
            raise InputError(f"relation_owners: rank {rank} without a relation is not allowed: must own at least one")


@dataclass(frozen=True)
class OwnedGeometry(RelationGeometry):
    """The tokens of a geometry with some of its relations only, numbered anew from zero in the same order.

    Pairs of the other relations do not exist in it.
    """

    owned: tuple[int, ...] = ()
    """Numbers of the relations in the whole geometry, ascending."""

    @classmethod
    def of(cls, whole: RelationGeometry, owned: tuple[int, ...]) -> OwnedGeometry:
        """Return the part of a geometry that has these relations."""
        return cls(whole.axes, whole.class_token, whole.causal, whole.window, whole.is_sequence, owned=owned)

    @cached_property
    def whole(self) -> RelationGeometry:
        """The geometry with all relations."""
        return RelationGeometry(self.axes, self.class_token, self.causal, self.window, self.is_sequence)

    @cached_property
    def offsets(self) -> int:
        """Number of owned relations between patches."""
        return sum(relation < self.whole.offsets for relation in self.owned)

    @property
    def class_relations(self) -> int:
        """Number of owned relations with the class token."""
        return len(self.owned) - self.offsets

    @cached_property
    def patch_pairs(self) -> int:
        """Number of pairs of patches that have an owned relation."""
        return sum(self.pairs(relation).count for relation in range(self.offsets))

    @cached_property
    def total_pairs(self) -> int:
        """Number of pairs that have an owned relation."""
        return sum(self.pairs(relation).count for relation in range(self.relations))

    def relation(self, query: int, key: int) -> int | None:
        """Return the new number of a pair's relation; None if it is not owned, or the pair does not exist."""
        found = self.whole.relation(query, key)
        return self.owned.index(found) if found in self.owned else None

    def offset(self, relation: int) -> tuple[int, ...]:
        """Return the offset from key to query of a relation between patches."""
        return self.whole.offset(self.owned[relation])

    def pairs(self, relation: int) -> RelationPairs:
        """Return the blocks of queries and keys of one relation's pairs.

        Raises:
            InputError: if the relation does not exist.
        """
        self._check(relation)
        return self.whole.pairs(self.owned[relation])

    def reverse(self, relation: int) -> int:
        """Refuse: the reversed pair may belong to another rank.

        Raises:
            InputError: always.
        """
        raise InputError(f"relation: {relation} is not allowed: one rank's relations have no reverse among themselves")

    def table_rows(self, role: str) -> int:
        """Return the token rows that one role's owned matrices multiply, per sample; a broadcast side counts once.

        Args:
            role: "q", "k" or "v".
        """
        sides = [self.pairs(relation) for relation in range(self.relations)]
        return sum((pairs.query if role == "q" else pairs.key).size for pairs in sides)


@lru_cache(maxsize=256)
def owned_geometry(geometry: RelationGeometry, owners: tuple[int, ...], rank: int) -> OwnedGeometry:
    """Return the pairs of a rank's relations.

    Args:
        geometry: arrangement of the tokens.
        owners: the rank that owns each relation.
        rank: the rank in its group.
    """
    return OwnedGeometry.of(geometry, tuple(relation for relation, owner in enumerate(owners) if owner == rank))
