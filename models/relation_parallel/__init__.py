"""Training with relation parallelism in a plain torch loop: groups of ranks, gradients of tables, whole state dicts.

training    process groups, tables under DistributedDataParallel, gradients, clipping, dropout
state       state dicts with the tables of all ranks

The layers take the group: ``Translution(..., relation_group=group)``.
"""

from .state import gather_state_dict, load_whole_state_dict
from .training import average_table_gradients, clip_gradients, exclude_tables, share_dropout, split_world

__all__ = [
    "average_table_gradients",
    "clip_gradients",
    "exclude_tables",
    "gather_state_dict",
    "load_whole_state_dict",
    "share_dropout",
    "split_world",
]
