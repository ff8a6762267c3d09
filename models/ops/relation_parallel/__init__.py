"""The operator on a group of ranks that own relations: tokens travel to the tables, and the tables stay.

group       the pairs of each rank, and the exchanges of rows and of pairs between ranks
functions   the exchanges as autograd functions, around the chain of grouped.py
"""

from .functions import RelationCall, attend_in_group
from .group import RelationGroup, all_gather_equal

__all__ = ["RelationCall", "RelationGroup", "all_gather_equal", "attend_in_group"]
