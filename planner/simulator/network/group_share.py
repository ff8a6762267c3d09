"""The part of one rank in a group of ranks that share out the relations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from ...config.geometry import RelationGeometry
from ...config.parallel import OwnedGeometry, deal_relations, owned_geometry


@dataclass(frozen=True)
class GroupShare:
    """One rank's relations, and how its exchanges allocate."""

    whole: RelationGeometry
    """The tokens, with the relations of all ranks."""
    ranks: int
    """Ranks of the group, G."""
    place: int
    """The rank within the group."""
    uses_gloo: bool = False
    """Whether the process group gathers into tensors of its own, as gloo does."""

    @cached_property
    def owned(self) -> OwnedGeometry:
        """The pairs of this rank's relations."""
        return owned_geometry(self.whole, deal_relations(self.whole, self.ranks), self.place)


@lru_cache(maxsize=64)
def largest_places(geometry: RelationGeometry, ranks: int) -> tuple[int, ...]:
    """Return the places in a group that may hold the most: with the most relations, and with the most pairs.

    Often they are one. States follow the number of relations; exchanges follow that of pairs.

    Args:
        geometry: arrangement of the tokens.
        ranks: ranks of the group, G.
    """
    parts = [GroupShare(geometry, ranks, place).owned for place in range(ranks)]
    relations = max(range(ranks), key=lambda place: (parts[place].relations, parts[place].total_pairs))
    pairs = max(range(ranks), key=lambda place: (parts[place].total_pairs, parts[place].relations))
    return tuple(dict.fromkeys((relations, pairs)))
