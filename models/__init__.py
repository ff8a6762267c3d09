"""Translution, α-Translution and attention as PyTorch layers, and the networks made of them."""

from .adapters import load_tables, replace_attention, tables_from_state_dict
from .attention import AbsoluteTranslution, BiasAttention, SelfAttention, ShawAttention
from .layers import AlphaTranslution, Translution
from .networks import build
from .saved import load_network

__all__ = [
    "AbsoluteTranslution",
    "AlphaTranslution",
    "BiasAttention",
    "SelfAttention",
    "ShawAttention",
    "Translution",
    "build",
    "load_network",
    "load_tables",
    "replace_attention",
    "tables_from_state_dict",
]
