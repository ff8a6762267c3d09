"""Translution, α-Translution and attention as PyTorch layers, and the networks made of them."""

from .adapters import load_tables, replace_attention, tables_from_state_dict
from .layers import AlphaTranslution, SelfAttention, Translution
from .networks import build

__all__ = [
    "AlphaTranslution",
    "SelfAttention",
    "Translution",
    "build",
    "load_tables",
    "replace_attention",
    "tables_from_state_dict",
]
