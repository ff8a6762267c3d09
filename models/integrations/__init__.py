"""Connections to other code's networks and weights.

timm                replace the attention of a timm-style vision transformer (`replace_attention`)
published_tables    load relation tables of the published code (`tables_from_state_dict`, `load_tables`)
"""

from .published_tables import load_tables, tables_from_state_dict
from .timm import replace_attention

__all__ = ["load_tables", "replace_attention", "tables_from_state_dict"]
