"""Training with relation parallelism in a plain torch loop: groups of ranks, gradients of tables, whole state dicts.

training    process groups, tables under DistributedDataParallel, gradients, clipping
state       state dicts with the tables of all ranks

The layers take the group: ``Translution(..., relation_group=group)``.
"""

from .state import gather_state_dict, load_whole_state_dict
from .training import average_table_gradients, clip_gradients, exclude_tables, split_world

__all__ = [
    "average_table_gradients",
    "clip_gradients",
    "exclude_tables",
    "gather_state_dict",
    "load_whole_state_dict",
    "split_world",
]
